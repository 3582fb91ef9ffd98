"""`holimerge flops`: what a reduction saves on a named model, in FLOPs, without any weights or video."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from holimerge.config import load_config
from holimerge.cost import (
    ModelShape,
    decode_cost,
    exact_cost,
    largest_budget,
    paper_prefill,
    paper_tokens,
    tower_work,
)
from holimerge.shapes import Shape, load_shape

TEXT_TOKENS = 40  # a short question in a chat template
UNITS = {"paper": "multiply-accumulates", "exact": "floating point operations (multiply-adds times two)"}


def flops_report(
    shape: str,
    *,
    frames: int | None = None,
    config: Any,
    convention: Literal["paper", "exact"] = "exact",
    text_tokens: int = TEXT_TOKENS,
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The FLOPs of one prompt with one video, unreduced and reduced, ready for JSON.

    shape: a name of `holimerge.shapes.SHAPES` or a folder with a config.json. frames: T, default the shape's.
    config: a preset's name, a path, a dict or a config object. convention: see `holimerge.cost`. text_tokens: prompt
    tokens besides the video's (no effect on `paper`). grid: patches (rows, columns) of a frame for models of free
    resolution, default the shape's example.

    Returns the keys shape, source, parameters, convention, unit, frames, tokens (video, entering, after_inner,
    separators, text), stages {unreduced, reduced}, total {unreduced, reduced}, ratio (reduced / unreduced),
    decode_per_token (`exact` only) and assumptions, in words. Raises ValueError for a bad name, count or convention.
    """
    if convention not in UNITS:
        raise ValueError(f"convention: {convention!r}; valid: {', '.join(UNITS)}")
    known = load_shape(shape)
    frames = known.frames if frames is None else frames
    for name, value, least in (("frames", frames, 1), ("text_tokens", text_tokens, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: {value!r}; an integer of at least {least} is needed")
    cfg = load_config(config) if isinstance(config, (str, os.PathLike, Mapping)) else config
    model = known.model()
    grid = (grid or known.grid) if model.vision.side is None else grid
    steps, per_step = model.vision.steps(frames), model.vision.tokens_per_step(grid)
    video = steps * per_step
    separators = known.separator_count(frames)
    notes = [known.note] if known.note else []
    layer = cfg.inner.resolve(model.text.layers) if cfg.inner is not None else None
    entering = _entering(cfg, model, steps, per_step, text_tokens + separators, layer, convention, notes)
    if convention == "paper":
        after = math.floor(entering * cfg.inner.retain + 1e-9) if cfg.inner is not None else None
        stages: dict[str, dict[str, Any]] = {
            "unreduced": {"prefill": paper_prefill(model.text, video)},
            "reduced": {"prefill": paper_prefill(model.text, entering, after, layer)},
        }
        totals = {name: stage["prefill"] for name, stage in stages.items()}
        notes.append("prefill over the video tokens alone: no text, no separators, no tower, projector or reduction")
        extra: dict[str, Any] = {}
    else:
        after = cfg.inner.keep(entering) if cfg.inner is not None else None
        counts = (video, entering, after)
        stages, extra = _exact_stages(
            cfg, known, model, frames=frames, grid=grid, text=text_tokens, tokens=counts, layer=layer
        )
        totals = {name: stage.pop("total") for name, stage in stages.items()}
        notes += _exact_notes(cfg, known, model, grid)
    return {
        "shape": known.name,
        "source": known.source,
        "parameters": {"published": known.parameters, "source": known.parameters_source},
        "convention": convention,
        "unit": UNITS[convention],
        "frames": frames,
        "tokens": {
            "video": video,
            "entering": entering,
            "after_inner": after,
            "inner_layer": layer,
            "separators": separators,
            "text": text_tokens,
        },
        "stages": stages,
        "total": totals,
        "ratio": totals["reduced"] / totals["unreduced"],
        **extra,
        "assumptions": notes,
    }


def _entering(
    cfg: Any,
    model: ModelShape,
    steps: int,
    per_step: int,
    rest: int,
    layer: int | None,
    convention: str,
    notes: list[str],
) -> int:
    """Video tokens that enter the LLM under the config's budget."""
    total, budget = steps * per_step, cfg.budget
    if budget is None:
        return total
    if budget.estimated:
        raise ValueError(f"budget.{budget.estimated[0]}: depends on the device; `holimerge plan` solves it")
    if budget.flops is not None:
        notes.append("budget.flops is a share of the unpatched LLM prefill in the exact convention, text included")
        retain = None if cfg.inner is None else cfg.inner.retain
        most = largest_budget(
            model.text,
            share=budget.flops,
            total_tokens=total,
            text_tokens=rest,
            inner_layer=layer,
            inner_retain=retain,
        )
        return min(most, int(budget.cap(total)))
    if budget.retain is not None and (convention == "paper" or not budget.exact):
        notes.append("nominal count T x ceil(r N), as in the paper's table")
        if not budget.exact:
            notes.append("the authors' rounding (exact: false) lets the real count vary with the video")
        nominal = paper_tokens(steps, per_step, budget.retain)
        return min(total, nominal, total if budget.tokens is None else budget.tokens)
    return int(budget.keep(total))


def _exact_stages(
    cfg: Any,
    known: Shape,
    model: ModelShape,
    *,
    frames: int,
    grid: tuple[int, int] | None,
    text: int,
    tokens: tuple[int, int, int | None],
    layer: int | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Stages of the unreduced and the reduced prompt, and the cost of a generated token of both."""
    video, entering, after = tokens
    separators = known.separator_count(frames)
    # LLaVA-Video's newlines follow non-empty rows; a single newline and Qwen3-VL's timestamps stay as they are
    kept_separators = min(separators, entering) if known.pooled else separators
    steps = model.vision.steps(frames)
    outer = cfg.outer if cfg.method != "keep_all" else None
    clusters = [model.vision.tokens_per_step(grid)] * (steps // 2) if outer is not None and entering < video else []
    before = exact_cost(
        model, frames=frames, grid=grid, text_tokens=text, entering=video, separators=separators
    ).to_dict()
    reduced = exact_cost(
        model,
        frames=frames,
        grid=grid,
        text_tokens=text,
        entering=entering,
        separators=kept_separators,
        after_inner=after,
        inner_layer=layer,
        at=outer.at if outer is not None else "projector_output",
        static_sets=clusters,
        scored=outer is not None,
        matched=cfg.inner is None or cfg.inner.merge != "drop",
        work=tower_work(model.vision, getattr(cfg, "encoder", None), steps, grid),
    ).to_dict()
    rest = text + kept_separators
    decode = {
        "unreduced": decode_cost(model.text, text + separators + video),
        "reduced": decode_cost(model.text, rest + entering, None if after is None else rest + after, layer),
    }
    return {"unreduced": before, "reduced": reduced}, {"decode_per_token": decode}


def _exact_notes(cfg: Any, known: Shape, model: ModelShape, grid: tuple[int, int] | None) -> list[str]:
    notes = [
        "full n^2 attention (causal is not halved), grouped-query attention, gated MLP; norms, softmax, activations, "
        "rotary embeddings, interpolation and means are not counted",
        "lm_head on the last position",
    ]
    if model.vision.side is None and grid is not None:
        notes.append(f"every frame has {grid[0]} x {grid[1]} patches")
    if cfg.method != "keep_all":
        notes.append(
            "reduction: upper bound for the clustering, as if every second pair of frames were one segment of static "
            "tokens only; received attention is q k^T of one tower layer for every frame; the release of static tokens "
            "where the budget exceeds what temporal merging leaves is not counted"
        )
    encoder = getattr(cfg, "encoder", None)
    if encoder is not None and encoder.tokens is None:
        notes.append(f"encoder.{encoder.kind}: what it saves depends on the video; counted as if every frame differed")
    if known.pooled:
        notes.append("reduced: a newline after every non-empty row, at most one for each kept token (upper bound)")
    return notes
