"""Positions of the tokens that stay: original, or contiguous as if the others had never been there."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import CacheState


def new_positions(
    given: Tensor,
    *,
    contiguous: bool,
    placeholder: Tensor,
    keep: Tensor,
    dropped: Tensor,
    offset: Tensor,
    state: CacheState | None,
) -> tuple[Tensor, Tensor | None]:
    """Positions for every column of the caller's sequence; those of dropped tokens mean nothing.

    Args:
        given: [B, L], or [3 or 4, B, L] for rotary positions of several axes (the first of four is the text position,
            which only tells packed sequences apart).
        contiguous: re-number, or keep each kept token's anchor's position.
        placeholder, keep, dropped: [B, L] bool, video placeholders, tokens that stay, tokens that go.
        offset: [B, L] int64, from a kept token's column to its anchor's.
        state: what earlier turns left in the cache.

    Returns:
        positions of given's shape, and how far the axes of each row have moved [3, B] (None: not at all).
    """
    removed = dropped.long().cumsum(1)
    if state is not None:
        removed = removed + state.dropped.to(given.device)[:, None]
    if given.ndim == 2:
        return (given - removed if contiguous else _at_anchor(given, offset)), None
    axes = given[-3:]
    shift = None
    if contiguous:
        moved = torch.zeros(3, axes.shape[1], 1, dtype=torch.long, device=given.device)
        if state is not None and state.axis_shift is not None:
            moved = state.axis_shift.to(given.device)[..., None]
        renumbered = _renumbered_videos((axes - moved).cpu(), placeholder.cpu(), keep.cpu(), dropped.cpu())
        renumbered = renumbered.to(given.device)
        last = (keep | dropped).long().cumsum(1).argmax(1)[None, :, None].expand(3, -1, 1)
        shift = (axes.gather(-1, last) - renumbered.gather(-1, last)).squeeze(-1)
        axes = renumbered
    else:
        axes = _at_anchor(axes, offset)
    return (axes if given.shape[0] == 3 else torch.cat([given[:1] - removed, axes])), shift


def _at_anchor(given: Tensor, offset: Tensor) -> Tensor:
    column = torch.arange(offset.shape[1], device=offset.device) + offset
    return given.gather(-1, column.expand_as(given))


def _renumbered_videos(axes: Tensor, placeholder: Tensor, keep: Tensor, dropped: Tensor) -> Tensor:
    """Number the kept tokens of every video that lost some one after the other, on all axes; close the gap after it.

    Text, images and whole videos keep their positions relative to one another. On the host: a few numbers per video.

    Args:
        axes: [3, B, L] int64. placeholder, keep, dropped: [B, L] bool.
    """
    axes = axes.clone()
    batch, length = placeholder.shape
    for row in range(batch):
        inside = placeholder[row].tolist()
        original = axes[:, row].clone()
        shift, column = 0, 0
        while column < length:
            if not inside[column]:
                axes[:, row, column] -= shift
                column += 1
                continue
            end = column
            while end < length and inside[end]:
                end += 1
            span = slice(column, end)
            if bool(dropped[row, span].any()):
                start = int(original[0, column])  # a video's first token stands at its start on every axis
                kept = int(keep[row, span].sum())
                place = (keep[row, span].long().cumsum(0) - 1).clamp_min(0 if kept else -1)
                axes[:, row, span] = start - shift + place  # with none left, where the one before stands: see `shift`
                after = int(original[:, end].min()) if end < length and bool(keep[row, end]) else start + kept
                shift += after - start - kept
            else:
                axes[:, row, span] -= shift
            column = end
    return axes
