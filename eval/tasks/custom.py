"""Your own questions: a JSONL file with one object a line, beside its videos.

    {"video": "clips/a.mp4", "question": "Which way?", "options": ["left", "right"], "answer": "left"}

`answer` is an index from 0 (a number), a letter, or an option's text. Options get letters in the prompt; letters that
all of them have already ("A. left") are taken off first. Optional: "id" (default: the line's number),
"category", "start" and "end" in seconds. Videos are named relative to the file's folder and lie inside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..protocols import chosen, lettered, mcq_letter, named_option
from ._data import Row, clean, loaded, mean_of_categories, percent, without_letters
from ._paths import inside
from .base import LETTERS, Extracted, Loaded, Prompt, Sample, Task

_KEYS = ("video", "question", "options", "answer", "id", "category", "start", "end")
_HINT = 'Each line is like {"video": "a.mp4", "question": "...", "options": ["x", "y"], "answer": "x"}'


def load(root: Path | None) -> Loaded:
    path = _file(root)
    samples, first_line = [], dict[str, int]()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path}: is no UTF-8 text ({error})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            sample = _sample(line, f"{path}, line {number}", path.parent, number)
            if sample.id in first_line:
                raise ValueError(f"{path}, line {number}: the id {sample.id!r} is that of line {first_line[sample.id]}")
            first_line[sample.id] = number
            samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: no questions. {_HINT}")
    return loaded(samples, [path])


def _file(root: Path | None) -> Path:
    if root is None:
        raise ValueError(f"task custom needs a JSONL file, or a folder with one. {_HINT}")
    if root.is_file():
        return root
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else []
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise FileNotFoundError(
            f"{root}: needs to be a JSONL file, or a folder with exactly one; found {found}. {_HINT}"
        )
    return files[0]


def _sample(line: str, where: str, folder: Path, number: int) -> Sample:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON object ({error}). {_HINT}") from error
    row = Row(values, where, _HINT)
    if unknown := [key for key in row.values if key not in _KEYS]:
        raise ValueError(f"{where}: unknown keys {', '.join(map(repr, unknown))}; valid: {', '.join(_KEYS)}")
    given = tuple(o.strip() for o in row.texts("options"))
    options = without_letters(given)
    if len(set(options)) < len(options):
        raise row.wrong("options", "options that differ")
    start, end = row.number("start", None), row.number("end", None)
    if (start is not None and start < 0) or (end is not None and end <= (start or 0)):
        raise ValueError(f"{where}: needs 0 <= start < end in seconds, found start {start!r} and end {end!r}")
    video = inside(folder, row.file_name("video"), f"{where}, column 'video'")
    return Sample(
        id=row.text("id", str(number)),
        video=video,
        video_id=clean(str(PurePosixPath(row.file_name("video")))),  # "./a.mp4" is the same video as "a.mp4"
        question=row.text("question"),
        options=options,
        answer=_answer(row, options, given),
        category=row.text("category", "custom"),
        start=start,
        end=end,
    )


def _answer(row: Row, options: Sequence[str], given: Sequence[str]) -> int:
    value = row.values.get("answer")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return value
    letters = LETTERS[: len(options)]
    needs = f"an index from 0 to {len(options) - 1}, a letter from A to {letters[-1]}, or one of the options"
    if not isinstance(value, str):
        raise row.wrong("answer", needs)
    text = row.text("answer").strip()
    found = {texts.index(text) for texts in (options, given) if text in texts}
    found |= {letters.index(text)} if len(text) == 1 and text in letters else set()
    if len(found) > 1:
        raise row.wrong("answer", "no letter that is also another option's text; give the index")
    if not found:
        raise row.wrong("answer", needs)
    return found.pop()


def prompt(sample: Sample, protocol: str, seconds: Sequence[float]) -> Prompt:
    asked = "\n".join([sample.question, *lettered(sample.options)])
    return Prompt(
        "Select the best answer to the following multiple-choice question based on the video. "
        f"Respond with only the letter of the correct option.\n{asked}\nThe best answer is:"
    )


def extract(raw: str, sample: Sample, protocol: str, seed: int) -> Extracted:
    if protocol == "official":
        return Extracted(named_option(raw, sample.options))
    return Extracted(chosen(mcq_letter(raw, LETTERS[: len(sample.options)], protocol), len(sample.options)))


def headline(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {"accuracy": percent(records), "mean_of_categories": mean_of_categories(records)}


TASK = Task(
    name="custom",
    load=load,
    prompt=prompt,
    extract=extract,
    headline=headline,
    homepage="a JSONL file of your own",
)
