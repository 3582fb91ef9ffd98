from __future__ import annotations

from typing import Any, ClassVar

from transformers import Qwen3_5MoeForConditionalGeneration

from .qwen3_5 import Qwen35Toy


class Qwen35MoeToy(Qwen35Toy):
    real = Qwen3_5MoeForConditionalGeneration
    text: ClassVar[dict[str, Any]] = {
        **Qwen35Toy.text,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    }


TOY = Qwen35MoeToy()
