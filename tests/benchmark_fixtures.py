"""Small data sets on disk in the layouts of the real benchmarks, with real mp4 files.

Each maker fills a folder as the hub's snapshot with its archives unpacked, or the layout its name says, and returns it.
`as_hub` turns such a folder into a hub cache with blobs, refs and a snapshot of links.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from holimerge.video import synthetic_clip, write_video

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FPS = 4.0  # clips of 12 frames: three seconds


def video(path: Path, seed: int = 0, frames: int = 12) -> Path:
    """A real H.264 file of 64 x 48 pixels; equal seeds give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, synthetic_clip(frames, 48, 64, seed=seed), fps=FPS, options={"preset": "ultrafast"})
    return path


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A parquet file with the columns of the rows."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet or JSON file, to be changed and written again by `write_rows`."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: Any) -> Path:
    """A parquet or JSON file again."""
    if path.suffix == ".parquet":
        return parquet(path, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def as_hub(home: Path, repo: str, folder: Path, revision: str = "main", commit: str = COMMIT) -> Path:
    """Move a folder's files into the hub cache below `home` ($HF_HOME), as links to blobs; returns the snapshot."""
    place = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    for name in ("blobs", "refs", "snapshots"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = place / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(folder)
    return place / "snapshots" / commit


def srt(lines: Sequence[tuple[float, float, str]], tag: bool = True) -> str:
    """SubRip text as Video-MME's files have it."""

    def clock(seconds: float) -> str:
        ms = round(seconds * 1000)
        return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"

    wrap = '<font color="white" size=".72c">{}</font>' if tag else "{}"
    return "".join(
        f"{number}\n{clock(a)} --> {clock(b)}\n{wrap.format(text)}\n\n" for number, (a, b, text) in enumerate(lines, 1)
    )


VIDEOMME_SUBTITLES = [(0.0, 0.2, "at the start"), (0.3, 0.7, "between two frames"), (2.5, 3.0, "at the end")]


def videomme(root: Path, videos: str = "data", subtitles: str = "subtitle") -> Path:
    """Three videos with two questions each, the first two with subtitles."""
    rows = []
    for number, duration in enumerate(("short", "medium", "long")):
        name = f"AbCdEf{number}-_k"
        video(root / videos / f"{name}.mp4", seed=number)
        if number < 2:
            (root / subtitles).mkdir(parents=True, exist_ok=True)
            (root / subtitles / f"{name}.srt").write_text(srt(VIDEOMME_SUBTITLES), encoding="utf-8")
        rows += [
            {
                "video_id": f"{number:03}",
                "duration": duration,
                "domain": "Life Record" if number else "Knowledge",
                "sub_category": "Food",
                "url": f"https://www.youtube.com/watch?v={name}",
                "videoID": name,
                "question_id": f"{number:03}-{question}",
                "task_type": ("Action Reasoning", "Counting Problem")[question - 1],
                "question": "Why does the cook put the pan in the sink?",
                "options": ["A. To cool it.", "B. To wash it.", "C. To hide it.", "D. To fill it."],
                "answer": "ABCD"[(number + question) % 4],
            }
            for question in (1, 2)
        ]
    parquet(root / "videomme" / "test-00000-of-00001.parquet", rows)
    return root


MLVU_TASKS = {
    "1_plotQA": "plotQA",
    "2_needle": "findNeedle",
    "3_ego": "ego",
    "4_count": "count",
    "5_order": "order",
    "6_anomaly_reco": "anomaly_reco",
    "7_topic_reasoning": "topic_reasoning",
}
COLOURS = ["Red", "Blue", "Green", "White"]


def mlvu_json(root: Path, json_folder: str = "json") -> Path:
    """The benchmark's own layout: 8 questions, two of them plotQA about one video, and the two written tasks."""
    for number, (stem, kind) in enumerate(MLVU_TASKS.items()):
        name = f"{kind}_{number}.mp4"
        video(root / "video" / stem / name, seed=number)
        row = {"video": name, "duration": 312, "question": "What colour is the door?", "candidates": COLOURS}
        rows = [{**row, "answer": COLOURS[number % 4], "question_type": kind}]
        if not number:
            rows.append({**rows[0], "question": "And the gate?", "answer": "White", "duration": 312.5})
        write_rows(root / json_folder / f"{stem}.json", rows)
    for stem in ("8_sub_scene", "9_summary"):
        write_rows(root / json_folder / f"{stem}.json", [{"video": "x.mp4", "question": "Describe.", "answer": "..."}])
    return root


def mlvu_parquet(root: Path, videos: str = ".") -> Path:
    """The same questions as the parquet of sy1998/MLVU_dev: lettered options in the question, a letter as answer."""
    rows = []
    for number, kind in enumerate(MLVU_TASKS.values()):
        name = f"{kind}_{number}.mp4"
        video(root / videos / name, seed=number)
        asked = [("What colour is the door?", number % 4)] + [("And the gate?", 3)] * (not number)
        rows += [
            {
                "video_name": name,
                "duration": 312.0,
                "question": question + "".join(f"\n({c}) {text}" for c, text in zip("ABCD", COLOURS, strict=True)),
                "candidates": COLOURS,
                "answer": "ABCD"[answer],
                "task_type": "needle" if kind == "findNeedle" else kind,
            }
            for question, answer in asked
        ]
    parquet(root / "data" / "test-00000-of-00001.parquet", rows)
    return root


MVBENCH_CUT = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
MVBENCH_BOUNDED = {"action_sequence", "action_prediction", "object_interaction", "action_localization"}
MVBENCH_WHOLE = {
    "star/Charades_segment": "star/Charades_v1_480",
    "sta/sta_video_segment": "sta/sta_video",
    "tvqa/video_fps3_hq_segment": "tvqa/frames_fps3_hq",
    "nturgbd_convert": "nturgbd",
    "ssv2_video_mp4": "ssv2_video",
}
MVBENCH_OPTIONS = ["Ate the food.", "Took the cup.", "Closed the door.", "Sat down.", "Left."]


def mvbench(root: Path, form: str = "cut", below: str = "") -> Path:
    """One question a task, of 2 to 5 options.

    Args:
        root: the folder; `json/<task>.json` comes into it.
        form: "cut": the branch `video`; "named": segments that carry their bounds in the file name; "whole": `main`
            with whole videos and a folder of frames.
        below: folder within root for the videos.
    """
    for number, (task, folder) in enumerate(MVBENCH_CUT.items()):
        options = MVBENCH_OPTIONS[: 2 + number % 4]
        row: dict[str, Any] = {"video": f"ABC{number}.mp4", "question": "What happened?", "candidates": options}
        row["answer"] = options[number % len(options)]
        if task in MVBENCH_BOUNDED or (task == "episodic_reasoning" and form == "whole"):
            row |= {"start": 1.0, "end": 2.5}
        place, name = root / below / folder, row["video"]
        if form == "named" and task in MVBENCH_BOUNDED:
            name = f"ABC{number}_1.0_2.5.mp4"
        if form == "whole" and folder in MVBENCH_WHOLE:
            place = root / below / MVBENCH_WHOLE[folder]
        if form == "whole" and task == "episodic_reasoning":
            row["video"] = name = f"house_s01e0{number}_clip"
            (place / name).mkdir(parents=True)
            for at, frame in enumerate(synthetic_clip(9, 48, 64)):
                Image.fromarray(np.asarray(frame)).save(place / name / f"{at:05}.jpg")
        else:
            ending = ".avi" if form == "whole" and task == "fine_grained_pose" else ".mp4"
            row["video"] = row["video"].replace(".mp4", ending)
            write_mvbench_video(place / name.replace(".mp4", ending), number)
        write_rows(root / "json" / f"{task}.json", [row])
    return root


def write_mvbench_video(path: Path, seed: int) -> None:
    """An mp4, or an AVI as NTU's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = "mpeg4" if path.suffix == ".avi" else "libx264"
    write_video(path, synthetic_clip(12, 48, 64, seed=seed), fps=FPS, codec=codec)


def longvideobench(root: Path, kind: str = "parquet", media: Path | None = None) -> Path:
    """Three questions: five, four and two options; subtitles in both JSON forms; `kind` "json" is lvb_val.json."""
    media = media or root
    options = [["one", "two", "three", "four", "five"], ["red", "blue", "green", "grey"], ["yes", "no"]]
    rows = []
    for number, texts in enumerate(options):
        name = f"abc{number}"
        video(media / "videos" / f"{name}.mp4", seed=number)
        items: list[dict[str, Any]] = [
            {"start": "00:00:10.000", "end": "00:00:10.200", "line": "at the start"},
            {"start": "00:00:12.500", "end": "00:00:13.000", "line": "at the <i>end</i>"},
        ]
        if number == 1:
            items = [
                {"timestamp": [10.0, 10.2], "text": "at the start"},
                {"timestamp": [12.5, None], "text": "the end"},
            ]
        write_rows(media / "subtitles" / f"{name}_en.json", items)
        row: dict[str, Any] = {
            "video_id": name,
            "id": f"{name}_0",
            "video_path": f"{name}.mp4",
            "subtitle_path": f"{name}_en.json",
            "correct_choice": (number + 1) % len(texts),
            "question": "Which one?",
            "duration": 3.0,
            "duration_group": (15, 600, 3600)[number],
            "question_category": ("T2O", "TOS", "T2O")[number],
            "topic_category": "KS-Knowledge-STEM",
            "starting_timestamp_for_subtitles": 10.0,
        }
        filled = texts + ["N/A"] * (5 - len(texts))
        row |= {"candidates": texts} if kind == "json" else {f"option{i}": text for i, text in enumerate(filled)}
        rows.append(row)
    write_rows(root / ("lvb_val.json" if kind == "json" else "validation-00000-of-00001.parquet"), rows)
    return root


def egoschema(root: Path, media: Path | None = None) -> Path:
    """Two questions of config Subset, and the config MC whose answers are not public."""
    rows = []
    for number in range(2):
        name = f"0074f737-11cb-497d-8d07-77c3a8127e7{number}"
        video((media or root) / "videos" / f"{name}.mp4", seed=number)
        options = [
            f"{c}. C does {what}." for c, what in zip("ABCDE", ("this", "that", "it", "more", "less"), strict=True)
        ]
        row = {"question_idx": str(number + 7), "question": "What is c mainly doing?", "video_idx": name}
        rows.append({**row, "option": options, "answer": str(3 - number)})
    parquet(root / "Subset" / "test-00000-of-00001.parquet", rows)
    parquet(root / "MC" / "test-00000-of-00001.parquet", [{**row, "answer": None} for row in rows])
    return root


def custom(root: Path) -> Path:
    """A JSONL file of four lines (one empty) beside its videos."""
    video(root / "clips" / "a.mp4", seed=0)
    video(root / "b.mp4", seed=1)
    rows = [
        {"video": "clips/a.mp4", "question": "Which way?", "options": ["left", "right"], "answer": "left"},
        {"video": "b.mp4", "question": "How many?", "options": ["2", "3", "1"], "answer": 1, "category": "count"},
        {
            "video": "b.mp4",
            "question": "Who?",
            "options": ["he", "she"],
            "answer": "B",
            "id": "who",
            "start": 1,
            "end": 2.5,
        },
    ]
    (root / "mine.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return root
