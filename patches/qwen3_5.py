"""Qwen3.5: linear and full attention alternate, queries carry a gate, timestamps between frames, no deepstack.

An inner merge may sit right above a full-attention layer, whose scores rank the tokens; the linear layers above it run
over the shorter sequence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._grids import GridFamily


class Qwen35(GridFamily):
    framed = True

    def _heads(self, projected: Tensor, attention: Any) -> Tensor:
        return projected.unflatten(-1, (-1, 2, attention.head_dim))[..., 0, :]  # the other half is the gate


FAMILY = Qwen35()
