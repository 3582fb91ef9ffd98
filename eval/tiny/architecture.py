"""The tiny model's shape: a real `LlavaOnevisionForConditionalGeneration`, 36 tokens a frame."""

from __future__ import annotations

from typing import Any

from .language import INDEX, WORDS
from .world import SIDE

WIDTH = 128
PATCH = 8


def tiny_config() -> Any:
    """SigLIP tower of 3 layers on 12 x 12 patches, Qwen2 of 4 layers, both 128 wide."""
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_size": WIDTH,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            # Wide heads and a high base leave half of each head hardly turned by the rotary embedding, so that a word
            # finds what it names however long ago that was seen.
            "head_dim": 64,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": INDEX["<|im_end|>"],
            "pad_token_id": INDEX["<pad>"],
        },
        video_token_index=INDEX["<video>"],
        image_token_index=INDEX["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[SIDE, SIDE]],
        tie_word_embeddings=False,
    )
