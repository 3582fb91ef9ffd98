"""What more frames for the same tokens are worth: the embedded model on short needles, few frames against four times as
many in the same number of tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holimerge.config import load_config

from .evaluate import evaluate
from .tiny import CHECKPOINT

PRESETS, FRAMES, QUESTIONS = ("more-frames-4", "more-frames-4-fast"), 8, 1000


def bench_more_frames(
    *,
    presets: Sequence[str] = PRESETS,
    frames: int = FRAMES,
    questions: int | None = QUESTIONS,
    output: Path | None = None,
    seed: int = 0,
    say: Callable[..., None] = lambda *_: None,
) -> dict[str, Any]:
    """Ask the embedded model about synthetic videos, unpatched with `frames` and under `presets` with more.

    Args:
        presets: configurations with `more_frames`.
        frames: of the unpatched model.
        questions: the first so many; None for all.
        output: where records go; a folder of a moment if None.

    Returns:
        `cases`: name -> {accuracy {percent, low, high, ...}, by_category, tokens, flops, frames asked for}; `ratios` of
        accuracies, presets over unpatched; `conditions`.
    """
    times = {"unpatched": 1} | {preset: load_config(preset).more_frames for preset in presets}
    say(", ".join(f"{name}: {frames * more} frames" for name, more in times.items()))
    with tempfile.TemporaryDirectory() as temporary:
        results = evaluate(
            str(CHECKPOINT),
            list(times),
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
            "frames": frames * times[name],
        }
        for name, found in task["configs"].items()
    }
    full, pairs = cases["unpatched"], {}
    for preset in presets:
        pairs[f"{preset}, accuracy"] = (cases[preset]["accuracy"], full["accuracy"])
        for kind in ("needle", "direction"):  # what is short, or needs neighbouring frames
            found = tuple(case["by_category"].get(kind, {"percent": 0}) for case in (cases[preset], full))
            pairs[f"{preset}, accuracy of {kind}"] = found
    return {
        "kind": "more_frames",
        "presets": list(presets),
        "questions": len(task["samples"]["id"]),
        "cases": cases,
        "ratios": {name: round(a["percent"] / b["percent"], 3) for name, (a, b) in pairs.items() if b["percent"]},
        "conditions": {**results["conditions"], "seed": seed, "repeats": 1},
    }
