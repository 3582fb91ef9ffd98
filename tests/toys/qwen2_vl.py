from __future__ import annotations

from typing import Any

from transformers import Qwen2VLForConditionalGeneration

from .base import PatchToy


class Qwen2VLToy(PatchToy):
    real = Qwen2VLForConditionalGeneration

    def towers(self, width: int) -> dict[str, dict[str, Any]]:
        # this tower calls its own width `embed_dim` and the LLM's `hidden_size`
        vision = super().towers(width)["vision_config"]
        hidden, _, _ = (vision.pop(k) for k in ("hidden_size", "intermediate_size", "out_hidden_size"))
        return {"vision_config": {**vision, "embed_dim": hidden, "hidden_size": width, "mlp_ratio": 2}}


TOY = Qwen2VLToy()
