"""Attention scores from queries and keys, without asking the model for attention weights.

The user's attention implementation stays as it is, and no [frames, heads, N, N] tensor is held.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of float32 logits at once: on a CPU they should stay in its cache, on a GPU launches should stay few.
_CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


def logits_at_once(per_frame: int, device: torch.device) -> int:
    """Frames (or other spans), at least one, whose float32 logits may be held together. per_frame: logits of each."""
    return frames_at_once(per_frame, device.type)


def frames_at_once(per_frame: int, kind: str) -> int:
    """The same for a kind of device."""
    return max(1, _CHUNK_BYTES.get(kind, _CHUNK_BYTES["cuda"]) // (per_frame * 4))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the half-split kind. x: [..., d]; cos, sin: broadcastable to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def received_attention(
    q: Tensor, k: Tensor, scale: float, *, bias: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Softmax attention each key receives, averaged over heads and queries of its frame.

    Args:
        q, k: [F, heads, P, d], the vision layer's own queries and keys of F frames (rotated where the tower does).
        scale: the layer's softmax scale.
        bias: [F, 1, 1 or P, P], added to the logits of each key (for each query).
        weight: [F, P], how much each query counts in the average; None for all alike.

    Returns:
        [F, P] float32; each frame's values sum to one.
    """
    frames, heads, tokens, _ = q.shape
    step = logits_at_once(heads * tokens * tokens, q.device)
    parts = []
    for start in range(0, frames, step):
        logits = (q[start : start + step] * scale) @ k[start : start + step].mT
        if bias is not None:
            logits = logits + bias[start : start + step]
        attended = torch.softmax(logits, dim=-1, dtype=torch.float32)
        if weight is None:
            parts.append(attended.mean(dim=(1, 2)))
        else:
            share = weight[start : start + step] / weight[start : start + step].sum(1, keepdim=True)
            parts.append(torch.einsum("fhqk,fq->fk", attended, share) / heads)
    return torch.cat(parts)


def query_attention(q: Tensor, keys: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Softmax attention of one query per row, averaged over heads: O(N).

    Args:
        q: [B, heads, d], rotated.
        keys: [B, kv_heads, L, d], rotated (the cache's); grouped-query attention where kv_heads < heads.
        allowed: [B, L] bool, keys this query may see.
        scale: the layer's softmax scale.

    Returns:
        [B, L] float32, 0 where not allowed.
    """
    batch, kv_heads, _, width = keys.shape
    grouped = q.view(batch, kv_heads, -1, width)
    logits = (grouped.float() @ keys.float().mT) * scale
    logits = logits.masked_fill(~allowed[:, None, None, :], -torch.inf)
    return torch.softmax(logits, dim=-1).mean(dim=(1, 2))
