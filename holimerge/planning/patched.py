"""The planner inside a patched model: the row of a batch that is being encoded, as the solver sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import Budget, ConfigError
from ..encoding import Grid
from ..shapes import ModelShape, shape_of, text_shape
from .device import Device
from .predict import Clip, Prompt, Scheme, TowerLeft
from .solve import Row, tower_left

if TYPE_CHECKING:
    from ..handle import Handle


def check_estimated(budget: Budget | None, config: object) -> None:
    """Refuse limits on time and memory for a model without a cost model. Raises ConfigError."""
    if budget is None or not budget.estimated:
        return
    try:
        shape_of(config)
    except TypeError as error:
        raise ConfigError(f"budget.{budget.estimated[0]}: {error}; give a budget as retain, tokens or flops") from None


def scheme_of(handle: Handle) -> Scheme:
    """What of a patched model's configuration costs time."""
    config = handle.config
    assert config.outer is not None
    return Scheme(
        method=config.method,
        at=config.outer.at,
        layer=None if handle.inner is None else handle.inner.layer,
        retain=None if config.inner is None else config.inner.retain,
        chunk=config.chunk_frames,
        tower_attention=config.tower_attention,
        graphed=handle.graphs is not None,
    )


def row_of(handle: Handle, grids: Sequence[Grid], rest: int) -> Row:
    """One row of a prompt.

    Args:
        grids: of its videos. rest: its tokens that are no video tokens.

    Raises:
        TypeError: there is no cost model for its decoder.
    """
    totals, budget = tuple(grid.total for grid in grids), handle.config.budget
    assert budget is not None
    row = Row(text_shape(handle.model.config), totals, rest, scheme_of(handle))
    if not budget.estimated:
        return row
    shape = shape_of(handle.model.config)
    tensors = [*handle.model.parameters(), *handle.model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    first = next(handle.lm.parameters())
    clips = tuple(_clip(shape, grid) for grid in grids)
    prompt = Prompt(shape, clips, rest, weights, first.element_size(), first.device.type)
    device = device_of(handle, shape) if budget.ttft_ms is not None else None
    each = [tower_left(shape.vision, handle.config.encoder, clip.grid) for clip in prompt.clips]
    weights_of = [prompt.tokens(clip) / max(1, prompt.total) for clip in prompt.clips]
    share = sum(weight * left.share for weight, left in zip(weights_of, each, strict=True))
    left = TowerLeft(share, max(x.merging for x in each), max(x.rows for x in each))
    scheme = replace(row.scheme, left=left)
    return Row(row.text, totals, rest, scheme, prompt, device, _attention(handle) == "eager")


def _clip(shape: ModelShape, grid: Grid) -> Clip:
    vision = shape.vision
    if vision.side is not None:
        return Clip(grid.frames)
    return Clip(grid.frames, (grid.rows * vision.merge, grid.columns * vision.merge))


def _attention(handle: Handle) -> str:
    return str(getattr(handle.model.config, "_attn_implementation", None) or "sdpa")


def device_of(handle: Handle, shape: ModelShape) -> Device:
    """The tables of the device that holds the decoder; measured now where they are not known (seconds)."""
    from .calibrate import calibrated

    first = next(handle.lm.parameters())
    return calibrated(first.device, first.dtype, _attention(handle), method=handle.config.method, shape=shape)
