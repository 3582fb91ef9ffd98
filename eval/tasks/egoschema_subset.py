"""EgoSchema, the 500 questions with public answers: three-minute first-person clips, five options.

Layout: the hub's config `Subset` (`Subset/test-*.parquet`), videos in `videos/` beside it or in lmms-eval's
`$HF_HOME/egoschema/videos/`. The full set has no public answers. An answer that names no option counts as a choice at
random, as in lmms-eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..protocols import chosen, drawn, lettered, marked_letter, named_option
from ._data import Source, annotation_files, loaded, media_folders, percent, read_rows, without_letters
from ._paths import VIDEO_ENDINGS, find_file
from .base import Extracted, Loaded, Prompt, Sample, Task

SOURCE = Source(
    repos=("lmms-lab/egoschema", "lmms-eval/egoschema"),
    folders=("egoschema",),
    needs="config Subset; videos_chunked_*.zip to videos/",
)


def load(root: Path | None) -> Loaded:
    files = annotation_files(SOURCE, root, ["Subset/test-*.parquet"])
    rows = read_rows(files, ("question_idx", "question", "video_idx", "option", "answer"), SOURCE.get_it)
    folders = media_folders(SOURCE, root, ["videos"])
    samples = []
    for row in rows:
        name, options = row.file_name("video_idx"), row.texts("option")
        answer = row.text("answer").strip()  # the full set's is empty
        if answer not in [str(i) for i in range(len(options))]:
            raise row.wrong("answer", f'a text from "0" to "{len(options) - 1}" (config Subset)')
        samples.append(
            Sample(
                id=row.text("question_idx"),
                video=find_file(folders, name, f"{row.where}, column 'video_idx'", VIDEO_ENDINGS),
                video_id=name,
                question=row.text("question"),
                options=without_letters(options),
                answer=int(answer),
                category="egoschema",
                raw={"options": options},
            )
        )
    return loaded(samples, files)


def prompt(sample: Sample, protocol: str, seconds: Sequence[float]) -> Prompt:
    asked = "\n".join([sample.question, *(sample.raw.get("options") or lettered(sample.options))])
    return Prompt(f"{asked}\nAnswer with the option's letter from the given choices directly.")


def extract(raw: str, sample: Sample, protocol: str, seed: int) -> Extracted:
    if protocol == "official":
        found = named_option(raw, sample.options)
    else:
        shown = sample.raw.get("options") or lettered(sample.options)
        found = chosen(marked_letter(raw.strip(), shown), len(sample.options))  # its models strip their answers
    return drawn(len(sample.options), sample.id, seed) if found is None else Extracted(found)


def headline(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {"accuracy": percent(records)}


TASK = Task(
    name="egoschema_subset",
    load=load,
    prompt=prompt,
    extract=extract,
    headline=headline,
    homepage=SOURCE.homepage,
)
