"""Qwen2-VL: a ViT of full attention in each frame, a merger that joins 2 x 2 patches, 3-D rotary positions."""

from __future__ import annotations

from ._grids import GridFamily

FAMILY = GridFamily()
