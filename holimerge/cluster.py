"""Density-peak clustering of several point sets at once (Rodriguez & Laio 2014; the k-nearest-neighbour density of
Du et al. 2016, as HoliTom uses it), without the random tie noise: ties go to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distances(x: Tensor, valid: Tensor) -> Tensor:
    """Squared Euclidean distances over D inside each set.

    Args:
        x: [S, n, D] float32 or float64, zero in rows of padding; overwritten.
        valid: [S, n] bool; rows of padding are infinitely far from everything.

    Returns:
        [S, n, n], symmetric, 0 on the diagonal of valid rows.
    """
    # Distances survive a shift; near the origin the subtraction below loses few digits. A point of the set, unlike its
    # mean, is not rounded: points that are exactly alike far apart stay so, and tie.
    x.sub_(x[:, :1].clone())
    product = x @ x.mT
    square = product.diagonal(dim1=1, dim2=2)
    # summed with its own transpose: exactly symmetric, so that mutual neighbours tie, and exactly 0 on the diagonal
    gap = square[:, :, None] + square[:, None, :] - (product + product.mT)
    gap.clamp_min_(0).div_(x.shape[-1])
    return gap.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), torch.inf)


def density_peaks(x: Tensor, valid: Tensor, centres: Tensor, neighbours: int, most: int, least: int = 1) -> Tensor:
    """Assign the points of each set to its density peaks.

    Args:
        x: [S, n, D] float32 or float64, padded point sets; padding is zero, behind the points. Overwritten.
        valid: [S, n] bool, which rows are points.
        centres: [S] int64, how many centres each set gets, at least 1 and at most its number of points.
        neighbours: the density of a point is exp(-mean of its k smallest squared distances, its own 0 included), with
            k = min(neighbours, centres of the set).
        most, least: the largest of `centres` and a number that none is below, as Python numbers (so that no device has
            to be asked).

    Returns:
        [S, n] int64: the row of the centre each point belongs to; a centre belongs to itself, padding to row 0 or so.
    """
    gap = pairwise_distances(x, valid)
    distance, padding = gap.sqrt(), ~valid
    n = x.shape[1]
    index = torch.arange(n, device=x.device)
    nearest = gap.topk(min(neighbours, most, n), dim=-1, largest=False).values
    # The logarithm of the density: it orders points alike and cannot underflow where distances are large.
    if least >= neighbours:  # every set has that many centres
        density = nearest.sum(-1) / -neighbours
    else:
        k = centres.clamp(max=neighbours)[:, None, None]
        used = torch.arange(nearest.shape[-1], device=x.device) < k
        density = -(torch.where(used, nearest, 0).sum(-1) / k[..., 0])
    density = density.masked_fill(padding, -torch.inf)
    # padding is never denser than a point
    higher = density[:, None, :] > density[:, :, None]
    equal = density[:, None, :] == density[:, :, None]
    denser = higher | (equal & (index[None, :] < index[:, None]))
    furthest = distance.nan_to_num(posinf=0.0).amax((1, 2))
    separation = distance.masked_fill(~denser, torch.inf).amin(-1)
    separation = separation.minimum(furthest[:, None])  # of the densest point, which has none that is denser
    score = (density + separation.log()).masked_fill(padding, -torch.inf)
    # A point that coincides with a denser one scores -inf like padding; the stable sort puts points first.
    order = score.argsort(dim=-1, descending=True, stable=True)
    is_centre = torch.zeros_like(valid).scatter_(1, order, index < centres[:, None])
    owner = distance.masked_fill(~is_centre[:, None, :], torch.inf).argmin(-1)
    return torch.where(is_centre, index, owner)


def centre_weights(owner: Tensor, valid: Tensor, beta: float | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of each point in its cluster.

    Args:
        owner: [S, n] int64 from `density_peaks`.
        valid: [S, n] bool.
        beta: the centre's share against the mean of the others; None for the plain mean of all.

    Returns:
        [S, n] of `dtype`; the weights of a cluster sum to one. A centre alone has weight 1.
    """
    held = torch.zeros_like(owner).scatter_add_(1, owner, valid.long()).gather(1, owner).to(dtype)  # in its cluster
    if beta is None:
        return held.clamp_min_(1).reciprocal()
    is_centre = owner == torch.arange(owner.shape[1], device=owner.device)
    weight = torch.where(is_centre, beta, (1 - beta) / (held - 1).clamp_min_(1))
    return weight.masked_fill_(is_centre & (held == 1), 1.0)
