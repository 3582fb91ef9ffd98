"""Speed of the outer reduction itself, against a faithful version of the authors' procedure.

    python -m holimerge.eval.bench_reduction --output results

Features: frames of a clip that was encoded as H.264 and decoded again, each cut into 14 x 14 patches, every patch
taken through one seeded random projection to 3584 numbers. Scores: seeded random numbers. One thread, both sides in
turns, the same cosine on both sides (ours), the same budget (the preset's), each side from features to kept tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holimerge.config import load_config
from holimerge.registry import method_module
from holimerge.segment import pair_cosines
from holimerge.tokens import MergeRecord, Target, VideoTokens

from .authors_procedure import authors_outer
from .conditions import conditions
from .measure import spread

SIDE, WIDTH, SEED = 14, 3584, 0
CASES = (32, 128)  # frames
PRESET = "holitom-10"
SCENES = 4  # clips joined in the test video, each with one cut in its middle


def video_features(
    frames: int,
    *,
    side: int = SIDE,
    width: int = WIDTH,
    seed: int = SEED,
    dtype: torch.dtype = torch.float32,
    scenes: int = SCENES,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Features [T, side^2, width] and scores [T, side^2] of a decoded H.264 clip, and what the clip was.

    scenes: clips joined in it, each with one cut in its middle.

    The pixels are centred before the projection, as image models do; otherwise every two patches would look alike.
    """
    from holimerge.video import read_video, synthetic_clip, write_video

    edge = side * 16
    count = [len(part) for part in np.array_split(np.arange(frames), min(scenes, frames))]
    clip = np.concatenate([synthetic_clip(n, edge, edge, seed=seed + i) for i, n in enumerate(count)])
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "clip.mp4", clip, fps=8, gop=16, crf=23)
        size = Path(path).stat().st_size
        decoded = read_video(path, frames=frames).frames
    pixels = torch.from_numpy(decoded.copy()).float().div_(127.5).sub_(1)
    pixels -= pixels.mean()
    patches = pixels.view(frames, side, 16, side, 16, 3).permute(0, 1, 3, 2, 4, 5).reshape(frames, side * side, -1)
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(patches.shape[-1], width, generator=generator) / patches.shape[-1] ** 0.5
    scores = torch.rand(frames, side * side, generator=generator)
    about = {"codec": "h264", "frames": frames, "height": edge, "width": edge, "bytes": size, "scenes": 2 * len(count)}
    return (patches @ projection).to(dtype), scores, about


def ours(features: Tensor, scores: Tensor, config: Any) -> tuple[Tensor, MergeRecord]:
    """holimerge's outer reduction under a configuration: the record, and the features merged by it, [K, D]."""
    T, N, _ = features.shape
    reduce = method_module(config.method).METHOD.reduce
    target = Target(config.budget.keep(T * N), config.budget.retain, config.budget.exact)
    record = reduce(VideoTokens(features, scores), target, config.outer)
    return record.merge(features.flatten(0, 1)), record


