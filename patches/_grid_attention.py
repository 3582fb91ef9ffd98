"""What patches receive in the attention of towers that take flat patches and grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holimerge.attention import received_attention, rotate
from holimerge.spans import Spans


def received_by_patch(attention: Any, got: dict[str, Any], spans: Spans, weight: Tensor | None = None) -> Tensor:
    """[S] float32, attention each patch received inside its attention span, in the tower's own order.

    got: what `projections` gave, and the attention's keyword arguments as "call".
    spans: what is known of this call's spans.
    weight: [S], how many patches each query stands for.
    """
    call = got["call"]
    heads = attention.num_heads
    if "qkv" in got:
        q, k, _ = got["qkv"].unflatten(-1, (3, heads, -1)).unbind(1)
    else:
        q, k = (got[name].unflatten(-1, (heads, -1)) for name in projections(attention))
    cos, sin = (x[:, None].float() for x in call["position_embeddings"])
    q, k = (rotate(x.float(), cos, sin).to(x.dtype) for x in (q, k))
    lengths = spans.lengths(call["cu_seqlens"])
    parts, start, i = [], 0, 0
    while i < len(lengths):  # runs of equal spans go together; the last block's spans are whole frames
        j = i
        while j < len(lengths) and lengths[j] == lengths[i]:
            j += 1
        stop = start + (j - i) * lengths[i]
        pieces = [x[start:stop].unflatten(0, (j - i, lengths[i])).transpose(1, 2) for x in (q, k)]
        counts = None if weight is None else weight[start:stop].unflatten(0, (j - i, lengths[i]))
        parts.append(received_attention(pieces[0], pieces[1], attention.scaling, weight=counts).flatten())
        start, i = stop, j
    return torch.cat(parts)


def projections(attention: Any) -> dict[str, Any]:
    """The modules that make queries and keys, by name: one for both, or two."""
    for names in (("qkv",), ("q", "k"), ("q_proj", "k_proj")):
        if hasattr(attention, names[0]):
            return {name: getattr(attention, name) for name in names}
    raise AttributeError(f"{type(attention).__name__} has no query projection that is known")
