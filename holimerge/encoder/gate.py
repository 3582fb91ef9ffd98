"""Frames whose pixels did not change take the features of the last frame that was encoded.

After the gating of Gated Residual Tokenization, whose unit is the patch. Here the unit is a frame (a temporal step),
since a patch's features depend on every patch of its frame: a frame is encoded as a whole, or it takes all its features
from the last one that was. With both limits at zero that is what encoding it again would give; above zero, what moved
in a frame that is not encoded is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gate_sources(frames: Tensor, per_patch: Callable[[Tensor], Tensor], threshold: float, changed: float) -> Tensor:
    """Which frame each frame takes its features from: itself, or the last one before it that is encoded.

    Args:
        frames: [T, ...], pixel values as the tower gets them.
        per_patch: absolute differences of one frame [...] -> their means [P] over each patch.
        threshold: a patch has changed if its mean difference is above it.
        changed: a frame is encoded if more than this share of its patches has changed.

    Returns:
        [T] int64, ascending. Found without asking the device.
    """
    source = torch.zeros(frames.shape[0], dtype=torch.long, device=frames.device)
    last = source[:1]
    for t in range(1, frames.shape[0]):
        difference = (frames[t].float() - frames.index_select(0, last)[0].float()).abs()
        moved = ~(per_patch(difference) <= threshold)  # also what is not a number
        # counts, not a mean: a share of 0 must mean none at all
        encode = moved.sum() > changed * moved.numel()
        last = torch.where(encode, t, last)
        source[t] = last[0]
    return source
