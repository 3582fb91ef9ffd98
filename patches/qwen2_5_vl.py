"""Qwen2.5-VL: a ViT with windowed attention, a merger that joins 2 x 2 patches, 3-D rotary positions.

Its tower undoes the window order on the merger's output; `GridFamily` asks it for that order.
"""

from __future__ import annotations

from ._grids import GridFamily

FAMILY = GridFamily()
