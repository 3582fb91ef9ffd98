"""Merging inside the LLM: one layer's last-query attention ranks the video tokens, the lower share joins the nearest
of the upper share by hidden state (HoliTom's inner merge; with `drop` it is FastV's pruning)."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_owners(hidden: Tensor, scores: Tensor, counts: Tensor, keep: Tensor, most: int) -> Tensor:
    """Which kept video token each video token belongs to.

    Args:
        hidden: [B, V, D], the rows' video tokens in sequence order, padding behind.
        scores: [B, V] float32, attention the query paid to them.
        counts: [B] int64, video tokens in each row.
        keep: [B] int64, how many of them stay.
        most: the largest of `keep`, as a Python number (so that no device has to be asked).

    Returns:
        [B, V] int64: a kept token names itself; another the kept token of highest cosine. Ties to the lower index.
        Padding names itself.
    """
    width = hidden.shape[1]
    index = torch.arange(width, device=hidden.device)
    real = index < counts[:, None]
    order = scores.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    kept = order.argsort(dim=1) < keep[:, None]
    unit = torch.nn.functional.normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)
    # kept tokens first, in sequence order, so that the similarity is [V, kept] and ties fall to the lower index
    front = (~kept).long().argsort(dim=1, stable=True)[:, :most]
    chosen = unit.gather(1, front[..., None].expand(-1, -1, unit.shape[-1]))
    similarity = (unit @ chosen.mT).masked_fill(~kept.gather(1, front)[:, None, :], -torch.inf)
    owner = front.gather(1, similarity.argmax(-1))
    return torch.where(kept | ~real, index, owner)


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
    index = torch.arange(width, device=hidden.device)
    kept = owner == index
    # rows of one owner side by side: the owner first, then the others in sequence order
    key = (owner * 2 + (~kept).long()) * width + index
    order = key.argsort(dim=1)
    group = owner.gather(1, order)
    members = torch.zeros_like(owner).scatter_add_(1, owner, torch.ones_like(owner))
    start = (members.cumsum(1) - members).gather(1, group)
    place = index - start
    total = members.gather(1, group)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if mode == "mean":
        weight = sizes.to(dtype).gather(1, order)
        mass = torch.zeros(batch, width, dtype=dtype, device=hidden.device).scatter_add_(1, owner, sizes.to(dtype))
        weight = weight / mass.gather(1, group)
    else:
        # unrolled running average of an owner and m others: 2^-m for the owner, 2^-(m - i + 1) for the i-th other
        weight = torch.exp2(-(total - 1 - (place - 1).clamp_min(0)).to(dtype))
    flat = hidden.reshape(batch * width, depth)
    rows = (order + torch.arange(batch, device=hidden.device)[:, None] * width).flatten()
    bags = members.flatten()
    merged = torch.nn.functional.embedding_bag(
        torch.arange(rows.shape[0], device=hidden.device),
        flat[rows].to(dtype),
        bags.cumsum(0) - bags,  # an empty bag, of a token that was merged away, sums to zero
        mode="sum",
        per_sample_weights=weight.flatten(),
    )
    alone = (members == 1)[..., None]
    merged = merged.view(batch, width, depth).to(hidden.dtype)
    return torch.where(kept[..., None] & ~alone, merged, hidden)
