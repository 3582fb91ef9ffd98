"""Real classes at sizes that a CPU can run: the published architectures, narrow and shallow.

Vision tower and LLM shrink about alike: of the FLOPs of 32 frames the tower takes a quarter (LLaVA-OneVision) to a
third, where it takes a sixth to a quarter with the 7B and 8B models.
"""

from __future__ import annotations

from typing import Any

from holimerge.shapes import Shape

_TEXT = {"num_hidden_layers": 12, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4}
_TEXT |= {"intermediate_size": 2816, "vocab_size": 16384, "max_position_embeddings": 32768}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
_TOKENS = {"video_token_id": 1001, "image_token_id": 1000, "vision_start_token_id": 1002, "vision_end_token_id": 1003}
_SOURCE = "small sizes in the published architecture"


def _qwen(vision: dict[str, Any], sections: list[int], **text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    sizes = {"depth": 12, "hidden_size": 384, "num_heads": 6, "out_hidden_size": _TEXT["hidden_size"]}
    decoder = {**_TEXT, **text, "rope_parameters": rope}
    return {"vision_config": {**sizes, **vision}, "text_config": decoder, "tie_word_embeddings": False, **_TOKENS}


def _llava() -> dict[str, Any]:
    siglip = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "vision_use_head": False}
    siglip |= {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 12}
    decoder = {"model_type": "qwen2", **_TEXT}
    tokens = {"video_token_index": 1001, "image_token_index": 1000}
    return {"vision_config": siglip, "text_config": decoder, "tie_word_embeddings": False, **tokens}


SMALL = {
    shape.name: shape
    for shape in (
        Shape("llava-onevision-small", "llava_onevision", _llava(), _SOURCE, separators=1),
        Shape(
            "qwen2.5-vl-small",
            "qwen2_5_vl",
            _qwen({"intermediate_size": 1152, "fullatt_block_indexes": [3, 7, 11]}, [8, 12, 12]),
            _SOURCE,
            grid=(18, 32),
        ),
        Shape(
            "qwen3-vl-small",
            "qwen3_vl",
            _qwen({"intermediate_size": 1536, "deepstack_visual_indexes": [3, 6, 9]}, [12, 10, 10], head_dim=64),
            _SOURCE,
            grid=(16, 28),
            separators_per_step=8,
        ),
    )
}
