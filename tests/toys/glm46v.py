from __future__ import annotations

from transformers import Glm46VForConditionalGeneration

from .glm4v import Glm4vToy


class Glm46VToy(Glm4vToy):
    real = Glm46VForConditionalGeneration
    time = "{:.1f} seconds"


TOY = Glm46VToy()
