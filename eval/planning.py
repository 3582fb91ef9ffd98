"""`holimerge plan`: the configuration that meets a budget, what is expected of it, and what a run then takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holimerge.config import LIMITS, Budget, Config, ConfigError
from holimerge.planning.calibrate import calibrated
from holimerge.planning.device import cache_folder
from holimerge.planning.predict import GIB, STAGES
from holimerge.planning.solve import ENOUGH, Choice, Setting, most_frames, plan
from holimerge.registry import nearest
from holimerge.shapes import SHAPES, Shape, build_config, count_parameters, load_shape, shape_of
from holimerge.timing import quiet_clock, reading

from .bench import bench_inputs
from .conditions import conditions
from .measure import measure_cases
from .peak_memory import PeakMemory, bytes_of
from .run import patched, run_once
from .toy import describe, random_model, toy_config

Say = Callable[[str, int, int], None]


def parse_budget(limits: Sequence[str]) -> Budget:
    """A budget from texts such as "ttft_ms=300" or "tokens=640,memory_gib=12".

    Raises:
        ConfigError: an unknown limit, no number, or a number out of range.
    """
    found: dict[str, Any] = {}
    for part in (part.strip() for text in limits for part in text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in LIMITS:
            raise ConfigError(f"budget: {part!r}{nearest(name, LIMITS)} Valid: {'=, '.join(LIMITS)}= and a number")
        if name in found:
            raise ConfigError(f"budget.{name}: given twice")
        try:
            found[name] = int(value) if name == "tokens" else float(value)
        except ValueError:
            raise ConfigError(f"budget.{name}: {value!r} is no number") from None
    try:
        return Budget(**found)
    except ValueError:
        from holimerge.config import load_config

        load_config({"method": "holitom", "budget": found})  # says what is wrong, by its key
        raise


def named_config(shape: str | None, model: str | None) -> tuple[Any, Shape | None]:
    """The Hugging Face config of a shape's name, `toy`, `toy-quick`, or of a checkpoint."""
    if model is not None:
        from .load import read_config

        config = read_config(model)
        return config, load_shape(model) if Path(model).is_dir() else None
    if shape in ("toy", "toy-quick"):
        return toy_config(quick=shape == "toy-quick"), None
    known = load_shape(str(shape))
    return build_config(known), known


def setting_of(
    config: Any,
    known: Shape | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    text_tokens: int = 40,
    inner: bool = True,
    recalibrate: bool = False,
) -> Setting:
    """The planner's view of a model on a device, which is measured if it was not yet."""
    shape = shape_of(config)
    kind = config.model_type
    return Setting(
        shape=shape,
        device=calibrated(device, dtype, attention, shape=shape, again=recalibrate),
        text_tokens=text_tokens,
        grid=None if shape.vision.side is not None else (known.grid if known else SHAPES["qwen2.5-vl-7b"].grid),
        separators=known.separators if known else int(kind == "llava_onevision"),
        separators_per_step=known.separators_per_step if known else 8 * (kind == "qwen3_vl"),
        weights=count_parameters(config) * dtype.itemsize,
        element=dtype.itemsize,
        inner=inner,
        eager=attention == "eager",
    )


