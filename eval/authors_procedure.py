"""The authors' outer reduction of HoliTom, re-created as a baseline for timing.

Written from the published description (HoliTom, arXiv 2505.21334, and how its repository is described to behave), for
comparison only: the library does not use it. It keeps the costs of the original: a T x T x N table of gains, a dynamic
programme over 0-dim tensors whose every comparison is read back by the host, one clustering per segment, Python loops
over clusters and over the tokens in them, one concatenation per segment.

Where the description leaves a cost open, the cheaper reading was taken, so that a speed-up measured against it is
not flattered: `cdist` may use a matrix product (its default), a cluster's tokens are found with one mask instead of by
asking each token, and the means over time and the choice of a frame's tokens are one tensor operation each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def authors_outer(
    features: Tensor,
    scores: Tensor,
    retain: float,
    tau: float,
    beta: float = 0.6,
    neighbours: int = 7,
    noise: bool = False,
    cosine: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Reduce one video the way the authors do, in segment order.

    Differs from the original so that its result can be checked: no noise on the densities unless asked for (equal ones
    are then ordered by index), and a guard against float error in the ceil. Equal scores are ordered by torch's topk.
    From 26 static tokens on `cdist` uses a matrix product, whose rounding orders equal densities arbitrarily.

    Args:
        features: video tokens [T, N, D], any floating dtype and device.
        scores: importance of every token [T, N].
        retain: share of the T*N tokens to keep, 0 to 1.
        tau: cosine above which (strictly) a token counts as unchanged in the next frame.
        beta: weight of a cluster's centre against the mean of the tokens assigned to it.
        neighbours: neighbours of the density estimate.
        noise: add U(0, 1) * 1e-6 to the densities, as the original does (draws from torch's global generator).
        cosine: the cosines of neighbouring frames, from [T, N, D] in fp32 to [T-1, N]. To time the same cosine on
            both sides pass the library's; None takes torch's.

    Returns:
        The kept tokens [K, D] (K may be 0: the authors have no lower bound), and the segments as (first, last) frame.
    """
    T, N, D = features.shape
    flags = (cosine or _neighbour_cosine)(features.float()) > tau  # [T-1, N]
    segments, removed = _segment(_gain_table(flags))
    ratio = min(retain * T * N / (T * N - removed), 1)

    parts: list[Tensor] = []
    for start, end in segments:
        if start == end:
            static_mask = torch.zeros(N, dtype=torch.bool, device=features.device)
        else:
            static_mask = flags[start:end].all(dim=0)
        part: list[Tensor] = []
        static = features[start : end + 1, static_mask].mean(dim=0)  # [n_static, D]
        if len(static) > 0:
            part.append(_reduce_static(static, round(len(static) * ratio), beta, neighbours, noise))
        dynamic = (~static_mask).nonzero().squeeze(1)  # [n_dynamic]
        if len(dynamic) > 0:
            # The guard takes back float error only, as in the library: both sides keep the same number of tokens.
            count = math.ceil(len(dynamic) * ratio - 1e-9)
            for t in range(start, end + 1):
                best = scores[t, dynamic].topk(count).indices.sort().values
                part.append(features[t, dynamic[best]])
        parts.append(torch.cat(part) if part else features.new_zeros(0, D))
    return torch.cat(parts), segments


def _neighbour_cosine(x: Tensor) -> Tensor:
    """Cosine of every token of `x` [T, N, D] with the one at its position in the next frame; returns [T-1, N]."""
    return torch.nn.functional.cosine_similarity(x[:-1], x[1:], dim=-1, eps=1e-12)


def _gain_table(flags: Tensor) -> Tensor:
    """Tokens removed by every segment: `flags` [T-1, N] to int64 gains [T, T] of frames s..e, 0 where e <= s."""
    T = flags.shape[0] + 1
    gains = torch.zeros(T, T, dtype=torch.long, device=flags.device)
    if T == 1:
        return gains
    pair = torch.arange(T - 1, device=flags.device)
    before = pair[None, :] < pair[:, None]  # [start, pair]: the pair lies before the segment
    # Entry [s, p, n]: is position n unchanged over the pairs s..p, i.e. over the frames s..p+1?
    run = (flags[None] | before[:, :, None]).cumprod(dim=1, dtype=torch.uint8)
    length = (pair[None, :] - pair[:, None] + 1).clamp(min=0)
    gains[:-1, 1:] = run.sum(dim=2) * length
    return gains


def _segment(gains: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Dynamic programme over 0-dim tensors: `gains` [T, T] to the segments in time order and the tokens removed.

    Each comparison reads a tensor back on the host, about T^2/2 times, which is the cost being measured.
    """
    T = gains.shape[0]
    zero = torch.zeros((), dtype=gains.dtype, device=gains.device)
    best: list[Tensor] = []
    first: list[int] = []
    for i in range(T):
        top, origin = (best[i - 1] if i > 0 else zero), i
        for window in range(2, i + 2):
            start = i - window + 1
            candidate = (best[start - 1] if start > 0 else zero) + gains[start, i]
            if (candidate > top).item():
                top, origin = candidate, start
        best.append(top)
        first.append(origin)
    segments: list[tuple[int, int]] = []
    end = T - 1
    while end >= 0:
        segments.append((first[end], end))
        end = first[end] - 1
    return segments[::-1], int(best[-1].item())


def _reduce_static(static: Tensor, count: int, beta: float, neighbours: int, noise: bool) -> Tensor:
    """Cluster `static` [n, D] around `count` centres and merge each cluster; returns [count, D] by centre."""
    n, D = static.shape
    if count == 0:
        return static.new_zeros(0, D)
    if count == n:
        return static
    x = static.float()
    dist = torch.cdist(x, x) / math.sqrt(D)  # [n, n]
    nearest = dist.topk(min(neighbours, count), dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()  # [n]
    if noise:
        density = density + torch.rand_like(density) * 1e-6
    index = torch.arange(n, device=static.device)
    # denser[i, j]: j is denser than i. Without noise equal densities (always so with one centre) are ordered by index.
    denser = density[None, :] > density[:, None]
    denser |= (density[None, :] == density[:, None]) & (index[None, :] < index[:, None])
    separation = torch.where(denser, dist, dist.max()).min(dim=-1).values
    peak = density * separation
    if noise:
        centres = peak.topk(count).indices.sort().values
    else:
        centres = peak.sort(descending=True, stable=True).indices[:count].sort().values
    owner = dist[:, centres].argmin(dim=-1)  # [n], ordinal of the nearest centre

    is_centre = torch.zeros(n, dtype=torch.bool, device=static.device)
    is_centre[centres] = True
    merged: list[Tensor] = []
    for ordinal, centre in enumerate(centres.tolist()):
        members = ((owner == ordinal) & ~is_centre).nonzero().squeeze(1)
        if len(members) == 0:
            merged.append(static[centre])
            continue
        total = static.new_zeros(D)
        for member in members.tolist():
            total = total + static[member]
        merged.append(beta * static[centre] + (1 - beta) * (total / len(members)))
    return torch.stack(merged)
