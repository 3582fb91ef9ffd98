"""Qwen3-VL with a mixture of experts: what surrounds the decoder is Qwen3-VL's."""

from __future__ import annotations

from ._deepstack import DeepstackFamily

FAMILY = DeepstackFamily()
