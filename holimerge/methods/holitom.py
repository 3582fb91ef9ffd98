"""HoliTom's outer reduction (arXiv 2505.21334): segment in time, merge what stays, then thin out in space.

Differs from the authors' code: no random tie noise (ties go to the lower index), no per-token Python, the attention
implementation stays the user's, and with an exact budget the count is known before any feature exists.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..allocation import authors_counts, largest_remainder
from ..cluster import centre_weights, density_peaks
from ..config import OuterOptions
from ..segment import optimal_segments, pair_cosines, run_lengths, unchanged, window_counts
from ..tokens import MergeRecord, Target, VideoTokens, sum_of_rows, upload
from .base import Method

_CLUSTER_CHUNK = 64  # segments clustered at once, at most
# Bytes of the padded copy of their static tokens; on a CPU so few that its allocator reuses the memory.
_CLUSTER_BYTES = {"cpu": 2**24, "cuda": 2**30}


class HolitomOptions(OuterOptions):
    """HoliTom's options.

    similarity: tau, a token is static between two frames if its cosine exceeds it; 1 for equal tokens alone.
    beta: weight of a cluster's centre against the mean of the others; null for the plain mean of all.
    neighbours: k of the k-nearest-neighbour density.
    max_segment: longest segment in frames; null for no limit.
    """

    similarity: float = Field(0.8, ge=-1, le=1)
    beta: float | None = Field(0.6, ge=0, le=1)
    neighbours: int = Field(7, ge=1)
    max_segment: int | None = Field(None, ge=1)


class _Layout:
    """What temporal merging makes of a video, on the host.

    segments: first and last frame of each; segment: [T], each frame's; static_set: [S, N] bool, the positions that are
    static in each segment; static: [T, N], the same by frame; cell: [T, N], tokens numbered in raster order; group:
    [T, N], the cell in its segment's first frame for a static token, its own for a dynamic one.
    """

    def __init__(self, segments: list[tuple[int, int]], runs: np.ndarray, frames: int, per_frame: int) -> None:
        self.segments = segments
        self.first, self.last = np.array(segments).T
        self.length = self.last - self.first + 1
        self.segment = np.repeat(np.arange(len(segments)), self.length)
        span = (self.length - 1)[:, None]
        if frames > 1:
            # a position is static in a segment if its run ending with the segment's last pair covers all its pairs
            self.static_set = (runs[np.maximum(self.last - 1, 0)] >= span) & (span > 0)
        else:
            self.static_set = np.zeros((1, per_frame), dtype=bool)
        self.static = self.static_set[self.segment]
        self.cell = np.arange(frames * per_frame).reshape(frames, per_frame)
        self.group = np.where(self.static, self.cell[self.first][self.segment], self.cell)


def _dynamic_kept(order: np.ndarray, static: np.ndarray, counts: list[int]) -> np.ndarray:
    """[T, N] bool: in each frame the first `counts` dynamic tokens in `order` [T, N]."""
    dynamic = ~np.take_along_axis(static, order, 1)
    kept = np.zeros_like(static)
    np.put_along_axis(kept, order, dynamic & (dynamic.cumsum(1) <= np.array(counts)[:, None]), 1)
    return kept


def _cluster_static(
    x: Tensor, layout: _Layout, which: list[int], counts: list[int], options: HolitomOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the static sets of the segments `which` down to `counts`.

    Returns:
        of every token of those sets, flat: its cell, the cell of its centre, its weight there.
    """
    per_frame, width = layout.static.shape[1], x.shape[-1]
    found = []
    sizes = layout.static_set.sum(1)
    largest = int(sizes[which].max())
    most = largest * max(width, 4 * largest) * 4
    step = max(1, min(_CLUSTER_CHUNK, _CLUSTER_BYTES.get(x.device.type, 2**24) // most))
    for begin in range(0, len(which), step):
        chunk = np.array(which[begin : begin + step])
        wanted = [counts[s] for s in chunk]
        size, length = sizes[chunk], layout.length[chunk]
        room = int(size.max())
        valid = np.arange(room) < size[:, None]
        cell = np.zeros((len(chunk), room), dtype=np.int64)  # in the segment's first frame, padding behind
        row, position = layout.static_set[chunk].nonzero()
        cell[valid] = layout.first[chunk][row] * per_frame + position
        # the tokens of one position side by side, frame after frame; a place of padding has none
        held = np.where(valid, length[:, None], 0).ravel()
        starts = held.cumsum() - held
        place = np.repeat(np.arange(len(held)), held)
        rows = cell.ravel()[place] + (np.arange(len(place)) - starts[place]) * per_frame
        each = np.repeat(length, size * length)
        packed = upload(np.concatenate([wanted, size, cell.ravel(), starts, rows, place, each]), x.device)
        many = [len(chunk)] * 2 + [cell.size] * 2 + [len(rows)] * 3
        centre_count, sized, cells, start, row_of, place_of, length_of = packed.split(many)
        real = torch.arange(room, device=x.device) < sized[:, None]
        points = sum_of_rows(x.reshape(-1, width), row_of, start, mode="mean").view(*cell.shape, width)
        least = min(wanted)
        owner = density_peaks(points, real, centre_count, options.neighbours, max(wanted), least)
        weight = centre_weights(owner, real, options.beta, dtype).flatten()[place_of]
        centre = cells.view(cell.shape).gather(1, owner).flatten()[place_of]
        found.append((row_of, centre, weight / length_of))
    if len(found) == 1:
        return found[0]
    cells, centres, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    return cells, centres, weights


def _release(x: Tensor, layout: _Layout, amount: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Undo temporal merging for the `amount` static members least similar to their group's mean.

    Ties go by frame, then position; a group's last member stays.

    Returns:
        static [T N] bool, group [T N] int64 and share [T N] after the release: a remaining group stands at its first
        remaining member.
    """
    frames, per_frame, width = x.shape
    total, device = frames * per_frame, x.device
    flat = x.reshape(-1, width)
    wide = torch.promote_types(x.dtype, torch.float32)
    flags, groups = layout.static.ravel(), layout.group.ravel()
    members = flags.nonzero()[0]
    by_group = groups[members].argsort(kind="stable")
    sizes = np.repeat(layout.length, layout.static_set.sum(1))  # of all groups, in the order of their cells
    packed = upload(np.concatenate([members, groups[members], by_group, sizes, groups, flags]), device)
    many = [len(members)] * 3 + [len(sizes), total, total]
    member, group_of_member, order, size, old_group, static = packed.split(many)
    cosine = torch.empty(len(members), dtype=wide, device=device)
    done = 0
    step = max(1, 4096 // int(layout.length.max()))  # groups at a time: bounds the float32 copy
    for begin in range(0, len(sizes), step):
        count = int(sizes[begin : begin + step].sum())
        rows = order[done : done + count]
        done += count
        here = size[begin : begin + step]
        values = flat[member[rows]].to(wide)
        mean = torch.nn.functional.embedding_bag(
            torch.arange(count, device=device), values, here.cumsum(0) - here, mode="mean"
        )
        mean = mean.repeat_interleave(here, dim=0, output_size=count)
        norms = torch.linalg.vector_norm(values, dim=-1) * torch.linalg.vector_norm(mean, dim=-1)
        cosine[rows] = torch.einsum("md,md->m", values, mean) / norms.clamp_min(1e-12)
    # Equal members differ by rounding noise; on a grid of 2^-20 they tie. Members are listed by frame, then position,
    # so the stable sort breaks ties as promised.
    by_cosine = (cosine * 2**20).round().argsort(stable=True)
    place = by_cosine.argsort()
    last = torch.full((total,), -1, dtype=torch.long, device=device)
    last.scatter_reduce_(0, group_of_member, place, "amax")
    stays = place == last[group_of_member]
    free = by_cosine[stays[by_cosine].long().argsort(stable=True)]

    static = static.bool().index_fill(0, member[free[:amount]], False)
    cell = torch.arange(total, device=device)
    # what is no member of a group any more goes to a cell of its own
    group = torch.where(static, old_group, cell)
    head = torch.full((total,), total, dtype=torch.long, device=device)
    head.scatter_reduce_(0, old_group, torch.where(static, cell, total), "amin")
    held = torch.zeros(total, dtype=torch.long, device=device)
    held.scatter_add_(0, old_group, static.long())
    share = torch.where(static, held[group].clamp_min(1).to(dtype).reciprocal(), 1)
    return static, torch.where(static, head[group], group), share


def _order(static: np.ndarray, layout: _Layout) -> np.ndarray:
    """[T N]: the cells by segment, the static ones (of its first frame) before those of its frames."""
    frames, per_frame = static.shape
    inside = np.where(static, 0, (np.arange(frames)[:, None] + 1) * per_frame) + np.arange(per_frame)
    key = layout.segment[:, None] * ((frames + 1) * per_frame) + inside
    return key.ravel().argsort(kind="stable")


def reduce(tokens: VideoTokens, target: Target, options: HolitomOptions) -> MergeRecord:
    """Reduce one video; see the module's docstring and `holimerge.tokens`.

    Raises:
        ValueError: features or scores hold a value that is not finite.
    """
    x = tokens.features
    scores = cast(Tensor, tokens.scores).to(torch.promote_types(x.dtype, torch.float32))
    cosine, norm = pair_cosines(x)
    runs = run_lengths(unchanged(cosine, options.similarity))
    order = scores.argsort(dim=1, descending=True, stable=True)  # ties to the lower index
    finite = torch.isfinite(torch.maximum(norm.amax(), scores.abs().amax())).long()  # NaN is the largest of all
    # The one read of the device. All that follows from it is found on the host, whose arithmetic on so few numbers
    # takes less than launching it on a device.
    packed = torch.cat([runs.flatten(), order.flatten(), finite[None]])
    host = (packed.to(torch.int32) if packed.is_cuda else packed).cpu().numpy()
    if not host[-1]:
        raise ValueError("the vision tower's output holds values that are not finite (NaN or infinity)")
    frames, per_frame = scores.shape
    seen, ranked = host[:-1].reshape(2 * frames - 1, per_frame)[: frames - 1], host[-1 - frames * per_frame : -1]
    return _reduced(x, seen, ranked.reshape(frames, per_frame), target, options, scores.dtype)


def _reduced(
    x: Tensor, runs: np.ndarray, order: np.ndarray, target: Target, options: HolitomOptions, dtype: torch.dtype
) -> MergeRecord:
    """The record, once what decides it is on the host: from here on no device is asked for anything.

    Args:
        runs: [T-1, N], from `run_lengths`. order: [T, N], each frame's tokens by falling score. dtype: of weights.
    """
    frames, per_frame, _ = x.shape
    total = frames * per_frame
    segments, removed = optimal_segments(window_counts(runs), options.max_segment)
    layout = _Layout(segments, runs, frames, per_frame)
    static_sets = layout.static_set.sum(1).tolist()
    lengths = layout.length.tolist()
    dynamic_sets = [[per_frame - n] * length for n, length in zip(static_sets, lengths, strict=True)]
    units = [[s, *d] for s, d in zip(static_sets, dynamic_sets, strict=True)]
    left = total - removed
    released = max(0, target.tokens - left) if target.exact else 0
    if not target.exact:
        counts = authors_counts(static_sets, dynamic_sets, target.share * frames * per_frame)
    elif target.tokens < left:
        flat = iter(largest_remainder([n for unit in units for n in unit], target.tokens))
        counts = [[next(flat) for _ in unit] for unit in units]
    else:
        counts = units
    kept_static = [unit[0] for unit in counts]
    kept_dynamic = [n for unit in counts for n in unit[1:]]
    kept = sum(kept_static) + sum(kept_dynamic) + released
    by_segment = options.order == "segment"

    if released:
        static, home, share = _release(x, layout, released, dtype)
        sequence = _order_of_released(static, layout) if by_segment else None
    else:
        alive = np.array(kept_static)[layout.segment][:, None] > 0
        keep = np.where(layout.static, alive, _dynamic_kept(order, layout.static, kept_dynamic))
        weights = np.where(keep, np.where(layout.static, 1 / layout.length[layout.segment][:, None], 1.0), 0.0)
        parts = [np.where(keep, layout.group, -1).ravel()] + ([_order(layout.static, layout)] if by_segment else [])
        home, *ordered = upload(np.concatenate(parts), x.device).split(total)
        sequence = ordered[0] if by_segment else None
        share = upload(weights.ravel(), x.device, dtype)
    clustered = [i for i, (c, n) in enumerate(zip(kept_static, static_sets, strict=True)) if 0 < c < n]
    if clustered:
        cells, centres, within = _cluster_static(x, layout, clustered, kept_static, options, dtype)
        home.index_copy_(0, cells, centres)
        share.index_copy_(0, cells, within)

    # 1 where a kept token stands, in the order of the sequence; one place more for what is dropped (-1)
    stands = torch.zeros(total + 1, dtype=torch.long, device=x.device)
    stands[home] = 1
    count = (stands[:total] if sequence is None else stands[sequence]).cumsum(0)
    anchor = torch.searchsorted(count, torch.arange(1, kept + 1, device=x.device))
    ordinal = count - 1
    if sequence is not None:
        anchor, ordinal = sequence[anchor], torch.empty_like(ordinal).scatter_(0, sequence, ordinal)
    return MergeRecord(
        frames=frames,
        per_frame=per_frame,
        assignment=torch.where(home >= 0, ordinal[home], -1),
        weight=share,
        anchor=anchor,
        members=sum(kept_dynamic)
        + sum(n * length for n, c, length in zip(static_sets, kept_static, lengths, strict=True) if c),
        segments=tuple(segments),
        temporal=removed,
        clustered=tuple(static_sets[i] for i in clustered),
        raster=not by_segment,
    )


def _order_of_released(static: Tensor, layout: _Layout) -> Tensor:
    """`_order` where only the device knows what is still static."""
    frames, per_frame = layout.static.shape
    segment, place = upload(np.stack([np.repeat(layout.segment, per_frame), layout.cell.ravel()]), static.device)
    inside = torch.where(static, 0, (place // per_frame + 1) * per_frame) + place % per_frame
    return (segment * ((frames + 1) * per_frame) + inside).argsort(stable=True)


METHOD = Method(options=HolitomOptions, reduce=reduce, needs_scores=True)
