"""MLVU, the multiple-choice part of its dev set: seven tasks, 2 175 questions; the score is the mean of the tasks.

Layouts: the benchmark's own (`json/<n_task>.json` with the answer as text, `video/<n_task>/<file>`; also below `MLVU/`,
and its repository's `data/*.json`), and the parquet of sy1998/MLVU_dev, where the question holds its lettered options
and the answer is a letter, with videos beside it or in lmms-eval's `$HF_HOME/mlvu/`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..protocols import lettered, option_of_four
from ._data import (
    Row,
    Source,
    annotation_files,
    bases,
    by_letter,
    by_text,
    loaded,
    mean_of_categories,
    media_folders,
    percent,
    read_rows,
    without_letters,
)
from ._paths import find_file
from .base import LETTERS, Loaded, Prompt, Sample, Task

PARQUET = Source(("sy1998/MLVU_dev",), ("mlvu",), "video_part_*.zip")
SOURCE = Source(("MLVU/MVLU",), ("MLVU", "mlvu"), "videos to MLVU/video/<n_task>/")
TASKS = {
    "1_plotQA": "plotQA",
    "2_needle": "needle",
    "3_ego": "ego",
    "4_count": "count",
    "5_order": "order",
    "6_anomaly_reco": "anomaly_reco",
    "7_topic_reasoning": "topic_reasoning",
}
_NAMES = {"findNeedle": "needle", **{name: name for name in TASKS.values()}}
_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. "
    "Based on your observations, select the best option that accurately addresses the question."
)


def load(root: Path | None) -> Loaded:
    for place in bases(SOURCE, root):  # the benchmark's own layout, if it is there at all
        for folder in ("json", "data"):
            if any((place / folder / f"{stem}.json").is_file() for stem in TASKS):
                return _load_json(place / folder, root)
    try:
        return _load_parquet(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no json/1_plotQA.json with its six neighbours. {SOURCE.get_it} Or: {error}") from None


def _load_json(folder: Path, root: Path | None) -> Loaded:
    files = [folder / f"{stem}.json" for stem in TASKS]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise FileNotFoundError(f"no {', '.join(missing)}: the score is the mean of seven tasks. {SOURCE.get_it}")
    videos = media_folders(SOURCE, root, ["video", "videos"])
    samples = []
    for path in files:
        columns = ("video", "question", "candidates", "answer", "question_type")
        for number, row in enumerate(read_rows([path], columns, SOURCE.get_it)):
            options, name = row.texts("candidates"), row.file_name("video")
            samples.append(
                Sample(
                    id=f"{TASKS[path.stem]}-{number}",
                    video=find_file([v / path.stem for v in videos], name, f"{row.where}, column 'video'"),
                    video_id=name,
                    question=row.text("question"),
                    options=options,
                    answer=by_text(row, "answer", options),
                    category=_category(row, "question_type"),
                )
            )
    return loaded(samples, files)


def _load_parquet(root: Path | None) -> Loaded:
    patterns = ["data/test-*.parquet", "test-*.parquet", "*/test-*.parquet", "*.parquet", "data/*.parquet"]
    files = annotation_files(PARQUET, root, patterns)
    columns = ("video_name", "question", "candidates", "answer", "task_type")
    rows = read_rows(files, columns, PARQUET.get_it)
    videos = media_folders(PARQUET, root, [".", "video", "videos"])
    samples, count = [], Counter[str]()
    for row in rows:
        category, name, asked = _category(row, "task_type"), row.file_name("video_name"), row.text("question")
        question, options = _with_options(asked)
        options = options or without_letters(row.texts("candidates"))
        letter = re.fullmatch(r"\(?[A-Z][).]?", row.text("answer").strip())
        samples.append(
            Sample(
                id=f"{category}-{count[category]}",
                video=find_file(videos, name, f"{row.where}, column 'video_name'"),
                video_id=name,
                question=question,
                options=options,
                answer=by_letter(row, "answer", len(options)) if letter else by_text(row, "answer", options),
                category=category,
                raw={"asked": asked} if question != asked else {},
            )
        )
        count[category] += 1
    return loaded(samples, files)


def _category(row: Row, column: str) -> str:
    kind = row.text(column)
    if kind not in _NAMES:
        raise row.wrong(column, f"one of {', '.join(sorted(_NAMES))}")
    return _NAMES[kind]


def _with_options(asked: str) -> tuple[str, tuple[str, ...]]:
    """A question that ends in lettered lines, taken apart; without such lines no options."""
    parts = re.split(r"\n\s*\(?([A-J])[.):]\s*", asked)
    letters, texts = parts[1::2], [part.strip() for part in parts[2::2]]
    if len(letters) < 2 or "".join(letters) != LETTERS[: len(letters)] or not all(texts):
        return asked, ()
    question = re.sub(r"^Question:\s*", "", parts[0].strip())
    return re.sub(r"\s*\n\s*Options:?$", "", question), tuple(texts)


def prompt(sample: Sample, protocol: str, seconds: Sequence[float]) -> Prompt:
    options = "\n".join(lettered(sample.options, "({}) {}"))
    if protocol == "official":
        user = f"Question: {sample.question}\nOptions:\n{options}\nOnly give the best option."
        return Prompt(user, _SYSTEM, "Best Option: (")
    asked = sample.raw.get("asked") or f"{sample.question}\n{options}"
    if protocol == "lmms_eval_0_3":
        return Prompt(f"\n{asked}\nOnly give the best option.\n\nBest option: (")
    return Prompt(f"{asked}\nOnly give the best option.\nBest option: (")


def headline(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {"m_avg": mean_of_categories(records), "micro_avg": percent(records)}


TASK = Task(
    name="mlvu_dev",
    load=load,
    prompt=prompt,
    extract=option_of_four,
    headline=headline,
    homepage=SOURCE.homepage,
)
