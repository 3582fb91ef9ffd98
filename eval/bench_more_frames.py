"""What more frames for the same tokens are worth: the embedded model on short needles, few frames against four times as
many in the same number of tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holimerge.config import load_config

from .evaluate import evaluate
from .tiny import CHECKPOINT

PRESET, FRAMES, QUESTIONS = "more-frames-4", 8, 1000


def bench_more_frames(
    *,
    preset: str = PRESET,
    frames: int = FRAMES,
    questions: int | None = QUESTIONS,
    output: Path | None = None,
    seed: int = 0,
    say: Callable[..., None] = lambda *_: None,
) -> dict[str, Any]:
    """Ask the embedded model about synthetic videos, unpatched with `frames` and under `preset` with more.

    Args:
        preset: a configuration with `more_frames`.
        frames: of the unpatched model.
        questions: the first so many; None for all.
        output: where records go; a folder of a moment if None.

    Returns:
        `cases`: name -> {accuracy {percent, low, high, ...}, by_category, tokens, flops, frames asked for}; `ratios` of
        accuracies, preset over unpatched; `conditions`.
    """
    times = load_config(preset).more_frames
    say(f"{frames} frames against {frames * times} in their tokens")
    with tempfile.TemporaryDirectory() as temporary:
        results = evaluate(
            str(CHECKPOINT),
            ["unpatched", preset],
            ["synthetic"],
            output or Path(temporary),
            num_frames=frames,
            limit=questions,
            dtype="float32",
            seed=seed,
        )
    assert results is not None
    task = results["tasks"]["synthetic"]
    cases = {
        name: {
            **{key: found[key] for key in ("accuracy", "by_category", "tokens", "flops")},
            "frames": frames * (times if name == preset else 1),
        }
        for name, found in task["configs"].items()
    }
    full, more = cases["unpatched"], cases[preset]
    pairs = {"accuracy": (more["accuracy"], full["accuracy"])}
    for kind in ("needle", "direction"):  # what is short, or needs neighbouring frames
        pairs[f"accuracy of {kind}"] = tuple(case["by_category"].get(kind, {"percent": 0}) for case in (more, full))
    return {
        "kind": "more_frames",
        "preset": preset,
        "questions": len(task["samples"]["id"]),
        "cases": cases,
        "ratios": {name: round(a["percent"] / b["percent"], 3) for name, (a, b) in pairs.items() if b["percent"]},
        "conditions": {**results["conditions"], "seed": seed, "repeats": 1},
    }
