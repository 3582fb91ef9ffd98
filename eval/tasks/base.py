"""What every benchmark is to the runner: samples, prompts, the reading of an answer, and the score.

One benchmark is one file beside this one, named after its task; it defines `TASK = Task(...)`. Lists in the command
line and in the tests come from discovery; files that begin with an underscore are shared helpers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Sample:
    """One multiple-choice question about one video.

    Attributes:
        id: unique within the task, stable between runs (it keys the record and the resumption).
        video: where the video lies (a file or a folder of frames), already checked to stay inside the data folder;
            it may be missing: the runner records that. None with `frames` set.
        video_id: the video's name in the data set; intervals are clustered by it.
        question: plain text.
        options: the choices as plain text, without letters, in the order asked.
        answer: index into `options`; None where the data set keeps it secret.
        category: the benchmark's own kind of question.
        groups: other divisions that are scored too, for instance {"duration": "short"}.
        start, end: seconds, where only a part of the video is meant; None is the whole.
        subtitles: where they lie, if the task uses them.
        raw: what else the prompt or the scoring needs from the data set's row.
        source_fps: frames a second of `video` where it is a folder of frames; None for files.
    """

    id: str
    video: Path | None
    video_id: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    category: str
    groups: Mapping[str, str] = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    subtitles: Path | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    source_fps: float | None = None


class Prompt(NamedTuple):
    """What the model is shown: the text of the user's turn, with the system's turn and the start of the answer."""

    user: str
    system: str | None = None
    answer_prefix: str = ""


class Extracted(NamedTuple):
    """A choice read from a raw answer: index into the options, or None; `fallback` if it was drawn at random.

    `counted` is False where the protocol leaves the sample out of its score (an empty answer to MVBench in lmms-eval);
    such a sample is still recorded, and a record that carries the key `counted` is scored accordingly.
    """

    choice: int | None
    fallback: bool = False
    counted: bool = True


@dataclass(frozen=True)
class Loaded:
    """A task's samples in the data set's order, and the revision of the data (a hub commit or a hash of the file)."""

    samples: Sequence[Sample]
    revision: str
    source: str


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: as in `--tasks`.
        load: (root folder or None for the hub cache) -> Loaded; raises FileNotFoundError or ValueError that names the
            file, the column and where to get the data set.
        prompt: (sample, protocol, seconds of the sampled frames) -> Prompt; None for tasks answered by likelihood.
        extract: (raw text, sample, protocol, seed) -> Extracted; None for tasks answered by likelihood.
        protocols: names that `prompt` and `extract` know, the default first.
        sampling: protocol -> rule of frame sampling that `holimerge.video.read_video` knows; "uniform" if not named.
        max_new_tokens: protocol -> tokens to write; 16 if not named.
        answer_by: "generation" or "likelihood" (of the option texts, by `holimerge.score_options`).
        headline: (records of the task) -> named scores in percent, the first is the task's own metric; each record has
            `category`, `groups`, `correct` (bool), `choice` (int or None), `video_id`, and may have `counted`.
        homepage: where to get the data.
        prepare: makes the sample's video file if the task generates its videos; called before the video is read.
    """

    name: str
    load: Callable[[Path | None], Loaded]
    prompt: Callable[[Sample, str, Sequence[float]], Prompt] | None
    extract: Callable[[str, Sample, str, int], Extracted] | None
    headline: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]
    homepage: str
    protocols: tuple[str, ...] = ("official", "lmms_eval_0_3", "lmms_eval_0_7")
    sampling: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: Mapping[str, int] = field(default_factory=dict)
    answer_by: str = "generation"
    prepare: Callable[[Sample], None] | None = None

    def __post_init__(self) -> None:
        for name, usual in (("sampling", "uniform"), ("max_new_tokens", 16)):
            given = getattr(self, name)
            object.__setattr__(self, name, {protocol: given.get(protocol, usual) for protocol in self.protocols})
