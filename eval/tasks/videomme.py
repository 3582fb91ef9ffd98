"""Video-MME: 900 videos of three durations, three questions each; the answer is a letter.

Layouts: the hub's snapshot (`videomme/test-*.parquet`, with the archives unpacked into `data/` and `subtitle/`, or into
`video/` as VLMEvalKit does), and lmms-eval's `$HF_HOME/videomme/{data,subtitle}/`. Prompts: the benchmark's README
(`official`), and lmms-eval's default one, which speaks of subtitles also where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..protocols import lettered, option_of_four
from ..subtitles import lines_at, lmms_texts, read_subtitles
from ._data import (
    Source,
    annotation_files,
    by_letter,
    loaded,
    media_folders,
    percent,
    read_rows,
    split,
    without_letters,
)
from ._paths import VIDEO_ENDINGS, find_file
from .base import Loaded, Prompt, Sample, Task

SOURCE = Source(
    repos=("lmms-lab/Video-MME", "lmms-eval/Video-MME"),
    folders=("videomme",),
    needs="videos_chunked_*.zip to data/, subtitle.zip to subtitle/",
)
_COLUMNS = ("videoID", "question_id", "duration", "domain", "sub_category", "task_type", "question")
_ASK = (
    "Select the best answer to the following multiple-choice question based on the video{}. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
)


def load(root: Path | None, with_subtitles: bool = False) -> Loaded:
    files = annotation_files(SOURCE, root, ["videomme/test-*.parquet", "test-*.parquet"])
    rows = read_rows(files, (*_COLUMNS, "options", "answer"), SOURCE.get_it)
    folders = media_folders(SOURCE, root, ["data", "video", "videos"])
    texts = media_folders(SOURCE, root, ["subtitle", "subtitles"], "subtitles") if with_subtitles else []
    samples = []
    for row in rows:
        name, where, options = row.file_name("videoID"), f"{row.where}, column 'videoID'", row.texts("options")
        subtitles = find_file(texts, name, where, (".srt",)) if texts else None
        samples.append(
            Sample(
                id=row.text("question_id"),
                video=find_file(folders, name, where, VIDEO_ENDINGS),
                video_id=name,
                question=row.text("question"),
                options=without_letters(options),
                answer=by_letter(row, "answer", len(options)),
                category=row.text("task_type"),
                groups={key: row.text(key) for key in ("duration", "domain", "sub_category")},
                subtitles=subtitles if subtitles and subtitles.is_file() else None,
                raw={"options": options},
            )
        )
    if texts and not any(sample.subtitles for sample in samples):  # three of four videos have a file
        looked = ", ".join(map(str, texts))
        raise FileNotFoundError(f"no video of {files[0]} has its <videoID>.srt in {looked}. {SOURCE.get_it}")
    return loaded(samples, files)


def prompt(sample: Sample, protocol: str, seconds: Sequence[float], with_subtitles: bool = False) -> Prompt:
    asked = "\n".join([sample.question, *(sample.raw.get("options") or lettered(sample.options))])
    if protocol == "official":
        shown = lines_at(read_subtitles(sample.subtitles), seconds) if with_subtitles and sample.subtitles else []
        if not shown:
            return Prompt(f"{_ASK.format('')}{asked}\nThe best answer is:")
        listed = "\n".join(line.text for line in shown)
        ask = _ASK.format(" and the subtitles")
        return Prompt(f"This video's subtitles are listed below:\n{listed}\n{ask}{asked}\nThe best answer is:")
    ask = _ASK.format(" and the subtitles")
    if not with_subtitles:
        return Prompt(f"{ask}{asked}\n\nAnswer with the option's letter from the given choices directly.")
    listed = "No subtitles available"
    if sample.subtitles is not None:
        listed = "\n".join(lmms_texts(lines_at(read_subtitles(sample.subtitles), seconds)))
    return Prompt(f"This video's subtitles are listed below: \n{listed}\n{ask}{asked}\nThe best answer is:")


def headline(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    durations = split(records, lambda r: r["groups"].get("duration", "?"))
    return {"videomme_perception_score": percent(records), **{k: percent(part) for k, part in durations.items()}}


TASK = Task(
    name="videomme",
    load=load,
    prompt=prompt,
    extract=option_of_four,
    headline=headline,
    homepage=SOURCE.homepage,
)
