from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .base import IMAGE, TEXT, VIDEO, VISION_END, VISION_START, PatchToy


class Qwen25VLToy(PatchToy):
    def model(self, attn: str, **text: Any) -> Any:
        vision = {
            "hidden_size": 32,
            "depth": 3,
            "num_heads": 4,
            "intermediate_size": 40,
            "out_hidden_size": text.get("hidden_size", TEXT["hidden_size"]),
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
        }
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        config = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config={**TEXT, "rope_parameters": rope, **text},
            video_token_id=VIDEO,
            image_token_id=IMAGE,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            tie_word_embeddings=False,
        )
        return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attn)

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        inputs = super().tensors(ids, videos, images, dtype)
        if videos:
            inputs["second_per_grid_ts"] = torch.tensor([1.0] * len(videos))
        return inputs

    def make_projector_linear(self, model: Any) -> None:
        merger = model.model.visual.merger
        merger.mlp[1] = torch.nn.Identity()
        merger.ln_q = torch.nn.Identity()


TOY = Qwen25VLToy()
