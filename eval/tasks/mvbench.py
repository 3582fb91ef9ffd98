"""MVBench: twenty tasks of 200 questions; the score is the mean of the tasks.

Layouts: `json/<task>.json`, with videos below the root, `video/` or lmms-eval's `$HF_HOME/mvbench_video/`: the segments
cut beforehand of the hub's branch `video`, or the whole videos of `main`, of which only `start` to `end` is shown.
Under `lmms_eval_*` an empty answer is left out of the score, as lmms-eval does; under `official` it is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..protocols import chosen, lettered, named_option, standing_letter
from ._data import Row, Source, annotation_files, bases, by_text, loaded, mean_of_categories, percent, read_rows
from ._paths import VIDEO_ENDINGS, find_file, inside
from .base import Extracted, Loaded, Prompt, Sample, Task

SOURCE = Source(
    repos=("OpenGVLab/MVBench",),
    folders=("mvbench_video",),
    needs="json/*.json; on this branch the videos are unpacked and cut already",
    revisions=("video", "main"),
)


class Place(NamedTuple):
    """Folders of a task's videos: as cut or converted on the branch `video`, and whole ones with their frame rate."""

    cut: str
    whole: str = ""
    source_fps: float | None = None


PLACES = {
    "action_antonym": Place("ssv2_video_mp4", "ssv2_video"),
    "action_count": Place("perception/videos"),
    "action_localization": Place("sta/sta_video_segment", "sta/sta_video"),
    "action_prediction": Place("star/Charades_segment", "star/Charades_v1_480"),
    "action_sequence": Place("star/Charades_segment", "star/Charades_v1_480"),
    "character_order": Place("perception/videos"),
    "counterfactual_inference": Place("clevrer/video_validation"),
    "egocentric_navigation": Place("vlnqa"),
    "episodic_reasoning": Place("tvqa/video_fps3_hq_segment", "tvqa/frames_fps3_hq", 3.0),
    "fine_grained_action": Place("Moments_in_Time_Raw/videos"),
    "fine_grained_pose": Place("nturgbd_convert", "nturgbd"),
    "moving_attribute": Place("clevrer/video_validation"),
    "moving_count": Place("clevrer/video_validation"),
    "moving_direction": Place("clevrer/video_validation"),
    "object_existence": Place("clevrer/video_validation"),
    "object_interaction": Place("star/Charades_segment", "star/Charades_v1_480"),
    "object_shuffle": Place("perception/videos"),
    "scene_transition": Place("scene_qa/video"),
    "state_change": Place("perception/videos"),
    "unexpected_action": Place("FunQA_test/test"),
}
_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)


def load(root: Path | None) -> Loaded:
    folder = annotation_files(SOURCE, root, ["json/*.json"])[0].parent
    files = [folder / f"{task}.json" for task in PLACES]
    if missing := [path.name for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"{folder}: no {', '.join(missing)}: the score is the mean of 20 tasks. {SOURCE.get_it}"
        )
    places = bases(SOURCE, root)
    homes = [
        home for place in places for home in (place, place / "video", place / "data0613", place / "video/data0613")
    ]
    samples = []
    for path in files:
        task, place = path.stem, PLACES[path.stem]
        cut = [home / place.cut for home in homes if (home / place.cut).is_dir()]
        whole = [home / place.whole for home in homes if place.whole and (home / place.whole).is_dir()]
        if not cut and not whole:
            wanted = " or ".join(name for name in (place.cut, place.whole) if name)
            looked = ", ".join(map(str, places))
            raise FileNotFoundError(f"no folder of the videos of {task} ({wanted}) in {looked}. {SOURCE.get_it}")
        for number, row in enumerate(read_rows([path], ("video", "question", "candidates", "answer"), SOURCE.get_it)):
            video, start, end = _video(row, cut, whole)
            options = row.texts("candidates")
            samples.append(
                Sample(
                    id=f"{task}-{number}",
                    video=video,
                    video_id=row.text("video"),
                    question=row.text("question"),
                    options=options,
                    answer=by_text(row, "answer", options),
                    category=task,
                    start=start,
                    end=end,
                    source_fps=place.source_fps if video.is_dir() else None,
                )
            )
    return loaded(samples, files)


def _video(row: Row, cut: list[Path], whole: list[Path]) -> tuple[Path, float | None, float | None]:
    """The file of a row and the part to show: none for a segment, `start` and `end` for a whole video."""
    name, where = row.file_name("video"), f"{row.where}, column 'video'"
    start, end = row.number("start", None), row.number("end", None)
    if cut:
        path = find_file(cut, name, where)
        if not path.exists() and not PurePosixPath(name).suffix:
            path = find_file(cut, name, where, VIDEO_ENDINGS)
        if not path.exists() and start is not None:  # segments carry their bounds in their names
            stem = PurePosixPath(name)
            path = find_file(cut, str(stem.with_name(f"{stem.stem}_{start}_{end}{stem.suffix}")), where)
        if path.exists() or not whole:
            return path, None, None
    path = find_file(whole, name, where)
    return (path if path.exists() else inside(whole[0], name, where)), start, end


def prompt(sample: Sample, protocol: str, seconds: Sequence[float]) -> Prompt:
    options = "\n".join(lettered(sample.options, "({}) {}"))
    if protocol == "official":
        user = f"Question: {sample.question}\nOptions:\n{options}\nOnly give the best option."
        return Prompt(user, _SYSTEM, "Best option:(")
    return Prompt(f"Question:{sample.question}\nOption:\n{options}\nOnly give the best option.\n")


def extract(raw: str, sample: Sample, protocol: str, seed: int) -> Extracted:
    if protocol == "official":
        return Extracted(named_option(raw, sample.options))
    return Extracted(chosen(standing_letter(raw), len(sample.options)), counted=bool(raw.strip()))


def headline(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    counted = [r for r in records if r.get("counted", True)]
    return {
        "mean_of_tasks": mean_of_categories(counted),
        "micro_avg": percent(counted),
        "left_out": 100 * (len(records) - len(counted)) / len(records) if records else 0.0,
    }


TASK = Task(
    name="mvbench",
    load=load,
    prompt=prompt,
    extract=extract,
    headline=headline,
    homepage=SOURCE.homepage,
)
