"""Whether the planner's times are right on this machine: plans for three models and three numbers of frames, run.

    python -m holimerge.eval.bench_planner --output results

Real classes with random weights: on a CPU of a size that one can run, on a GPU (`--device cuda`) the published 7B and
8B models. For each number of frames the stock model and the plan for a share of its predicted time take turns;
predicted and measured times to the first token are compared, and the peak of memory.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from holimerge.config import Budget
from holimerge.planning.solve import Choice, ImpossibleError, Setting, plan
from holimerge.shapes import SHAPES as NAMED
from holimerge.shapes import Shape, build_config, count_parameters

from .conditions import conditions
from .planning import measure_choices, setting_of, worst
from .small_shapes import SMALL
from .toy import describe, random_model

FRAMES = {"cpu": (2, 4, 8), "cuda": (8, 16, 32)}
RETAIN = {"cuda": 0.25}  # at most, where all tokens may take no longer than few: launching takes the time
SHARE = 0.6  # of the stock model's predicted time, which the plan must meet
AIM = 0.15  # relative error of the time to first token
GPU_SHAPES = {name: NAMED[name] for name in ("llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")}


def bench_shape(
    shape: Shape,
    *,
    device: str = "cpu",
    frames: Sequence[int] | None = None,
    share: float = SHARE,
    warmup: int | None = None,
    repeats: int | None = None,
    recalibrate: bool = True,
    say: Callable[[str, int, int], None] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Plan and run one model: in float32 on a CPU, in bfloat16 on a GPU.

    Args:
        shape: its sizes.
        device: "cpu" or a CUDA device.
        frames: numbers of frames; default those of `FRAMES`.
        share: of the stock model's predicted time that the plan is given as `ttft_ms`.
        warmup, repeats: runs of the stock model and of the plan; default 1 and 3, on a GPU 2 and 5.
        recalibrate: measure the device although it was measured: on a shared machine that may have been in a quieter
            hour. Without, only what is missing of the model's own sizes is measured.
        keep: given the result so far after each number of frames.

    Returns:
        `cases`: per number of frames `unpatched` and `plan`, each predicted and measured; `errors` of the time to first
        token; `memory_errors` of the peak of memory, `activation_errors` of what of it is no weight; `aim`;
        `conditions`.
    """
    config, where = build_config(shape), torch.device(device)
    gpu = where.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    warmup = (2 if gpu else 1) if warmup is None else warmup
    repeats = (5 if gpu else 3) if repeats is None else repeats
    setting = setting_of(config, shape, device=where, dtype=dtype, recalibrate=recalibrate)
    gc.collect()  # a model before this one would count as memory
    model = random_model(config, device=where, dtype=dtype, attn_implementation="sdpa")
    result: dict[str, Any] = {
        "kind": "planner",
        "shape": shape.name,
        "sizes": describe(config),
        "parameters": count_parameters(config),
        "calibration_seconds": setting.device.seconds,
        "cases": {},
    }
    for count in FRAMES[where.type] if frames is None else frames:
        stock = plan(setting, Budget.model_validate({"retain": 1.0}), count)
        limits, planned = _within(setting, count, stock.ttft_ms, share, RETAIN.get(where.type))
        choices = {"unpatched": stock, "plan": planned}
        runs = measure_choices(model, config, setting, choices, warmup=warmup, repeats=repeats, say=say)
        sides = {name: {**choices[name].to_dict(), "measured": runs[name]} for name in choices}
        result["cases"][str(count)] = {"budget": limits, **sides}
        measured = [case[side]["measured"] for case in result["cases"].values() for side in ("unpatched", "plan")]
        errors = [run["error"]["ttft"] for run in measured]
        result["errors"] = worst(errors)
        result["memory_errors"] = worst([run["error"]["memory"] for run in measured])
        result["activation_errors"] = worst([run["error"]["activations"] for run in measured])
        result["aim"] = {"at most": AIM, "met": max(map(abs, errors)) <= AIM}
        result["conditions"] = conditions(
            where, dtype=str(dtype).removeprefix("torch."), attn="sdpa", seed=0, warmup=warmup, repeats=repeats
        )
        keep(result)
    return result


def _within(
    setting: Setting, frames: int, whole: float, share: float, retain: float | None
) -> tuple[dict[str, float], Choice]:
    """The plan for a share of the whole's time, or for half way to the least where that is too little."""
    others = {} if retain is None else {"retain": retain}
    limits = {"ttft_ms": round(share * whole, 1), **others}
    try:
        return limits, plan(setting, Budget.model_validate(limits), frames)
    except ImpossibleError as error:
        # a reduction may take longer than it saves
        limits["ttft_ms"] = round(max((error.least + whole) / 2, 1.01 * error.least), 1)
        return limits, plan(setting, Budget.model_validate(limits), frames)


def main(arguments: list[str] | None = None) -> None:
    """Write one JSON per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--device", default="cpu", help="cpu (default) or a CUDA device")
    parser.add_argument("--shape", action="append", help="repeat for several; default: all of the kind of device")
    parser.add_argument("--frames", type=int, nargs="+")
    parser.add_argument("--repeats", type=int)
    asked = parser.parse_args(arguments)
    from .show import Steps

    kind = torch.device(asked.device).type
    shapes = GPU_SHAPES if kind == "cuda" else SMALL
    names = asked.shape or list(shapes)
    if unknown := [name for name in names if name not in shapes]:
        parser.error(f"--shape: {', '.join(unknown)}; valid on {kind}: {', '.join(shapes)}")
    with Steps() as say:
        for number, name in enumerate(names):
            asked.output.mkdir(parents=True, exist_ok=True)
            path = asked.output / f"planner-{name}-{kind}.json"

            def keep(result: dict[str, Any], path: Path = path) -> None:
                path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

            result = bench_shape(
                shapes[name],
                device=asked.device,
                frames=asked.frames,
                repeats=asked.repeats,
                recalibrate=kind == "cpu" or number == 0,
                say=say,
                keep=keep,
            )
            print(name, result["errors"], "aim met" if result["aim"]["met"] else "aim missed")


if __name__ == "__main__":
    main()
