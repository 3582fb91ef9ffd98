"""Qwen3-VL: deepstack features added to the first decoder layers, timestamps between frames, interleaved mRoPE."""

from __future__ import annotations

from ._deepstack import DeepstackFamily

FAMILY = DeepstackFamily()
