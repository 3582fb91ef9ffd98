"""The embedded tiny video LLM, the world of synthetic videos it was trained on, and the command that trains it."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the embedded checkpoint, in Hugging Face's layout: give it to `--model` or `from_pretrained`."""

BUDGETS = tuple(str(path) for path in sorted((Path(__file__).parent / "budgets").glob("*.yaml"), reverse=True))
"""YAML files of the embedded model's budgets, from 25 % of the tokens to 5 %."""
