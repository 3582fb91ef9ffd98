"""Merging inside the LLM: one layer's last-query attention ranks the video tokens, the lower share joins the nearest
of the upper share by hidden state (HoliTom's inner merge; with `drop` it is FastV's pruning)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tokens import upload


def choose_owners(hidden: Tensor, scores: Tensor, counts: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Which kept video token each video token belongs to.

    Args:
        hidden: [B, V, D], the rows' video tokens in sequence order, padding behind.
        scores: [B, V] float32, attention the query paid to them.
        counts: B numbers, video tokens in each row.
        keep: B numbers, how many of them stay. Both are the host's, so that no device has to be asked.

    Returns:
        [B, V] int64: a kept token names itself; another the kept token of highest cosine. Ties to the lower index.
        Padding names itself.
    """
    width, most = hidden.shape[1], max(keep)
    index = torch.arange(width, device=hidden.device)
    padded, alike = min(counts) < width, min(keep) == most
    real = index < upload(counts, hidden.device)[:, None] if padded else None
    if real is not None:
        scores = scores.masked_fill(~real, -torch.inf)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :most]
    kept = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    unit = torch.nn.functional.normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)
    # kept tokens first, in sequence order, so that the similarity is [V, kept] and ties fall to the lower index
    if alike:
        kept.scatter_(1, best, True)
        front = best.sort(dim=1).values
    else:
        kept.scatter_(1, best, (index[:most] < upload(keep, hidden.device)[:, None]))
        front = (~kept).long().argsort(dim=1, stable=True)[:, :most]
    similarity = unit @ unit.gather(1, front[..., None].expand(-1, -1, unit.shape[-1])).mT
    if not alike:
        similarity = similarity.masked_fill(~kept.gather(1, front)[:, None, :], -torch.inf)
    owner = front.gather(1, similarity.argmax(-1))
    return torch.where(kept if real is None else kept | ~real, index, owner)


def merge_owned(hidden: Tensor, sizes: Tensor, owner: Tensor, mode: str) -> Tensor:
    """The hidden states of the kept video tokens after merging.

    Args:
        hidden: [B, V, D].
        sizes: [B, V] float32, how many original tokens each holds.
        owner: [B, V] int64 from `choose_owners`.
        mode: mean (weighted by sizes, order-independent), pairwise (kept <- (kept + other) / 2 in sequence order, as
            the authors), drop (kept as they are).

    Returns:
        [B, V, D] in hidden's dtype: rows of kept tokens merged, other rows as they were.
    """
    if mode == "drop":
        return hidden
    batch, width, depth = hidden.shape
    kept = owner == torch.arange(width, device=hidden.device)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    members = torch.zeros_like(owner).scatter_add_(1, owner, torch.ones_like(owner))
    # rows of one owner side by side, in sequence order
    order = (owner if mode == "mean" else owner * 2 + ~kept).argsort(dim=1, stable=True)
    group = owner.gather(1, order)
    if mode == "mean":
        sizes = sizes.to(dtype)
        mass = torch.zeros_like(sizes).scatter_add_(1, owner, sizes)
        weight = sizes.gather(1, order) / mass.gather(1, group)
    else:  # the owner stands first
        place = torch.arange(width, device=hidden.device) - (members.cumsum(1) - members).gather(1, group)
        # unrolled running average of an owner and m others: 2^-m for the owner, 2^-(m - i + 1) for the i-th other
        weight = torch.exp2(-(members.gather(1, group) - 1 - (place - 1).clamp_min(0)).to(dtype))
    rows = order
    if batch > 1:
        rows = order + torch.arange(batch, device=hidden.device)[:, None] * width
    bags = members.flatten()
    merged = torch.nn.functional.embedding_bag(
        torch.arange(batch * width, device=hidden.device),
        hidden.reshape(batch * width, depth)[rows.flatten()].to(dtype),
        bags.cumsum(0) - bags,  # an empty bag, of a token that was merged away, sums to zero
        mode="sum",
        per_sample_weights=weight.flatten(),
    )
    # what is alone keeps its bits: its weight is 1
    return torch.where(kept[..., None], merged.view(batch, width, depth).to(hidden.dtype), hidden)
