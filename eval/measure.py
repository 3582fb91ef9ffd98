"""The one place that measures a model: time to first token, stages, per-token decoding, peak memory, tokens, FLOPs.

The protocol: batch and device are the caller's; every case is warmed up, then the cases take turns (forwards in even
rounds, backwards in odd ones), so that a machine that slows down slows all of them. Times are the wall clock with the
device synchronised on both sides. Reading and preprocessing a video is the caller's to time.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from holimerge.api import ConfigLike, _handle, _inner_model
from holimerge.config import Config, load_config
from holimerge.cost import decode_cost, exact_cost, tower_work
from holimerge.registry import method_module
from holimerge.shapes import shape_of

from .peak_memory import bytes_of
from .run import Run, patched, run_once

Say = Callable[[str, int, int], None]  # what is being done, how many runs are done, of how many


def measure_cases(
    model: Any,
    inputs: Mapping[str, Tensor],
    cases: Mapping[str, ConfigLike | None],
    *,
    warmup: int = 1,
    repeats: int = 3,
    new_tokens: int = 8,
    count: bool = False,
    say: Say | None = None,
    others: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure one prompt under several configurations, taking turns.

    Args:
        model: an unpatched model of a supported family; it is patched for a run and unpatched after it.
        inputs: what `generate` takes, on the model's device.
        cases: name -> configuration; None is the unpatched model.
        warmup: runs of every case before the first one that counts.
        repeats: runs of every case that count.
        new_tokens: decoding steps timed in one more run of every case (0: none).
        count: also count the FLOPs of the prompt that really run (`holimerge.eval.flop_counter`).
        say: called before every run.
        others: inputs of the cases that have their own, as those that read more frames.

    Returns:
        name -> dict, ready for JSON: `config`, `tokens` (features, entering, after_inner, separators, text),
        `ms` {ttft, stages {vision, ...}, other, decode_per_token}, each {median, min, max, p90, n}; `flops` by stage
        (analytic, see `holimerge.cost`; None for more than one row or video), `flops_measured`, `peak_memory_bytes`,
        `answer` (token ids of each row, from the decoding run; None without one).
        Unpatched, `vision` is everything in `get_video_features`, the projector included; patched, what follows the
        reduction is `project`. `other` is what no stage covers (embedding, lm_head, generate itself).

    Raises:
        ValueError: the model is patched, or a number is out of range.
        ConfigError, TypeError: a configuration or model that cannot be used; before any run.
    """
    if _handle(model) is not None:
        raise ValueError("the model is patched: unpatch it; each case is patched in its turn")
    for name, number, least in (("warmup", warmup, 0), ("repeats", repeats, 1), ("new_tokens", new_tokens, 0)):
        if number < least:
            raise ValueError(f"{name}: {number}; at least {least} is needed")
    configs = {name: None if cfg is None else load_config(cfg) for name, cfg in cases.items()}
    given = {name: (others or {}).get(name, inputs) for name in cases}
    for config in configs.values():
        with patched(model, config):
            pass  # whatever cannot be used says so now
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    decoded: dict[str, Run] = {}
    counted: dict[str, int] = {}
    total = len(cases) * (warmup + repeats + bool(new_tokens) + count)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        if say is not None:
            say(what, done, total)
        done += 1

    for turn in range(warmup + repeats):
        for name in list(cases) if turn % 2 == 0 else reversed(list(cases)):
            step(f"{name}: warm-up" if turn < warmup else f"{name}: run {turn - warmup + 1} of {repeats}")
            with patched(model, configs[name]):
                _record(model, given[name], configs[name])
                run = run_once(model, given[name])
            if turn >= warmup:
                runs[name].append(run)
    for name, config in configs.items():
        if new_tokens:
            step(f"{name}: decoding")
            with patched(model, config):
                _record(model, given[name], config)
                decoded[name] = run_once(model, given[name], max_new_tokens=new_tokens + 1, whole=True, memory=False)
        if count:
            from .flop_counter import count_flops

            step(f"{name}: counting FLOPs")
            with patched(model, config):
                counted[name] = count_flops(functools.partial(run_once, model, given[name], memory=False))
    found = {
        name: summary(model, given[name], configs[name], runs[name], decoded.get(name), counted.get(name))
        for name in cases
    }
    everything = bytes_of(x for inputs_of in given.values() for x in inputs_of.values())
    for name, case in found.items():
        if case["peak_memory_bytes"] is not None:  # what other cases' prompts hold meanwhile is not this one's
            case["peak_memory_bytes"] -= everything - bytes_of(given[name].values())
    return found


def _record(model: Any, inputs: Mapping[str, Tensor], config: Config | None) -> None:
    """One prompt that is not timed, where the next one is to replay what this one records."""
    if config is not None and config.cuda_graph:
        run_once(model, inputs, memory=False)


def measure(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    config: ConfigLike | None,
    warmup: int = 1,
    repeats: int = 3,
    new_tokens: int = 8,
    count: bool = False,
) -> dict[str, Any]:
    """`measure_cases` of a single case: `config`, or the unpatched model for None."""
    cases = {"case": config}
    found = measure_cases(model, inputs, cases, warmup=warmup, repeats=repeats, new_tokens=new_tokens, count=count)
    return found["case"]


