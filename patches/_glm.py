"""What the GLM-4.xV models share: a strided convolution before the merger, timestamps between frames."""

from __future__ import annotations

from typing import Any

from ._grids import GridFamily


class GlmFamily(GridFamily):
    framed = True
    one_placeholder = True

    def unit(self, core: Any) -> int:
        return 1  # the convolution has joined the patches already
