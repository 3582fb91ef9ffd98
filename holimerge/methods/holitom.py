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
    """Segments on the device: for every frame its segment, for every token its group after temporal merging."""

    def __init__(
        self, segments: list[tuple[int, int]], runs: Tensor, frames: int, per_frame: int, dtype: torch.dtype
    ) -> None:
        device = runs.device
        self.segments = segments
        self.length = [end - start + 1 for start, end in segments]
        bounds = upload(segments, device)
        first, last = bounds[:, 0], bounds[:, 1]
        self.segment = torch.arange(frames, device=device)[:, None].gt(last).sum(1)
        span = (last - first)[:, None]
        if frames > 1:
            # a position is static in a segment if its run ending with the segment's last pair covers all its pairs
            self.static_set = (runs[(last - 1).clamp_min(0)] >= span) & (span > 0)
        else:
            self.static_set = torch.zeros(1, per_frame, dtype=torch.bool, device=device)
        self.first, self.last = first, last
        self.static = self.static_set[self.segment]
        self.cell = torch.arange(frames * per_frame, device=device).view(frames, per_frame)
        # a static token belongs to the group that stands in its segment's first frame
        self.group = torch.where(self.static, self.cell[first][self.segment], self.cell)
        self.share = torch.where(self.static, (span + 1).to(dtype).reciprocal()[self.segment], 1.0)


