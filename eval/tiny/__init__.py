"""The embedded tiny video LLM, the world of synthetic videos it was trained on, and the command that trains it."""

from __future__ import annotations
