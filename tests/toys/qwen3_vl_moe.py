from __future__ import annotations

from typing import Any, ClassVar

from transformers import Qwen3VLMoeForConditionalGeneration

from .qwen3_vl import Qwen3VLToy


class Qwen3VLMoeToy(Qwen3VLToy):
    real = Qwen3VLMoeForConditionalGeneration
    # the first layer has no experts
    text: ClassVar[dict[str, Any]] = {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
        "tie_word_embeddings": False,
    }


TOY = Qwen3VLMoeToy()