def _dynamic_kept(scores: Tensor, layout: _Layout, counts: list[int]) -> Tensor:
    """[T, N] bool: in each frame the `counts` dynamic tokens of highest score, ties to the lower index."""
    order = scores.masked_fill(layout.static, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return (rank < upload(counts, scores.device)[:, None]) & ~layout.static


def _cluster_static(
    x: Tensor, layout: _Layout, which: list[int], counts: list[int], options: HolitomOptions, static: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the static sets of the segments `which` down to `counts`.

    Returns:
        three flat tensors over the sets' groups: the group's cell, its centre's cell, its weight there.
    """
    device = x.device
    cells, centres, weights = [], [], []
    # bounds the padded copy of the static tokens; small enough on a CPU that its allocator reuses the memory
    largest = max(static[s] for s in which)
    most = largest * max(x.shape[-1], 4 * largest) * 4
    step = max(1, min(_CLUSTER_CHUNK, (2**30 if x.is_cuda else 2**24) // most))
    for begin in range(0, len(which), step):
        chunk = which[begin : begin + step]
        wanted = [counts[s] for s in chunk]
        picked, size, centre_count = upload([chunk, [static[s] for s in chunk], wanted], device)
        width = max(static[s] for s in chunk)
        position = (~layout.static_set[picked]).long().argsort(dim=1, stable=True)[:, :width]
        valid = torch.arange(width, device=device) < size[:, None]
        members = sum(static[s] * layout.length[s] for s in chunk)
        points = _temporal_means(x, layout, picked, position, valid, members)
        owner = density_peaks(points, valid, centre_count, options.neighbours, max(wanted))
        weight = centre_weights(owner, valid, options.beta, points.dtype)
        base = layout.cell[layout.first[picked], 0][:, None]
        # the valid ones in order, without asking the device how many there are
        keep = (~valid.flatten()).long().argsort(stable=True)[: sum(static[s] for s in chunk)]
        cells.append((base + position).flatten()[keep])
        centres.append((base + position.gather(1, owner)).flatten()[keep])
        weights.append(weight.flatten()[keep])
    return torch.cat(cells), torch.cat(centres), torch.cat(weights)


def _temporal_means(
    x: Tensor, layout: _Layout, picked: Tensor, position: Tensor, valid: Tensor, members: int
) -> Tensor:
    """[S, n, D] float32: the mean over its segment's frames of every static position, padding zero.

    picked: [S] int64, the segments. position: [S, n] int64, their static positions, valid: [S, n] bool. members: how
    many tokens they have over all their frames.
    """
    frames, per_frame, depth = x.shape
    first = layout.first[picked]
    # the frames of one group side by side; a group of padding is empty, so that its mean is zero
    size = torch.where(valid, (layout.last[picked] - first + 1)[:, None], 0).flatten()
    start = size.cumsum(0) - size
    owner = torch.arange(size.shape[0], device=x.device).repeat_interleave(size, output_size=members)
    frame = torch.arange(members, device=x.device) - start[owner] + first.repeat_interleave(position.shape[1])[owner]
    rows = frame * per_frame + position.flatten()[owner]
    means = sum_of_rows(x.reshape(frames * per_frame, depth), rows, start, mode="mean")
    return means.view(*position.shape, depth)


def _release(x: Tensor, layout: _Layout, static_sets: list[int], amount: int) -> tuple[Tensor, Tensor, Tensor]:
    """Undo temporal merging for the `amount` static members least similar to their group's mean.

    Ties go by frame, then position; a group's last member stays.

    Returns:
        static [T, N] bool, group [T, N] int64 and share [T, N] after the release: a remaining group stands at its first
        remaining member.
    """
    frames, per_frame, width = x.shape
    total, device = frames * per_frame, x.device
    flat = x.reshape(-1, width)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # sizes of all groups in the order of their cells, known on the host
    sizes = [length for count, length in zip(static_sets, layout.length, strict=True) for _ in range(count)]
    member = (~layout.static.flatten()).long().argsort(stable=True)[: sum(sizes)]
    group = layout.group.flatten()[member]
    order = group.argsort(stable=True)
    cosine = torch.empty(member.shape[0], dtype=dtype, device=device)
    size = upload(sizes, device)
    done = 0
    step = max(1, 4096 // max(layout.length))  # groups at a time: bounds the float32 copy
    for begin in range(0, len(sizes), step):
        count = sum(sizes[begin : begin + step])
        rows = order[done : done + count]
        done += count
        here = size[begin : begin + step]
        values = flat[member[rows]].to(dtype)
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
    last.scatter_reduce_(0, group, place, "amax")
    stays = place == last[group]
    free = by_cosine[stays[by_cosine].long().argsort(stable=True)]
    released = member[free[:amount]]

    static = layout.static.flatten().clone()
    static[released] = False
    # what is no member of a group any more goes to a cell of its own
    group = torch.where(static, layout.group.flatten(), layout.cell.flatten())
    head = torch.full((total,), total, dtype=torch.long, device=device)
    head.scatter_reduce_(0, layout.group.flatten(), torch.where(static, layout.cell.flatten(), total), "amin")
    held = torch.zeros(total, dtype=torch.long, device=device)
    held.scatter_add_(0, layout.group.flatten(), static.long())
    new_group = torch.where(static, head[group], group)
    share = torch.where(static, held[group].clamp_min(1).to(layout.share.dtype).reciprocal(), 1)
    return static.view(frames, per_frame), new_group.view(frames, per_frame), share.view(frames, per_frame)


def _sequence_key(static: Tensor, layout: _Layout, order: str) -> Tensor:
    """[T N] int64: tokens enter the LLM by ascending key of their anchor."""
    frames, per_frame = static.shape
    if order == "raster":
        return layout.cell.flatten()
    frame = torch.arange(frames, device=static.device)[:, None]
    position = torch.arange(per_frame, device=static.device)
    inside = torch.where(static, 0, (frame + 1) * per_frame) + position
    return (layout.segment[:, None] * ((frames + 1) * per_frame) + inside).flatten()


def reduce(tokens: VideoTokens, target: Target, options: HolitomOptions) -> MergeRecord:
    """Reduce one video; see the module's docstring and `holimerge.tokens`.

    Raises:
        ValueError: features or scores hold a value that is not finite.
    """
    x = tokens.features
    scores = cast(Tensor, tokens.scores).to(torch.promote_types(x.dtype, torch.float32))
    cosine, norm = pair_cosines(x)
    runs = run_lengths(unchanged(cosine, options.similarity))
    finite = (torch.isfinite(norm).all() & torch.isfinite(scores).all()).long()
    # the one read of the device: window counts decide the segments, and every count after them
    host = torch.cat([window_counts(runs).flatten(), finite[None]]).cpu().numpy()
    if not host[-1]:
        raise ValueError("the vision tower's output holds values that are not finite (NaN or infinity)")
    frames = x.shape[0]
    return _reduced(x, scores, runs, host[:-1].reshape(frames - 1, frames + 1), target, options)


def _reduced(
    x: Tensor, scores: Tensor, runs: Tensor, windows: np.ndarray, target: Target, options: HolitomOptions
) -> MergeRecord:
    """The record, once the window counts are on the host: from here on no device is asked for anything."""
    frames, per_frame, _ = x.shape
    total = frames * per_frame
    segments, removed = optimal_segments(windows, options.max_segment)

    layout = _Layout(segments, runs, frames, per_frame, scores.dtype)
    static_sets = [int(windows[end - 1, end - start]) if end > start else 0 for start, end in segments]
    dynamic_sets = [[per_frame - n] * length for n, length in zip(static_sets, layout.length, strict=True)]
    units = [[s, *d] for s, d in zip(static_sets, dynamic_sets, strict=True)]
    left = total - removed

    static, group, share = layout.static, layout.group, layout.share
    if not target.exact:
        counts = authors_counts(static_sets, dynamic_sets, target.share * frames * per_frame)
    elif target.tokens < left:
        flat = iter(largest_remainder([n for unit in units for n in unit], target.tokens))
        counts = [[next(flat) for _ in unit] for unit in units]
    else:
        counts = units
        if target.tokens > left:
            static, group, share = _release(x, layout, static_sets, target.tokens - left)

    kept_dynamic = [n for unit in counts for n in unit[1:]]
    kept_static = [unit[0] for unit in counts]
    home = layout.cell.flatten().clone()  # home[g]: the anchor cell that group g ends up in, -1 if dropped
    weight = torch.ones(total, dtype=scores.dtype, device=x.device)
    if counts != units:
        keep = _dynamic_kept(scores, layout, kept_dynamic)
        home = torch.where(keep.flatten() | layout.static.flatten(), home, -1)
        dropped = upload([c == 0 for c in kept_static], x.device)[layout.segment][:, None] & static
        home = torch.where(dropped.flatten(), -1, home)
    clustered = [i for i, (c, n) in enumerate(zip(kept_static, static_sets, strict=True)) if 0 < c < n]
    if clustered:
        cells, centres, within = _cluster_static(x, layout, clustered, kept_static, options, static_sets)
        home[cells] = centres
        weight[cells] = within

    group = group.flatten()
    anchor_of = home[group]
    held = anchor_of >= 0
    kept = sum(kept_static) + sum(kept_dynamic) + (target.tokens - left if target.exact and target.tokens > left else 0)
    is_anchor = torch.zeros(total + 1, dtype=torch.bool, device=x.device)
    is_anchor[torch.where(held, anchor_of, total)] = True
    key = torch.where(is_anchor[:total], _sequence_key(static, layout, options.order), torch.iinfo(torch.long).max)
    anchor = key.argsort()[:kept]
    ordinal = torch.full((total,), -1, dtype=torch.long, device=x.device)
    ordinal[anchor] = torch.arange(kept, device=x.device)
    return MergeRecord(
        frames=frames,
        per_frame=per_frame,
        assignment=torch.where(held, ordinal[anchor_of.clamp_min(0)], -1),
        weight=torch.where(held, share.flatten() * weight[group], 0),
        anchor=anchor,
        members=sum(kept_dynamic)
        + sum(n * length for n, c, length in zip(static_sets, kept_static, layout.length, strict=True) if c),
        segments=tuple(segments),
        temporal=removed,
        clustered=tuple(static_sets[i] for i in clustered),
        raster=options.order == "raster",
    )


METHOD = Method(options=HolitomOptions, reduce=reduce, needs_scores=True)
