"""The one place that measures a model: time to first token, stages, per-token decoding, peak memory, tokens, FLOPs.

The protocol: batch and device are the caller's; every case is warmed up, then the cases take turns (forwards in even
rounds, backwards in odd ones), so that a machine that slows down slows all of them. Times are the wall clock with the
device synchronised on both sides. Reading and preprocessing a video is the caller's to time.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from holimerge.api import ConfigLike, _handle, _inner_model, merging
from holimerge.config import Config, load_config
from holimerge.cost import decode_cost, exact_cost
from holimerge.registry import family_module, method_module
from holimerge.shapes import shape_of
from holimerge.timing import StageClock

Say = Callable[[str, int, int], None]  # what is being done, how many runs are done, of how many

# The stages of the time to first token, in order; `inner` is part of `prefill`.
STAGES = ("vision", "reduce", "project", "splice", "prefill", "inner")


@dataclass
class Run:
    """One prompt, timed. Milliseconds, except `peak` (bytes), `answer` (generated token ids [B, n]) and `clusters`
    (sizes of the static sets that were clustered)."""

    ttft: float
    stages: dict[str, float]
    tokens: dict[str, int | None]
    per_token: list[float] = field(default_factory=list)
    peak: int | None = None
    answer: Tensor | None = None
    clusters: tuple[int, ...] = ()


class _Ticks(StoppingCriteria):
    """Notes when each token is there; never stops anything."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.devices, self.times = devices, list[float]()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        _synchronise(self.devices)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run_once(
    model: Any, inputs: Mapping[str, Tensor], *, max_new_tokens: int = 1, whole: bool = False, memory: bool = True
) -> Run:
    """Generate greedily once, from the model as it is (patched or not).

    Args:
        model: of a supported family.
        inputs: what `generate` takes, on the model's device.
        max_new_tokens: how many tokens; the time to first token ends when the first one is there, which with 1 is the
            wall time of `generate`.
        whole: write all `max_new_tokens`, also past the end-of-answer token.
        memory: take the peak of the device's memory (of the process, on a CPU).
    """
    devices = devices_of(model)
    ticks = _Ticks(devices)
    extra: dict[str, Any] = {"min_new_tokens": max_new_tokens} if whole and max_new_tokens > 1 else {}
    if max_new_tokens > 1:
        extra["stopping_criteria"] = StoppingCriteriaList([ticks])
    watched: AbstractContextManager[StageClock | None] = (
        nullcontext() if _handle(model) is not None else _watched(model)
    )
    with watched as clock:
        if memory:
            _reset_peak(devices)
        _synchronise(devices)
        begin = time.perf_counter()
        answer = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None, **extra
        )
        _synchronise(devices)
        end = time.perf_counter()
    first = ticks.times[0] if ticks.times else end
    stages, tokens, clusters = _tell(model, inputs, clock)
    return Run(
        ttft=(first - begin) * 1000,
        stages=stages,
        tokens=tokens,
        per_token=[(b - a) * 1000 for a, b in zip(ticks.times, ticks.times[1:], strict=False)],
        peak=_peak(devices) if memory else None,
        answer=answer[:, inputs["input_ids"].shape[1] :],
        clusters=clusters,
    )


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
                run = run_once(model, inputs)
            if turn >= warmup:
                runs[name].append(run)
    for name, config in configs.items():
        if new_tokens:
            step(f"{name}: decoding")
            with patched(model, config):
                decoded[name] = run_once(model, inputs, max_new_tokens=new_tokens + 1, whole=True, memory=False)
        if count:
            from .flop_counter import count_flops

            step(f"{name}: counting FLOPs")
            with patched(model, config):
                counted[name] = count_flops(lambda: run_once(model, inputs, memory=False))
    return {
        name: summary(model, inputs, configs[name], runs[name], decoded.get(name), counted.get(name)) for name in cases
    }


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
    reduction; overhead_ms: with splicing. flops_ratio: of the whole prompt, full / reduced.
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
        "flops_ratio": full["flops"]["total"] / reduced["flops"]["total"]
        if full["flops"] and reduced["flops"]
        else None,
    }
    return {key: None if value is None else round(value, 4) for key, value in found.items()}


