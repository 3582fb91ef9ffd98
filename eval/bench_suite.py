"""`make bench` and `make bench-gpu`: every bench, one JSON file each, and what got slower than the files said before.

    python -m holimerge.eval.bench_suite --output results [--gpu] [--only decode]

A result has `kind`, `conditions` and `ratios` (name -> a number, higher is better). Only ratios of two sides measured
in one run are compared with an earlier run's, never milliseconds. Where a step takes a few milliseconds on a CPU, the
ratios of one and the same code differ by a tenth between runs: so without a GPU, whose time is dear, a bench that got
slower is measured once more, and named only if it is slower again. Its file then holds the second run, and the first
one's ratios as `first_ratios`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

TOLERANCE = 0.1
GPU_SHAPES = ("llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")
Say = Callable[..., None]


class Bench(NamedTuple):
    """stem: of the result's file, to which the kind of device is added. run: measures; takes `say`."""

    stem: str
    run: Callable[..., dict[str, Any]]


class Change(NamedTuple):
    """A ratio of a result before and in the runs made now, in their order."""

    stem: str
    ratio: str
    before: float
    now: tuple[float, ...]

    @property
    def slower(self) -> bool:
        """By more than the tolerance in every run."""
        return max(self.now) < (1 - TOLERANCE) * self.before


def benches(gpu: bool) -> list[Bench]:
    """All benches for a machine with or without a GPU; without one the shapes are small."""
    from .bench import bench_model
    from .bench_decode import GPU_LENGTHS, LENGTHS, bench_decode
    from .bench_growth import bench_growth
    from .bench_more_frames import bench_more_frames
    from .bench_planner import GPU_SHAPES as PLANNED
    from .bench_planner import bench_shape
    from .bench_reading import GOPS, bench_gop
    from .bench_reduction import CASES, SIDE, WIDTH, bench_case
    from .small_shapes import SMALL

    shapes = GPU_SHAPES if gpu else ("toy", *SMALL)
    more = ("holimerge-10", *(["more-frames-10"] if gpu else []), "more-frames-4", "more-frames-4-fast")
    found = []
    for shape in shapes:
        presets = ("holitom-10", "holimerge-10", "holimerge-10-fast", "holimerge-25")
        runs = partial(bench_model, shape=shape, configs=presets)
        if gpu:
            runs = partial(runs, repeats=9)
        elif shape in SMALL:
            runs = partial(runs, warmup=1, repeats=3, new_tokens=0)
        found.append(Bench(f"model-{shape}", runs))
    asked: dict[str, Any] = {"shape": shapes[0]} if gpu else {"shape": next(iter(SMALL)), "frames": 16, "repeats": 2}
    found.append(
        Bench(f"more-frames-{asked['shape']}", partial(bench_model, configs=more, warmup=1, new_tokens=0, **asked))
    )
    found.append(Bench(f"growth-{SIDE * SIDE}x{WIDTH}", bench_growth))
    found.append(
        Bench(f"decode-{shapes[0]}", partial(bench_decode, shape=shapes[0], lengths=GPU_LENGTHS, repeats=2))
        if gpu
        else Bench(f"decode-{shapes[0]}", partial(bench_decode, shape=shapes[0], lengths=LENGTHS[:2]))
    )
    if gpu:
        replayed: dict[str, Any] = {"holimerge-10-fast": "holimerge-10-fast"}
        replayed |= {
            f"{name}, replayed tower": {"base": name, "cuda_graph": True}
            for name in ("holimerge-10", "holimerge-10-fast")
        }
        found.append(
            Bench(
                f"replayed-{shapes[0]}",
                partial(bench_model, shape=shapes[0], configs=replayed, repeats=9, new_tokens=0),
            )
        )
        found += [  # half the clip: a GPU's time is dear
            Bench(f"reading-{name}-gop", partial(bench_gop, name, gop, device="cuda:0", repeats=2, part=20))
            for name, gop in GOPS.items()
        ]
        for name, planned in PLANNED.items():  # the device is measured once, for the first of them
            first = name == next(iter(PLANNED))
            found.append(Bench(f"planner-{name}", partial(bench_shape, planned, device="cuda", recalibrate=first)))
        return found
    found += [Bench(f"reduction-{frames}x{SIDE * SIDE}x{WIDTH}", partial(bench_case, frames)) for frames in CASES]
    found.append(Bench("more-frames-synthetic", bench_more_frames))
    found += [Bench(f"reading-{name}-gop", partial(bench_gop, name, gop)) for name, gop in GOPS.items()]
    return found + [Bench(f"planner-{name}", partial(bench_shape, small)) for name, small in SMALL.items()]


