"""The embedded tiny video LLM, the world of synthetic videos it was trained on, and the command that trains it."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the embedded checkpoint, in Hugging Face's layout: give it to `--model` or `from_pretrained`."""
