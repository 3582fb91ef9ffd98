"""How the outer reduction grows with the number of frames: time, and memory beside the features.

    python -m holimerge.eval.bench_growth --output results

The features are those of `holimerge.eval.bench_reduction`. A machine with a GPU measures there, in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from holimerge.config import load_config

from .bench_reduction import PRESET, SEED, SIDE, WIDTH, ours, video_features
from .conditions import conditions
from .measure import spread
from .peak_memory import PeakMemory

FRAMES = (32, 64, 128, 256, 512, 1024)
SCENE = 8  # frames for each clip that the videos are joined of, so that segments do not grow with the video


def bench_growth(
    *,
    frames: tuple[int, ...] = FRAMES,
    width: int = WIDTH,
    device: str | None = None,
    preset: str = PRESET,
    repeats: int = 5,
    warmup: int = 2,
    seed: int = SEED,
    say: Callable[..., None] = lambda *_: None,
) -> dict[str, Any]:
    """Time and memory of `reduce` and merge for videos of several lengths.

    Args:
        frames: the lengths T.
        width: D; N is 196.
        device: default a GPU if there is one. bfloat16 there, float32 elsewhere.
        preset: a configuration.
        repeats, warmup: runs of each length; the lengths take turns.
        seed: of clips, projection and scores.

    Returns:
        `lengths`: per length {frames, ms, ms_per_frame, memory_bytes (most held beside the features), memory_per_frame,
        kept}; `growth`: ms and memory per frame of the longest over the shortest (1: linear); `conditions`.
    """
    config = load_config(preset)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    before = torch.get_num_threads()
    if where.type == "cpu":
        torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    try:
        for number, length in enumerate(frames):
            say(f"{length} frames", number, len(frames))
            features, scores, _ = video_features(
                length, width=width, seed=seed, dtype=dtype, scenes=max(1, length // SCENE)
            )
            features, scores = features.to(where), scores.to(where)
            times, kept = [], 0
            for turn in range(warmup + repeats):
                begin = _now(where)
                kept = len(ours(features, scores, config)[0])
                if turn >= warmup:
                    times.append((_now(where) - begin) * 1000)
            ms, memory = spread(times), _memory(where, functools.partial(ours, features, scores, config))
            found.append(
                {
                    "frames": length,
                    "ms": ms,
                    "ms_per_frame": round(ms["median"] / length, 5),
                    "memory_bytes": memory,
                    "memory_per_frame": round(memory / length),
                    "features_bytes": features.numel() * features.element_size(),
                    "kept": kept,
                }
            )
            del features, scores
    finally:
        torch.set_num_threads(before)
    first, last = found[0], found[-1]
    return {
        "kind": "growth",
        "features": ["T", SIDE * SIDE, width],
        "preset": preset,
        "lengths": found,
        "growth": {key: round(last[f"{key}_per_frame"] / first[f"{key}_per_frame"], 3) for key in ("ms", "memory")},
        "ratios": {
            f"{label} per frame, {first['frames']} over {last['frames']} frames": round(
                first[f"{key}_per_frame"] / last[f"{key}_per_frame"], 3
            )
            for key, label in (("ms", "time"), ("memory", "memory"))
        },
        "conditions": conditions(
            where, dtype=str(dtype).removeprefix("torch."), seed=seed, warmup=warmup, repeats=repeats
        ),
    }


def _now(where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter()


def _memory(where: torch.device, run: Callable[[], Any]) -> int:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        run()
        return torch.cuda.max_memory_allocated(where) - before
    with PeakMemory() as watch:
        run()
    return watch.peak


def growth_figure(result: dict[str, Any]) -> Any:
    """Time and memory against the number of frames, both axes logarithmic, with a straight line of slope one each."""
    from .pictures import BLUE, GREY, VERMILLION, _figure

    figure = _figure(9, 3.6)
    lengths = [r["frames"] for r in result["lengths"]]
    panels = (
        ("ms", [r["ms"]["median"] for r in result["lengths"]], "Milliseconds", BLUE),
        ("memory", [r["memory_bytes"] / 2**20 for r in result["lengths"]], "MiB beside the features", VERMILLION),
    )
    for place, (_, values, label, colour) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        linear = [values[0] * n / lengths[0] for n in lengths]
        axes.loglog(lengths, linear, color=GREY, linestyle="--", label="linear from the shortest")
        axes.loglog(lengths, values, color=colour, marker="o", label="measured")
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.set_xlabel("frames")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    here = result["conditions"]
    figure.suptitle(f"Outer reduction of T x {result['features'][1]} x {result['features'][2]}, {here['device']}")
    return figure


def main() -> None:
    """The command line of `python -m holimerge.eval.bench_growth`."""
    from .show import Steps

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default=None, metavar="FOLDER", help="write a JSON and a picture into this folder")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES))
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.repeats < 1 or min(given.frames) < 1:
        parser.error("--repeats and --frames must be at least 1")
    with Steps() as say:
        result = bench_growth(frames=tuple(given.frames), width=given.width, repeats=given.repeats, say=say)
    text = json.dumps(result, indent=2)
    if given.output is None:
        print(text)
        return
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"growth-{SIDE * SIDE}x{given.width}-{result['conditions']['device_type']}"
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    growth_figure(result).savefig(folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
