from __future__ import annotations

from typing import Any, ClassVar

from transformers import Glm4vMoeForConditionalGeneration

from .glm4v import Glm4vToy


class Glm4vMoeToy(Glm4vToy):
    real = Glm4vMoeForConditionalGeneration
    text: ClassVar[dict[str, Any]] = {
        **Glm4vToy.text,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,  # the first layer has no experts
    }


TOY = Glm4vMoeToy()
