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


def density_peaks(x: Tensor, valid: Tensor, centres: Tensor, neighbours: int, most: int) -> Tensor:
    """Assign the points of each set to its density peaks.

    Args:
        x: [S, n, D] float32 or float64, padded point sets; padding is zero, behind the points. Overwritten.
        valid: [S, n] bool, which rows are points.
        centres: [S] int64, how many centres each set gets, at least 1 and at most its number of points.
        neighbours: the density of a point is exp(-mean of its k smallest squared distances, its own 0 included), with
            k = min(neighbours, centres of the set).
        most: the largest of `centres`, as a Python number (so that no device has to be asked).

    Returns:
        [S, n] int64: the row of the centre each point belongs to; a centre belongs to itself, padding to row 0 or so.
    """
    gap = pairwise_distances(x, valid)
    distance = gap.sqrt()
    n = x.shape[1]
    index = torch.arange(n, device=x.device)
    k = centres.clamp(max=neighbours)[:, None, None]
    nearest = gap.topk(min(neighbours, most, n), dim=-1, largest=False).values
    used = torch.arange(nearest.shape[-1], device=x.device) < k
    # The logarithm of the density: it orders points alike and cannot underflow where distances are large.
    density = -(torch.where(used, nearest, 0).sum(-1) / k[..., 0])
    density = density.masked_fill(~valid, -torch.inf)
    higher = density[:, None, :] > density[:, :, None]
    equal = density[:, None, :] == density[:, :, None]
    denser = (higher | (equal & (index[None, :] < index[:, None]))) & valid[:, None, :]
    furthest = distance.masked_fill(~torch.isfinite(distance), 0).amax((1, 2))
    separation = distance.masked_fill(~denser, torch.inf).amin(-1)
    separation = torch.where(torch.isinf(separation), furthest[:, None], separation)
    score = (density + separation.log()).masked_fill(~valid, -torch.inf)
    # A point that coincides with a denser one scores -inf like padding; the stable sort puts points first.
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    is_centre = (rank < centres[:, None]) & valid
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
    is_centre = owner == torch.arange(owner.shape[1], device=owner.device)
    # members other than the centre, seen from every member
    others = torch.zeros_like(owner).scatter_add_(1, owner, (valid & ~is_centre).long()).gather(1, owner)
    if beta is None:
        return (others + 1).to(dtype).reciprocal()
    weight = torch.where(is_centre, beta, (1 - beta) / others.clamp_min(1).to(dtype))
    return torch.where(is_centre & (others == 0), 1.0, weight)