def changes(stem: str, before: Mapping[str, Any], *now: Mapping[str, Any]) -> list[Change]:
    """The ratios that a result and those of one run or more share."""
    old, new = before.get("ratios") or {}, [result.get("ratios") or {} for result in now]
    return [
        Change(stem, name, old[name], tuple(ratios[name] for ratios in new))
        for name in old
        if all(name in ratios for ratios in new)
    ]


def run_suite(
    output: Path,
    *,
    gpu: bool,
    only: Sequence[str] = (),
    say: Say = lambda *_: None,
    suite: Callable[[bool], list[Bench]] = benches,
) -> list[Change]:
    """Run benches, write `output`/STEM-DEVICE.json, and compare with what stood there.

    Args:
        output: folder of results, made if it is missing.
        gpu: the shapes of a GPU; nothing is measured twice.
        only: beginnings of stems; all if empty.

    Returns:
        the ratios that were there before; those with `slower` are regressions.

    Raises:
        ValueError: `only` names no bench.
    """
    chosen = [bench for bench in suite(gpu) if not only or bench.stem.startswith(tuple(only))]
    if not chosen:
        valid = ", ".join(bench.stem for bench in suite(gpu))
        raise ValueError(f"only: no bench begins with {' or '.join(map(repr, only))}; valid: {valid}")
    output.mkdir(parents=True, exist_ok=True)
    found = []
    for bench in chosen:
        say(bench.stem)
        result = bench.run(say=say)
        path = output / f"{bench.stem}-{result['conditions']['device_type']}.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = changes(path.stem, before, result)
            if not gpu and any(change.slower for change in changed):
                say(f"{bench.stem}, once more: it was slower than before")
                first, result = result, bench.run(say=say)
                result["first_ratios"] = first["ratios"]
                changed = changes(path.stem, before, first, result)
            found += changed
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return found


def changes_table(found: Sequence[Change]) -> Any:
    """Ratios before and now as a rich table; what got slower is marked."""
    from rich.table import Table

    table = Table(title=f"Ratios, higher is better; slower: by more than {TOLERANCE:.0%}", title_justify="left")
    for column in ("result", "ratio"):
        table.add_column(column)
    for column in ("before", "now"):
        table.add_column(column, justify="right")
    table.add_column("")
    for change in found:
        mark = "slower" if change.slower else ""
        table.add_row(change.stem, change.ratio, f"{change.before:.3f}", _now(change), mark)
    return table


def _now(change: Change) -> str:
    return ", then ".join(f"{ratio:.3f}" for ratio in change.now)


def main() -> None:
    """The command line of `python -m holimerge.eval.bench_suite`; exit status 1 if something got slower."""
    from .show import Steps, stdout

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="FOLDER")
    parser.add_argument("--gpu", action="store_true", help="the shapes of a GPU, on it")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEM", help="benches whose name begins so")
    given = parser.parse_args()
    try:
        with Steps() as say:
            found = run_suite(given.output, gpu=given.gpu, only=given.only, say=say)
    except ValueError as error:
        parser.error(str(error))
    if found:
        stdout().print(changes_table(found))
    slower = [change for change in found if change.slower]
    for change in slower:
        stdout().print(f"slower: {change.stem}, {change.ratio}: {_now(change)}, was {change.before:.3f}", markup=False)
    raise SystemExit(1 if slower else 0)


if __name__ == "__main__":
    main()
