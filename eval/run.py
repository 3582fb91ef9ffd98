"""One timed prompt: generate with the model as it is, its stages, tokens and peak memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from holimerge.api import _handle, _inner_model, merging
from holimerge.config import Config
from holimerge.encoder.tower import EncoderReport
from holimerge.planning.stock import watched
from holimerge.registry import family_module
from holimerge.timing import StageClock, now

# The stages of the time to first token, in order; `inner` is part of `prefill`.
STAGES = ("vision", "reduce", "project", "splice", "prefill", "inner")


@dataclass
class Run:
    """One prompt, timed. Milliseconds, except `peak` (bytes), `answer` (generated token ids [B, n]), `clusters`
    (sizes of the static sets that were clustered) and `seen` (what a reduction inside the tower left of the video;
    None without one and where it is not known)."""

    ttft: float
    stages: dict[str, float]
    tokens: dict[str, int | None]
    per_token: list[float] = field(default_factory=list)
    peak: int | None = None
    answer: Tensor | None = None
    clusters: tuple[int, ...] = ()
    seen: EncoderReport | None = None


class _Ticks(StoppingCriteria):
    """Notes when each token is there; never stops anything."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.devices, self.times = devices, list[float]()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        _synchronise(self.devices)
        self.times.append(now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run_once(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    max_new_tokens: int = 1,
    whole: bool = False,
    memory: bool = True,
    **how: Any,
) -> Run:
    """Generate greedily once, from the model as it is (patched or not).

    Args:
        model: of a supported family.
        inputs: what `generate` takes, on the model's device.
        max_new_tokens: how many tokens; the time to first token ends when the first one is there, which with 1 is the
            wall time of `generate`.
        whole: write all `max_new_tokens`, also past the end-of-answer token.
        memory: take the peak of the device's memory (of the process, on a CPU).
        **how: more arguments of `generate`.
    """
    devices = devices_of(model)
    ticks = _Ticks(devices)
    extra = dict(how)
    if whole and max_new_tokens > 1:
        extra["min_new_tokens"] = max_new_tokens
    if max_new_tokens > 1:
        extra["stopping_criteria"] = StoppingCriteriaList([ticks])
    timed: AbstractContextManager[StageClock | None] = nullcontext() if _handle(model) is not None else watched(model)
    with timed as clock, _no_collection():
        if memory:
            _reset_peak(devices)
        _synchronise(devices)
        begin = now()
        answer = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None, **extra
        )
        _synchronise(devices)
        end = now()
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
        seen=seen_by_tower(model),
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector runs between timed prompts, not in them, as `timeit` has it."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def seen_by_tower(model: Any) -> EncoderReport | None:
    """What the tower worked on in the prompt that has just ended; None without a reduction inside the tower, and where
    not exactly one video was encoded."""
    handle = _handle(model)
    if handle is None or len(handle.report.encoders) != 1 or len(handle.report.videos) != 1:
        return None
    report: EncoderReport = handle.report.encoders[0]
    return report if report.rows else None


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
        placeholders = sum(v.placement.placeholders for v in videos)
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
        features = sum(grid.total for grid in grids)
        separators = sum(family.separators(family.core(inner), grid) for grid in grids)
        placeholders = features + separators
        tokens = {"features": features, "entering": features, "after_inner": None}
        clusters = ()
    tokens |= {"separators": separators, "text": length - placeholders}
    return found, tokens, clusters


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
