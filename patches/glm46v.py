"""GLM-4.6V: see `_glm`."""

from __future__ import annotations

from ._glm import GlmFamily

FAMILY = GlmFamily()
