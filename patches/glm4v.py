"""GLM-4.1V (dense): see `_glm`."""

from __future__ import annotations

from ._glm import GlmFamily

FAMILY = GlmFamily()
