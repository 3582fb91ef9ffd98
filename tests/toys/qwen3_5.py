"""Qwen3.5: prompts as Qwen3-VL's, no deepstack, layers with linear attention between those with full attention."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import Qwen3_5ForConditionalGeneration

from .qwen3_vl import Qwen3VLToy


class Qwen35Toy(Qwen3VLToy):
    real = Qwen3_5ForConditionalGeneration
    tower: ClassVar[dict[str, Any]] = {"num_position_embeddings": 36}
    text: ClassVar[dict[str, Any]] = {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 16,  # half of it is rotated
        "rope_parameters": {"partial_rotary_factor": 0.5},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    recurrent = True
    inner_layers = (2,)  # the layer below has keys and queries
    stock_fails: ClassVar[dict[str, str]] = {
        "prompt lookup": "refused: the state of a linear layer cannot go back",
        "assistant": "as prompt lookup",
        "quantized cache": "only for decoders of full attention",
    }


TOY = Qwen35Toy()
