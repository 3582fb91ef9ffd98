"""Qwen3.5 with a mixture of experts: what surrounds the decoder is Qwen3.5's."""

from __future__ import annotations

from .qwen3_5 import FAMILY

__all__ = ["FAMILY"]
