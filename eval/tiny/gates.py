"""Does the embedded model count? Baselines, attention and gates beside the results of `holimerge eval`.

holimerge eval --model eval/tiny/checkpoint --tasks synthetic --config unpatched,... --dtype float32 --output RUN
python -m holimerge.eval.tiny.gates RUN/results.json      writes checkpoint/evaluation.json and the model card
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holimerge.eval.intervals import clustered_interval

from . import CHECKPOINT
from .card import write_card

ALL = "unpatched"
LEAST, ABOVE, KINDS, VIDEOS = 70.0, 20.0, 5, 500


def baselines(samples: Sequence[Any]) -> dict[str, Any]:
    """What the model answers without the video, and what elimination alone would give, in percent by category."""
    from holimerge.eval.answering import best_option, option_tokens
    from holimerge.eval.load import load
    from holimerge.inputs import build_inputs
    from holimerge.scoring import score_options

    model, tokenizer, settings, template = load(CHECKPOINT, dtype="float32")
    asked: dict[tuple[str, ...], int] = {}
    rows = []
    for sample in samples:
        key = (sample.question, *sample.options)
        if key not in asked:
            inputs = build_inputs(
                sample.question, [], config=model.config, tokenizer=tokenizer, settings=settings, chat_template=template
            )
            asked[key] = best_option(score_options(model, inputs, option_tokens(tokenizer, sample.options, "")))
        rows.append((sample.category, sample.video_id, asked[key] == sample.answer, sample.raw["elimination"]))
    found = {}
    for category in sorted({row[0] for row in rows}):
        chosen = [row for row in rows if row[0] == category]
        found[category] = {
            "blind": clustered_interval([r[2] for r in chosen], [r[1] for r in chosen]).to_dict(),
            "elimination": round(100 * sum(r[3] for r in chosen) / len(chosen), 2),
        }
    return found


def received_attention(videos: int = 100) -> dict[str, Any]:
    """Attention that a patch receives in the tower's last layer: on objects, on background, and their ratio.

    A patch is on an object if it lies in the token cell that holds an object's centre. 1 is the mean over all patches.
    """
    from holimerge.eval.load import load
    from holimerge.eval.tasks import synthetic
    from holimerge.video import read_video

    from .meaning import labels
    from .splits import story_of
    from .train_vision import Tower, on_objects, pixels
    from .world import describe

    tower = Tower(load(CHECKPOINT, dtype="float32").model)
    files = {sample.raw["index"]: sample for sample in synthetic.load(None).samples}
    on, off = [], []
    for index in range(videos):
        story, sample = story_of("test", index), files[index]
        synthetic.prepare(sample)
        video = read_video(sample.video, frames=story.frames)
        with torch.no_grad():
            tower(pixels(torch.from_numpy(video.frames)))
        received, patches = tower.received() * tower.received().shape[-1], on_objects(labels(describe(story)))
        on.append(received[patches])
        off.append(received[~patches])
    objects, background = torch.cat(on).mean().item(), torch.cat(off).mean().item()
    return {
        "objects": round(objects, 3),
        "background": round(background, 3),
        "ratio": round(objects / background, 2),
        "videos": videos,
    }


def gates(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each gate: what it asks, the figure, and whether it is met; from the evaluation's numbers alone."""
    task = evaluation["tasks"]["synthetic"]
    configs, samples = task["configs"], task["samples"]
    whole = configs[ALL]
    found = []

    def gate(text: str, figure: str, met: bool) -> None:
        found.append({"gate": text, "figure": figure, "met": bool(met)})

    count = len(set(samples["video_id"]))
    gate(f"at least {VIDEOS} test videos", str(count), count >= VIDEOS)
    kinds = whole["by_category"]
    gate(
        f"at least {KINDS} categories, the needle among them",
        ", ".join(kinds),
        len(kinds) >= KINDS and "needle" in kinds,
    )
    for name, interval in kinds.items():
        base = evaluation["baselines"][name]
        blind, elimination = base["blind"]["percent"], base["elimination"]
        best = max(blind, elimination)
        gate(
            f"{name}: at least {LEAST:.0f} % with all tokens, {ABOVE:.0f} points above blind and elimination",
            f"{interval['percent']:.1f} %, blind {blind:.1f}, elimination {elimination:.1f}",
            interval["percent"] >= LEAST and interval["percent"] >= best + ABOVE,
        )
    for name, result in configs.items():
        if name != ALL:
            difference = [a - b for a, b in zip(result["correct"], whole["correct"], strict=True)]
            low = paired_low(difference, samples["video_id"])
            gate(
                f"all tokens not below {name}",
                f"{result['accuracy']['percent']:.1f} against {whole['accuracy']['percent']:.1f} %, "
                f"paired difference from {low:+.1f}",
                low <= 0,
            )
    ratio = evaluation["attention"]["ratio"]
    gate("received attention higher on objects than on background", f"{ratio:.2f} times", ratio > 1)
    return found


def paired_low(differences: Sequence[int], videos: Sequence[str]) -> float:
    """Lower end of the 95 % interval of a mean difference, in points, clustered by video."""
    sums: dict[str, list[int]] = {}
    for value, video in zip(differences, videos, strict=True):
        sums.setdefault(video, []).append(value)
    mean = sum(differences) / len(differences)
    spread = sum((sum(part) - mean * len(part)) ** 2 for part in sums.values())
    groups = len(sums)
    error = (spread * groups / max(1, groups - 1)) ** 0.5 / len(differences)
    return 100 * (mean - 1.96 * error)


def main() -> None:
    """Command line."""
    from holimerge.eval.tasks.synthetic import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of `holimerge eval`")
    chosen = parser.parse_args()
    evaluation = json.loads(chosen.results.read_text(encoding="utf-8"))
    evaluation["baselines"] = baselines(load(None).samples)
    evaluation["attention"] = received_attention()
    evaluation["gates"] = gates(evaluation)
    text = json.dumps(evaluation, separators=(",", ":"))
    (CHECKPOINT / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    write_card(CHECKPOINT)
    for line in evaluation["gates"]:
        print("met   " if line["met"] else "NOT MET", line["gate"], "|", line["figure"])


if __name__ == "__main__":
    main()