def bench_case(
    frames: int,
    *,
    side: int = SIDE,
    width: int = WIDTH,
    preset: str = PRESET,
    repeats: int = 7,
    warmup: int = 2,
    threads: int = 1,
    seed: int = SEED,
    say: Callable[..., None] = lambda *_: None,
) -> dict[str, Any]:
    """Time both sides on one video.

    Args:
        frames, side, width: T, N = side^2, D.
        preset: a configuration with the authors' rounding (`budget.exact: false`) and order (`outer.order: segment`).
        repeats, warmup: runs of each side; they take turns.
        threads: of torch, restored afterwards.
        seed: of clip, projection and scores.

    Returns:
        `ms` of ours, theirs with our cosine, theirs with torch's cosine, and of our cosine alone (part of the first
        two), each median, min, max, p90, n. From medians: `speedup` (same cosine on both sides),
        `speedup_besides_cosine` (the cosine taken off both; None where nothing is left) and `speedup_own_cosine`.
        `kept` of both sides; `agree`, the largest difference between kept tokens and the share of tokens equal within
        1e-3; `segments`, `removed_by_temporal_merging`, `clustered_sets`; `video`, `conditions`.

    Raises:
        RuntimeError: the two sides keep different numbers of tokens.
    """
    config = load_config(preset)
    outer: Any = config.outer
    assert config.budget is not None
    retain: Any = config.budget.retain
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        say("making features", 0, 0)
        features, scores, video = video_features(frames, side=side, width=width, seed=seed)

        def theirs(cosine: Callable[[Tensor], Tensor] | None) -> Tensor:
            kept, _ = authors_outer(
                features, scores, retain, outer.similarity, outer.beta, outer.neighbours, cosine=cosine
            )
            return kept

        sides: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: ours(features, scores, config)[0],
            "theirs": lambda: theirs(lambda x: pair_cosines(x)[0]),
            "theirs_own_cosine": lambda: theirs(None),
            "cosine": lambda: pair_cosines(features)[0],
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        kept: dict[str, Tensor] = {}
        for turn in range(warmup + repeats):
            say(f"{frames} frames, run {turn + 1}", turn, warmup + repeats)
            for name in list(sides) if turn % 2 == 0 else reversed(list(sides)):
                begin = time.perf_counter()
                kept[name] = sides[name]()
                if turn >= warmup:
                    times[name].append((time.perf_counter() - begin) * 1000)
        _, record = ours(features, scores, config)
    finally:
        torch.set_num_threads(before)
    counts = {name: len(value) for name, value in kept.items() if name != "cosine"}
    if len({counts["ours"], counts["theirs"]}) > 1:
        raise RuntimeError(f"the two sides keep different numbers of tokens: {counts}")
    gap = (kept["ours"] - kept["theirs"]).abs().amax(-1)
    ms = {name: spread(values) for name, values in times.items()}
    besides = {name: ms[name]["median"] - ms["cosine"]["median"] for name in ("ours", "theirs")}
    return {
        "kind": "reduction",
        "features": [frames, side * side, width],
        "preset": preset,
        "ms": ms,
        "speedup": round(ms["theirs"]["median"] / ms["ours"]["median"], 3),
        "speedup_besides_cosine": round(besides["theirs"] / besides["ours"], 3) if besides["ours"] > 0 else None,
        "speedup_own_cosine": round(ms["theirs_own_cosine"]["median"] / ms["ours"]["median"], 3),
        "ratios": {
            name: round(ms[theirs]["median"] / ms["ours"]["median"], 3)
            for name, theirs in (("the same cosine", "theirs"), ("torch's cosine on their side", "theirs_own_cosine"))
        },
        "kept": counts,
        "agree": {"largest_difference": float(gap.max()), "share_equal": float((gap < 1e-3).float().mean())},
        "segments": [list(s) for s in record.segments],
        "removed_by_temporal_merging": record.temporal,
        "clustered_sets": list(record.clustered),
        "video": video,
        "cosine": "holimerge.segment.pair_cosines on both sides; theirs_own_cosine uses torch's cosine_similarity",
        "conditions": conditions("cpu", dtype="float32", seed=seed, warmup=warmup, repeats=repeats, threads=threads),
    }


def run(
    output: str | Path | None, *, cases: tuple[int, ...] = CASES, repeats: int = 7, say: Callable[..., None] = print
) -> list[dict[str, Any]]:
    """All cases; with `output`, one JSON per case in that folder."""
    found = []
    for frames in cases:
        result = bench_case(frames, repeats=repeats, say=say)
        found.append(result)
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
            name = f"reduction-{frames}x{SIDE * SIDE}x{WIDTH}-cpu.json"
            (Path(output) / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return found


def reduction_table(results: list[dict[str, Any]]) -> Any:
    """The results as a rich table."""
    from rich.table import Table

    from .show import milliseconds_text

    table = Table(title="Outer reduction, one thread, ms: median (range)", title_justify="left")
    table.add_column("", no_wrap=True)
    for r in results:
        table.add_column(" x ".join(map(str, r["features"])), justify="right", no_wrap=True)
    for side, label in (
        ("ours", "holimerge"),
        ("theirs", "authors' procedure, our cosine"),
        ("theirs_own_cosine", "authors' procedure, torch's cosine"),
        ("cosine", "our cosine alone"),
    ):
        table.add_row(label, *(milliseconds_text(r["ms"][side]) for r in results))
    table.add_section()
    for key, label in (
        ("speedup", "speed-up, same cosine"),
        ("speedup_besides_cosine", "speed-up besides the cosine"),
        ("speedup_own_cosine", "speed-up, torch's cosine on their side"),
    ):
        table.add_row(label, *("-" if r[key] is None else f"{r[key]:.2f}x" for r in results))
    table.add_row("tokens kept, both", *(str(r["kept"]["ours"]) for r in results))
    return table


def main() -> None:
    """The command line of `python -m holimerge.eval.bench_reduction`."""
    from .show import Steps, stdout

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default=None, metavar="FOLDER", help="write one JSON per case into this folder")
    parser.add_argument("--frames", type=int, nargs="+", default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    if given.repeats < 1 or min(given.frames) < 1:
        parser.error("--repeats and --frames must be at least 1")
    with Steps() as say:
        results = run(given.output, cases=tuple(given.frames), repeats=given.repeats, say=say)
    stdout().print(reduction_table(results))


if __name__ == "__main__":
    main()
