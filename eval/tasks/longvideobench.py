"""LongVideoBench, validation: 1 337 questions about videos of 8 seconds to an hour, two to five options.

Layout: `validation-*.parquet` (option0 to option4, "N/A" where there is none) or `lvb_val.json` (candidates), `videos/`
and `subtitles/` beside it, or both folders in lmms-eval's `$HF_HOME/datasets/longvideobench/`.

`official` lists the subtitles at the sampled frames before the question: the benchmark puts them between the frames,
where our prompts have one placeholder. `lmms_eval_*` is its task `longvideobench_val_v`: no subtitles, and frames as
its model classes sample them. An answer without a letter counts as a choice at random, as its authors do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..protocols import chosen, drawn, first_letter, lettered, named_option
from ..subtitles import lines_at, read_subtitles
from ._data import Row, Source, annotation_files, loaded, media_folders, percent, read_rows
from ._paths import find_file
from .base import Extracted, Loaded, Prompt, Sample, Task

SOURCE = Source(
    repos=("longvideobench/LongVideoBench",),
    folders=("datasets/longvideobench", "longvideobench"),
    needs="videos.tar.part.* joined to videos/, subtitles.tar to subtitles/; accept its terms on its page first",
)
_COLUMNS = ("id", "video_id", "video_path", "question", "correct_choice", "duration_group", "question_category")


def load(root: Path | None) -> Loaded:
    files = annotation_files(SOURCE, root, ["validation-*.parquet", "data/validation-*.parquet", "lvb_val.json"])
    choices = ("candidates",) if files[0].suffix == ".json" else tuple(f"option{i}" for i in range(5))
    rows = read_rows(files, (*_COLUMNS, *choices), SOURCE.get_it)
    videos = media_folders(SOURCE, root, ["videos"])
    try:
        texts = media_folders(SOURCE, root, ["subtitles"], "subtitles")
    except FileNotFoundError:  # only `official` shows them: it says so when it asks
        texts = []
    samples = []
    for row in rows:
        options, answer = _options(row)
        subtitles = None
        if texts and row.has("subtitle_path"):
            subtitles = find_file(texts, row.file_name("subtitle_path"), f"{row.where}, column 'subtitle_path'")
        samples.append(
            Sample(
                id=row.text("id"),
                video=find_file(videos, row.file_name("video_path"), f"{row.where}, column 'video_path'"),
                video_id=row.text("video_id"),
                question=row.text("question"),
                options=options,
                answer=answer,
                category=row.text("question_category"),
                groups={"duration": f"{row.number('duration_group'):g}", "topic": row.text("topic_category", "")},
                subtitles=subtitles,
                raw={
                    "subtitles_start": float(row.number("starting_timestamp_for_subtitles", 0.0)),
                    "subtitles_wanted": row.has("subtitle_path") and not texts,
                },
            )
        )
    return loaded(samples, files)


def _options(row: Row) -> tuple[tuple[str, ...], int]:
    """The options without fillers, and the index of the right one among them."""
    if "candidates" in row.values:
        given = list(row.texts("candidates"))
    else:
        given = [row.text(f"option{i}", "N/A") for i in range(5)]
    kept = [i for i, text in enumerate(given) if text.strip() != "N/A"]
    right = row.number("correct_choice")
    if right not in kept or len(kept) < 2:
        raise row.wrong("correct_choice", f"the number of an option, one of {kept}")
    return tuple(given[i] for i in kept), kept.index(int(right))


def prompt(sample: Sample, protocol: str, seconds: Sequence[float]) -> Prompt:
    asked = "\n".join([sample.question, *lettered(sample.options)])
    asked += "\nAnswer with the option's letter from the given choices directly.\n"
    if protocol != "official":
        return Prompt(asked)
    if sample.raw.get("subtitles_wanted"):
        raise FileNotFoundError(
            f"protocol official shows subtitles, but there is no folder subtitles/. {SOURCE.get_it}"
        )
    # every question of the data set has a file: one that is lost is an error of this sample (read_subtitles raises)
    lines = read_subtitles(sample.subtitles, sample.raw["subtitles_start"]) if sample.subtitles else []
    shown = lines_at(lines, seconds, at_least=1.0)
    if not shown:
        return Prompt(asked)
    listed = "\n".join(line.text for line in shown)
    return Prompt(f"This video's subtitles are listed below:\n{listed}\n{asked}")


def extract(raw: str, sample: Sample, protocol: str, seed: int) -> Extracted:
    if protocol == "official":
        found = named_option(raw, sample.options)
        return drawn(len(sample.options), sample.id, seed) if found is None else Extracted(found)
    letter = first_letter(raw, "ABCDE", joined=False)
    if letter is None:
        return drawn(len(sample.options), sample.id, seed)
    return Extracted(chosen(letter, len(sample.options)))  # a letter beyond the options is a wrong answer


def headline(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {"lvb_acc": percent(records)}


TASK = Task(
    name="longvideobench",
    load=load,
    prompt=prompt,
    extract=extract,
    headline=headline,
    homepage=SOURCE.homepage,
    sampling={"official": "left", "lmms_eval_0_3": "uniform", "lmms_eval_0_7": "uniform"},
    max_new_tokens=dict.fromkeys(Task.protocols, 32),
)