def spread(values: Iterable[float]) -> dict[str, float]:
    """median, min, max, p90 (between the two nearest values) and n of some milliseconds."""
    listed = sorted(values)
    place = 0.9 * (len(listed) - 1)
    low, high = listed[int(place)], listed[min(int(place) + 1, len(listed) - 1)]
    found = {"median": statistics.median(listed), "min": listed[0], "max": listed[-1]}
    found["p90"] = low + (high - low) * (place - int(place))
    return {**{key: round(value, 4) for key, value in found.items()}, "n": len(listed)}


def gains(full: Mapping[str, Any], reduced: Mapping[str, Any]) -> dict[str, float | None]:
    """What a case gains against the unpatched one, from medians; a slowdown is a number below 1.

    ttft_ratio: time to first token, full / reduced. ideal_ratio: (vision + prefill) of the full case over (vision +
    project + prefill) of the reduced one, the gain if reducing and splicing were free. share_of_ideal: the one over
    the other. strict_share: the same with the projector of the kept tokens counted as overhead. reduce_ms: the
    reduction; overhead_ms: with splicing; inner_share: the inner merge over the full case's prefill. flops_ratio: of
    the whole prompt, full / reduced.
    """
    a, b = ({k: v["median"] for k, v in case["ms"]["stages"].items()} for case in (full, reduced))
    ttft = full["ms"]["ttft"]["median"] / reduced["ms"]["ttft"]["median"]
    top = a["vision"] + a["prefill"]
    ideal = top / (b["vision"] + b.get("project", 0.0) + b["prefill"])
    found: dict[str, float | None] = {
        "ttft_ratio": ttft,
        "ideal_ratio": ideal,
        "share_of_ideal": ttft / ideal,
        "strict_share": ttft / (top / (b["vision"] + b["prefill"])),
        "reduce_ms": b.get("reduce", 0.0),
        "overhead_ms": b.get("reduce", 0.0) + b.get("splice", 0.0),
        "inner_share": b.get("inner", 0.0) / a["prefill"],
        "flops_ratio": full["flops"]["total"] / reduced["flops"]["total"]
        if full["flops"] and reduced["flops"]
        else None,
    }
    return {key: None if value is None else round(value, 4) for key, value in found.items()}


def summary(
    model: Any, inputs: Mapping[str, Tensor], config: Config | None, runs: list[Run], decoded: Run | None, counted: Any
) -> dict[str, Any]:
    """One case as `measure_cases` returns it. decoded: the run whose further tokens count; counted: measured FLOPs."""
    last = runs[-1]
    peaks = [run.peak for run in runs if run.peak is not None]
    stages = {stage: spread(run.stages[stage] for run in runs) for stage in last.stages}
    covered = [sum(ms for stage, ms in run.stages.items() if stage != "inner") for run in runs]
    return {
        "config": None if config is None else config.to_dict(),
        "tokens": last.tokens,
        "ms": {
            "ttft": spread(run.ttft for run in runs),
            "stages": stages,
            "other": spread(run.ttft - ms for run, ms in zip(runs, covered, strict=True)),
            "decode_per_token": spread(decoded.per_token) if decoded is not None and decoded.per_token else None,
        },
        "flops": analytic_flops(model, inputs, config, last),
        "flops_measured": counted,
        "peak_memory_bytes": max(peaks) if peaks else None,
        "answer": decoded.answer.tolist() if decoded is not None and decoded.answer is not None else None,
    }


def analytic_flops(
    model: Any, inputs: Mapping[str, Tensor], config: Config | None, run: Run
) -> dict[str, int | float] | None:
    """FLOPs of the run by stage, convention `exact`, and of one more token.

    None for several rows or videos, and where it is not known what a reduction inside the tower left to do.
    """
    inner = _inner_model(model)
    pixels, grids = inputs.get("pixel_values_videos"), inputs.get("video_grid_thw")
    videos = 0 if pixels is None else len(pixels) if grids is None else len(grids)
    if inputs["input_ids"].shape[0] != 1 or videos != 1 or pixels is None:
        return None
    shape = shape_of(inner.config)
    tokens = {key: value or 0 for key, value in run.tokens.items()}
    merged = config is not None and config.inner is not None and run.tokens["after_inner"] is not None
    layer = config.inner.resolve(shape.text.layers) if merged and config is not None and config.inner else None
    after = run.tokens["after_inner"] if merged else None
    outer = config.outer if config is not None else None
    if grids is None:
        frames, grid = int(pixels.shape[1]), None
    else:
        steps, rows, columns = grids[0].tolist()
        frames, grid = steps * shape.vision.temporal_patch, (rows, columns)
    encoder = config.encoder if config is not None else None
    if encoder is not None and encoder.tokens is None and run.seen is None:
        return None
    cost = exact_cost(
        shape,
        frames=frames,
        grid=grid,
        text_tokens=tokens["text"],
        entering=tokens["entering"],
        separators=tokens["separators"],
        after_inner=after,
        inner_layer=layer,
        at=outer.at if outer is not None else "projector_output",
        static_sets=run.clusters,
        scored=config is not None and method_module(config.method).METHOD.needs_scores,
        matched=not merged or config is None or config.inner is None or config.inner.merge != "drop",
        work=tower_work(shape.vision, encoder, shape.vision.steps(frames), grid, run.seen),
    )
    rest = tokens["text"] + tokens["separators"]
    if merged and config is not None and config.inner is not None and config.inner.compact_cache:
        decode = decode_cost(shape.text, rest + tokens["after_inner"])
    else:
        decode = decode_cost(shape.text, rest + tokens["entering"], None if after is None else rest + after, layer)
    return {**cost.to_dict(), "decode_per_token": decode}
