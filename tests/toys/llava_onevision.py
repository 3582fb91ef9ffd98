from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from .base import IMAGE, TEXT, VIDEO, Toy, eager_weights


class LlavaOnevisionToy(Toy):
    frame_size = (28, 28)
    equal_frames = True

    def model(self, attn: str, **text: Any) -> Any:
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 4,
            "vision_use_head": False,
        }  # 7 x 7 patches, pooled to 4 x 4 tokens: an odd side, as 27 is
        config = LlavaOnevisionConfig(
            vision_config=vision,
            text_config={"model_type": "qwen2", **TEXT, **text},
            video_token_id=VIDEO,
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[[28, 28]],
            tie_word_embeddings=False,
        )
        return LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attn)

    def video_ids(self, video: Tensor) -> list[int]:
        return [VIDEO] * (video.shape[0] * 16 + 1)

    def image_ids(self, image: Tensor) -> list[int]:
        # 7 x 7 patches; the anyres grid of one tile adds a second copy with a newline per row
        return [IMAGE] * (49 + 7 * 8)

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if videos:
            inputs["pixel_values_videos"] = torch.stack(videos).to(dtype)
        if images:
            inputs["pixel_values"] = torch.stack([torch.stack([x, x]) for x in images]).to(dtype)
            inputs["image_sizes"] = torch.tensor([[28, 28]] * len(images))
        return inputs

    def modules(self, model: Any) -> dict[str, Any]:
        return {"vision": model.model.vision_tower, "projector": model.model.multi_modal_projector}

    def make_projector_linear(self, model: Any) -> None:
        model.model.multi_modal_projector.act = torch.nn.Identity()

    def features(self, model: Any, x: dict[str, Tensor]) -> list[Tensor]:
        frames = x["pixel_values_videos"].shape[1]
        # without the newline, which older versions of transformers append later
        return [model.get_video_features(x["pixel_values_videos"]).pooler_output[0, : frames * 16]]

    def received(self, model: Any, x: dict[str, Tensor]) -> np.ndarray:
        layer = model.model.vision_tower.encoder.layers[-1].self_attn
        received = eager_weights(layer, lambda: self.features(model, x)).mean((1, 2))  # [T, P]
        return model.model.apply_pooling(received[..., None])[..., 0].numpy()

    def separators(self, model: Any) -> Tensor:
        return model.model.image_newline[None]


TOY = LlavaOnevisionToy()
