"""Merging tokens of a frame between attention and MLP of a vision block (ToMe, arXiv 2210.09461, from its formulas).

Tokens alternate between two sets, A and B. Each token of A looks for the token of B with the largest cosine of keys
(mean over heads); the r best pairs merge, by the mean weighted with the tokens that each already holds. Attention then
adds log(size) to the logits of a merged key. Differs from the paper: what is left keeps its raster order; ties go to
the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMerge:
    """Which tokens of each frame become one.

    owner: [F, n] int64, the remaining token that holds each token.
    kept: [F, n'] int64, ascending: the token in whose place each remaining one stands.
    """

    owner: Tensor
    kept: Tensor

    @property
    def nothing(self) -> bool:
        """Whether every token stays."""
        return self.owner.shape == self.kept.shape

    def sizes(self, size: Tensor) -> Tensor:
        """[F, n'] float32: how many original tokens each remaining one holds; size: [F, n], the same before."""
        return torch.zeros_like(self.kept, dtype=size.dtype).scatter_add_(1, self.owner, size)  # whole numbers: exact

    def merged(self, x: Tensor, size: Tensor) -> Tensor:
        """[F, n', C] in x's dtype: means weighted by size, summed in float32 in raster order; x: [F, n, C]."""
        frames, count = self.kept.shape
        weight = size / self.sizes(size).gather(1, self.owner)
        order = self.owner.argsort(dim=1, stable=True)
        held = torch.zeros_like(self.kept).scatter_add_(1, self.owner, torch.ones_like(self.owner)).flatten()
        rows = (order + torch.arange(frames, device=x.device)[:, None] * x.shape[1]).flatten()
        y = torch.nn.functional.embedding_bag(
            rows,
            x.flatten(0, 1).float(),
            held.cumsum(0) - held,
            mode="sum",
            per_sample_weights=weight.flatten()[rows].float(),
        )
        return y.view(frames, count, -1).to(x.dtype)

    def spread(self, y: Tensor) -> Tensor:
        """[F, n, C]: every token takes what the one that holds it has; y: [F, n', C]."""
        return y.gather(1, self.owner[..., None].expand(-1, -1, y.shape[-1]))


def match_tokens(metric: Tensor, r: int, fixed: int = 0) -> TokenMerge:
    """The r best pairs of each frame.

    Args:
        metric: [F, n, d], compared by cosine in float32.
        r: tokens to merge away; at most as many as set B has.
        fixed: leading tokens that take no part (a class token).
    """
    frames, total, _ = metric.shape
    place = torch.arange(total, device=metric.device).expand(frames, -1)
    r = min(r, (total - fixed) // 2)
    if r < 1:
        return TokenMerge(place, place)
    tokens = torch.nn.functional.normalize(metric[:, fixed:].float(), dim=-1)
    first, second = tokens[:, ::2], tokens[:, 1::2]
    best, partner = (first @ second.mT).max(-1)
    chosen = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    gone = fixed + 2 * chosen
    into = fixed + 2 * partner.gather(1, chosen) + 1
    leaves = torch.zeros_like(place, dtype=torch.uint8).scatter_(1, gone, 1)
    number = (1 - leaves.long()).cumsum(1) - 1
    owner = number.gather(1, place.scatter(1, gone, into))
    # those that stay come first, in raster order; a mask would ask the device how many they are
    return TokenMerge(owner, leaves.argsort(dim=1, stable=True)[:, : total - r])
