"""GLM-4.5V (mixture of experts): see `_glm`."""

from __future__ import annotations

from ._glm import GlmFamily

FAMILY = GlmFamily()
