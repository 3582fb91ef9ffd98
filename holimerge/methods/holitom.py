"""HoliTom's outer reduction (arXiv 2505.21334): segment in time, merge what stays, then thin out in space.

Differs from the authors' code: no random tie noise (ties go to the lower index), no per-token Python, the attention
implementation stays the user's, and with an exact budget the count is known before any feature exists.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from ..allocation import authors_counts, largest_remainder
from ..cluster import centre_weights, density_peaks
from ..config import OuterOptions
from ..segment import optimal_segments, pair_cosines, run_lengths, window_counts
from ..tokens import MergeRecord, Target, VideoTokens
from .base import Method

_CLUSTER_CHUNK = 64  # segments clustered at once, at most


class HolitomOptions(OuterOptions):
    """HoliTom's options.

    similarity: tau, a token is static between two frames if its cosine exceeds it.
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
        self.segment = torch.tensor([i for i, n in enumerate(self.length) for _ in range(n)], device=device)
        first = torch.tensor([start for start, _ in segments], device=device)
        last = torch.tensor([end for _, end in segments], device=device)
        span = (last - first)[:, None]
        if frames > 1:
            # a position is static in a segment if its run ending with the segment's last pair covers all its pairs
            self.static_set = (runs[(last - 1).clamp_min(0)] >= span) & (span > 0)
        else:
            self.static_set = torch.zeros(1, per_frame, dtype=torch.bool, device=device)
        self.first = first
        self.static = self.static_set[self.segment]
        self.cell = torch.arange(frames * per_frame, device=device).view(frames, per_frame)
        # a static token belongs to the group that stands in its segment's first frame
        self.group = torch.where(self.static, self.cell[first][self.segment], self.cell)
        self.share = torch.where(self.static, (span + 1).to(dtype).reciprocal()[self.segment], 1.0)