def plan_model(
    *,
    shape: str | None = None,
    model: str | None = None,
    frames: int | None,
    budget: Sequence[str],
    text_tokens: int = 40,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    inner: bool = True,
    least: float = ENOUGH,
    measure: bool = True,
    repeats: int = 3,
    recalibrate: bool = False,
    say: Say | None = None,
) -> dict[str, Any]:
    """Plan for a model, and run the plan.

    Args:
        shape: "toy", "toy-quick", a name of `holimerge.shapes.SHAPES`, or a folder with a config.json: random weights.
        model: a checkpoint instead (hub id or folder).
        frames: T; None asks for the most frames that fit, of which at least the share `least` of the tokens enters.
        budget: texts such as "ttft_ms=300".
        text_tokens: prompt tokens besides the video's.
        device, dtype, attn_implementation: as the model will run.
        inner: whether an inner merge may be chosen.
        measure: also run the plan `repeats` times and compare.
        recalibrate: measure the device although it was measured before.

    Returns:
        what `Choice.to_dict` says, `model`, `budget`, `yaml`, `measured` (None without a run), `calibration`,
        `conditions`: ready for JSON.

    Raises:
        ConfigError, ValueError, TypeError: a wrong name or limit, a budget that cannot be met (says the least).
    """
    from .load import DTYPES

    if (shape is None) == (model is None):
        raise ValueError("give either a shape (random weights) or a model (a checkpoint)")
    asked = parse_budget(budget)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; valid: {', '.join(DTYPES)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if where.type == "cuda" else torch.float32
    config, known = named_config(shape, model)
    tell = say or (lambda *_: None)
    tell("measuring the device, if it was not yet", 0, 0)
    setting = setting_of(
        config,
        known,
        device=where,
        dtype=kind,
        attention=attn_implementation,
        text_tokens=text_tokens,
        inner=inner,
        recalibrate=recalibrate,
    )
    choice = most_frames(setting, asked, least=least) if frames is None else plan(setting, asked, frames)
    found: dict[str, Any] = {
        "model": model or shape,
        "weights": "random" if model is None else "checkpoint",
        "sizes": describe(config),
        "budget": {name: value for name, value in asked.model_dump(exclude_none=True).items() if name != "exact"},
        **choice.to_dict(),
        "yaml": choice.config.to_yaml(),
        "measured": None,
        "calibration": {
            "seconds": setting.device.seconds,
            "file": str(cache_folder() / setting.device.conditions.file),
        },
    }
    if measure:
        tell("building the model", 0, 0)
        if model is None:
            built = random_model(config, device=where, dtype=kind, attn_implementation=attn_implementation)
        else:
            from .load import load

            built = load(model, device_map=str(where), dtype=dtype, attn_implementation=attn_implementation).model
        run = measure_choices(built, config, setting, {"plan": choice}, repeats=repeats, say=say)["plan"]
        found["measured"] = run
    found["conditions"] = conditions(
        where, dtype=str(kind).removeprefix("torch."), attn=attn_implementation, repeats=repeats
    )
    return found


def measure_choices(
    model: Any,
    config: Any,
    setting: Setting,
    choices: Mapping[str, Choice],
    *,
    repeats: int = 3,
    warmup: int = 1,
    say: Say | None = None,
) -> dict[str, dict[str, Any]]:
    """Run plans for the same number of frames, taking turns.

    The clock is `holimerge.timing.quiet_clock`, the one the device was calibrated with.

    Returns:
        name -> `ms` (ttft and stages: median, min, max, p90, n), `tokens`, `error` (predicted / measured - 1 of the
        time to first token and of each stage, from medians, and of the `memory`, and of it `activations`, what is no
        weight), `memory_gib` (the peak: of the allocator on a GPU, elsewhere the bytes of all tensors alive at once, in
        one more run), `clock`.
    """
    first = next(model.parameters())
    (frames,) = {choice.frames for choice in choices.values()}
    inputs = bench_inputs(config, frames=frames, text_tokens=setting.text_tokens, grid=setting.grid)
    inputs = {key: value.to(first.device) for key, value in inputs.items()}
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(first.dtype)
    clock = quiet_clock(first.device)
    cases: dict[str, Config | None] = {
        name: None if choice.config.method == "keep_all" else choice.config for name, choice in choices.items()
    }
    with reading(clock):
        runs = measure_cases(model, inputs, cases, warmup=warmup, repeats=repeats, new_tokens=0, say=say)
    found = {}
    for name, choice in choices.items():
        ms, tokens = runs[name]["ms"], runs[name]["tokens"]
        measured = {**ms["stages"], "other": ms["other"]}
        error = {"ttft": choice.ttft_ms / ms["ttft"]["median"] - 1}
        error |= {
            stage: choice.stages[stage] / measured[stage]["median"] - 1
            for stage in STAGES
            if stage in measured and measured[stage]["median"] > 0 and choice.stages[stage] > 0
        }
        peak = runs[name]["peak_memory_bytes"]
        if first.device.type != "cuda":
            with patched(model, cases[name]), PeakMemory() as watch:
                run_once(model, inputs, memory=False)
            peak = watch.peak + setting.weights + bytes_of(inputs.values())
        error["memory"] = choice.memory_gib / (peak / GIB) - 1
        error["activations"] = (choice.memory_gib * GIB - setting.weights) / (peak - setting.weights) - 1
        found[name] = {
            "ms": {"ttft": ms["ttft"], "stages": measured},
            "tokens": tokens,
            "memory_gib": round(peak / GIB, 4),
            "error": {stage: round(value, 4) for stage, value in error.items()},
            "clock": "the process's time" if clock.__name__ == "process_time" else "the wall clock",
        }
    return found


def show_plan(result: Mapping[str, Any], console: Any) -> None:
    """Print a plan and, if it was run, how the run compares."""
    from rich.syntax import Syntax
    from rich.table import Table

    from .show import milliseconds_text

    tokens, predicted, run = result["tokens"], result["predicted"], result["measured"]
    limits = ", ".join(f"{name} {value:g}" for name, value in result["budget"].items())
    console.print(f"{result['model']}, {result['frames']} frames, budget: {limits}", style="bold", highlight=False)
    console.print(Syntax(result["yaml"], "yaml", background_color="default"))
    table = Table()
    for name in ("ms", "predicted", *(("measured", "error") if run else ())):
        table.add_column(name, justify="left" if name == "ms" else "right")

    def row(label: str, expected: float, taken: Mapping[str, float] | None, error: float | None) -> None:
        more = [milliseconds_text(taken), "-" if error is None else f"{100 * error:+.1f} %"] if run else []
        table.add_row(label, f"{expected:.4g}", *more)

    for stage, expected in predicted["stages"].items():
        if expected > 0:
            taken = run["ms"]["stages"].get(stage) if run else None
            row(stage, expected, taken, run["error"].get(stage) if run else None)
    table.add_section()
    row("to the first token", predicted["ttft_ms"], run["ms"]["ttft"] if run else None, run and run["error"]["ttft"])
    console.print(table)
    after = "" if tokens["after_inner"] is None else f", {tokens['after_inner']} after the inner merge"
    console.print(f"video tokens: {tokens['video']}, entering the LLM {tokens['entering']}{after}", highlight=False)
    taken = f", measured: {run['memory_gib']:.3g} GiB" if run else ""
    console.print(f"memory, predicted: {predicted['memory_gib']:.3g} GiB{taken}", highlight=False)
    console.print(f"FLOPs of the prefill: {100 * predicted['flops']:.1f} %", highlight=False)
    if run:
        console.print(f"measured by {run['clock']}", style="dim", highlight=False)


def worst(errors: Sequence[float]) -> dict[str, float]:
    """The largest and the median size of some relative errors."""
    sizes = sorted(abs(error) for error in errors)
    return {"largest": round(sizes[-1], 4), "median": round(statistics.median(sizes), 4), "n": len(sizes)}