# ---------------------------------------------------------------------------------------------------- one run, inside


@contextmanager
def _watched(model: Any) -> Iterator[StageClock]:
    """Time vision and prefill of an unpatched model inside the block; afterwards it is as it was."""
    inner = _inner_model(model)
    family = family_module(inner.config.model_type).FAMILY
    core, language_model = family.core(inner), family.language_model(inner)
    clock = StageClock()
    stock = core.get_video_features
    own = core.__dict__.get("get_video_features")  # somebody else's replacement, which stays

    @functools.wraps(stock)
    def timed(*args: Any, **kwargs: Any) -> Any:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with clock.stage("vision", next(tensors).device):
            return stock(*args, **kwargs)

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:  # decoding steps are not the prefill
            clock.start("prefill", kwargs["inputs_embeds"].device)

    def end(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            clock.stop("prefill", kwargs["inputs_embeds"].device)

    hooks = [
        language_model.register_forward_pre_hook(begin, with_kwargs=True),
        language_model.register_forward_hook(end, with_kwargs=True),
    ]
    core.__dict__["get_video_features"] = timed
    try:
        yield clock
    finally:
        del core.__dict__["get_video_features"]
        if own is not None:
            core.__dict__["get_video_features"] = own
        for hook in hooks:
            hook.remove()


@contextmanager
def patched(model: Any, config: Config | None) -> Iterator[None]:
    """Patched with a configuration inside the block; None leaves the model alone."""
    if config is None:
        yield
    else:
        with merging(model, config):
            yield


def _tell(
    model: Any, inputs: Mapping[str, Tensor], clock: StageClock | None
) -> tuple[dict[str, float], dict[str, int | None], tuple[int, ...]]:
    """Stages in ms, tokens, and the sizes of the clustered sets, of the run that has just ended."""
    length = int(inputs["input_ids"].shape[1])
    if clock is None:
        handle = _handle(model)
        assert handle is not None
        report = handle.report
        videos = report.videos
        found = {stage: report.milliseconds[stage] for stage in STAGES if stage in report.milliseconds}
        features, separators = sum(v.features for v in videos), sum(v.separators for v in videos)
        after = [v.after_inner for v in videos if v.after_inner is not None]
        tokens: dict[str, int | None] = {
            "features": features,
            "entering": sum(v.entering for v in videos),
            "after_inner": sum(after) if after else None,
        }
        clusters = videos[0].record.clustered if videos else ()
    else:
        times = clock.milliseconds()
        found = {stage: times[stage] for stage in STAGES if stage in times}
        inner = _inner_model(model)
        family = family_module(inner.config.model_type).FAMILY
        grids = family.grids(family.core(inner), dict(inputs)) if "pixel_values_videos" in inputs else []
        features, separators = sum(t * h * w for t, h, w in grids), family.separators * len(grids)
        tokens = {"features": features, "entering": features, "after_inner": None}
        clusters = ()
    tokens |= {"separators": separators, "text": length - features - separators}
    return found, tokens, clusters


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
    """FLOPs of the run by stage, convention `exact`, and of one more token; None for several rows or videos."""
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
    )
    rest = tokens["text"] + tokens["separators"]
    decode = decode_cost(shape.text, rest + tokens["entering"], None if after is None else rest + after, layer)
    return {**cost.to_dict(), "decode_per_token": decode}


# ---------------------------------------------------------------------------------------------------- the device


def devices_of(model: Any) -> list[torch.device]:
    """Every CUDA device that holds a parameter."""
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _synchronise(devices: list[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def _reset_peak(devices: list[torch.device]) -> None:
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    if not devices:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
        except OSError:
            return


def _peak(devices: list[torch.device]) -> int | None:
    """Bytes: the most the CUDA allocator held since the reset, or the most resident memory (Linux); None elsewhere."""
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else None