def _dynamic_kept(scores: Tensor, layout: _Layout, counts: list[int]) -> Tensor:
    """[T, N] bool: in each frame the `counts` dynamic tokens of highest score, ties to the lower index."""
    order = scores.masked_fill(layout.static, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return (rank < torch.tensor(counts, device=scores.device)[:, None]) & ~layout.static


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
        picked = torch.tensor(chunk, device=device)
        size = torch.tensor([static[s] for s in chunk], device=device)
        width = max(static[s] for s in chunk)
        position = (~layout.static_set[picked]).long().argsort(dim=1, stable=True)[:, :width]
        valid = torch.arange(width, device=device) < size[:, None]
        points = _temporal_means(x, layout, chunk, position, static)
        wanted = [counts[s] for s in chunk]
        owner = density_peaks(points, valid, torch.tensor(wanted, device=device), options.neighbours, max(wanted))
        weight = centre_weights(owner, valid, options.beta, points.dtype)
        base = layout.cell[layout.first[picked], 0][:, None]
        # known sizes: flatten without asking the device how many rows are valid
        keep = _flatten_index([static[s] for s in chunk], width, device)
        cells.append((base + position).flatten()[keep])
        centres.append((base + position.gather(1, owner)).flatten()[keep])
        weights.append(weight.flatten()[keep])
    return torch.cat(cells), torch.cat(centres), torch.cat(weights)


def _flatten_index(sizes: list[int], width: int, device: torch.device) -> Tensor:
    return torch.tensor([row * width + i for row, n in enumerate(sizes) for i in range(n)], device=device)


def _temporal_means(x: Tensor, layout: _Layout, chunk: list[int], position: Tensor, static: list[int]) -> Tensor:
    """[S, n, D] float32: the mean over its segment's frames of every static position, padding zero."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    frames, per_frame, depth = x.shape
    flat, device = x.reshape(frames * per_frame, depth), x.device
    width = position.shape[1]
    rows, sizes = [], []
    for row, s in enumerate(chunk):  # the frames of one group side by side
        n, (first, last) = static[s], layout.segments[s]
        frame = torch.arange(first, last + 1, device=device) * per_frame
        rows.append((position[row, :n, None] + frame).flatten())
        sizes += [last - first + 1] * n + [0] * (width - n)  # a group of padding is empty: its mean is zero
    index = torch.cat(rows)
    size = torch.tensor(sizes, device=device)
    if flat.dtype != dtype:
        flat, index = flat[index].to(dtype), torch.arange(index.shape[0], device=device)
    means = torch.nn.functional.embedding_bag(index, flat, size.cumsum(0) - size, mode="mean")
    return means.view(len(chunk), width, depth)


def _release(x: Tensor, layout: _Layout, amount: int) -> tuple[Tensor, Tensor, Tensor]:
    """Undo temporal merging for the `amount` static members least similar to their group's mean.

    Ties go by frame, then position; a group's last member stays.

    Returns:
        static [T, N] bool, group [T, N] int64 and share [T, N] after the release: a remaining group stands at its first
        remaining member.
    """
    frames, per_frame, width = x.shape
    flat = x.reshape(-1, width)
    dtype = torch.promote_types(x.dtype, torch.float32)
    member = layout.static.flatten().nonzero().squeeze(1)
    group = layout.group.flatten()[member]
    order = group.argsort(stable=True)
    counts = torch.bincount(group, minlength=frames * per_frame)
    present = counts.nonzero().squeeze(1)
    size = counts[present]
    ordinal = torch.zeros(frames * per_frame, dtype=torch.long, device=x.device)
    ordinal[present] = torch.arange(present.shape[0], device=x.device)
    cosine = torch.empty(member.shape[0], dtype=dtype, device=x.device)
    ends = size.cumsum(0).tolist()
    step = max(1, 4096 // max(1, int(size.max())))  # groups at a time: bounds the float32 copy
    for begin in range(0, len(ends), step):
        stop = min(begin + step, len(ends))
        rows = order[(ends[begin - 1] if begin else 0) : ends[stop - 1]]
        values = flat[member[rows]].to(dtype)
        sizes = size[begin:stop]
        starts = sizes.cumsum(0) - sizes
        mean = torch.nn.functional.embedding_bag(
            torch.arange(rows.shape[0], device=x.device), values, starts, mode="mean"
        )
        mean = mean[ordinal[group[rows]] - begin]
        norms = torch.linalg.vector_norm(values, dim=-1) * torch.linalg.vector_norm(mean, dim=-1)
        cosine[rows] = torch.einsum("md,md->m", values, mean) / norms.clamp_min(1e-12)
    # Equal members differ by rounding noise; on a grid of 2^-20 they tie. Members are listed by frame, then position,
    # so the stable sort breaks ties as promised.
    by_cosine = (cosine * 2**20).round().argsort(stable=True)
    place = by_cosine.argsort()
    last = torch.full((frames * per_frame,), -1, dtype=torch.long, device=x.device)
    last.scatter_reduce_(0, group, place, "amax")
    free = by_cosine[place[by_cosine] != last[group[by_cosine]]]
    released = member[free[:amount]]

    static = layout.static.flatten().clone()
    static[released] = False
    member = static.nonzero().squeeze(1)
    group = layout.group.flatten()[member]
    size = torch.bincount(group, minlength=frames * per_frame)
    head = torch.full((frames * per_frame,), frames * per_frame, dtype=torch.long, device=x.device)
    head.scatter_reduce_(0, group, member, "amin")
    new_group = layout.cell.flatten().clone()
    new_group[member] = head[group]
    share = torch.ones(frames * per_frame, dtype=layout.share.dtype, device=x.device)
    share[member] = size[group].to(share.dtype).reciprocal()
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
    frames, per_frame, _ = x.shape
    total = frames * per_frame

    cosine, norm = pair_cosines(x)
    runs = run_lengths(cosine > options.similarity)
    finite = (torch.isfinite(norm).all() & torch.isfinite(scores).all()).long()
    # the one read of the device: window counts decide the segments, and every count after them
    host = torch.cat([window_counts(runs).flatten(), finite[None]]).cpu().numpy()
    if not host[-1]:
        raise ValueError("the vision tower's output holds values that are not finite (NaN or infinity)")
    windows = host[:-1].reshape(frames - 1, frames + 1)
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
            static, group, share = _release(x, layout, target.tokens - left)

    kept_dynamic = [n for unit in counts for n in unit[1:]]
    kept_static = [unit[0] for unit in counts]
    home = layout.cell.flatten().clone()  # home[g]: the anchor cell that group g ends up in, -1 if dropped
    weight = torch.ones(total, dtype=scores.dtype, device=x.device)
    if counts != units:
        keep = _dynamic_kept(scores, layout, kept_dynamic)
        home = torch.where(keep.flatten() | layout.static.flatten(), home, -1)
        dropped = torch.tensor([c == 0 for c in kept_static], device=x.device)[layout.segment][:, None] & static
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
