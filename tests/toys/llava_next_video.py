from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from .base import IMAGE, TEXT, VIDEO, Toy, eager_weights


class LlavaNextVideoToy(Toy):
    frame_size = (32, 32)
    equal_frames = True

    def model(self, attn: str, **text: Any) -> Any:
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "projection_dim": 24,
        }  # a class token and 8 x 8 patches, averaged to 4 x 4 before the projector
        config = LlavaNextVideoConfig(
            vision_config=vision,
            text_config={"model_type": "llama", **TEXT, **text},
            video_token_index=VIDEO,
            image_token_index=IMAGE,
            vision_feature_layer=-2,  # the last layer runs and is not used
            vision_feature_select_strategy="default",
            image_grid_pinpoints=[[32, 32]],
            tie_word_embeddings=False,
        )
        return LlavaNextVideoForConditionalGeneration._from_config(config, attn_implementation=attn)

    def video_ids(self, video: Tensor) -> list[int]:
        return [VIDEO] * (video.shape[0] * 16)

    def image_ids(self, image: Tensor) -> list[int]:
        # 8 x 8 patches; the anyres grid of one tile adds a second copy with a newline per row
        return [IMAGE] * (64 + 8 * 9)

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if videos:
            inputs["pixel_values_videos"] = torch.stack(videos).to(dtype)
        if images:
            inputs["pixel_values"] = torch.stack([torch.stack([x, x]) for x in images]).to(dtype)
            inputs["image_sizes"] = torch.tensor([[32, 32]] * len(images))
        return inputs

    def modules(self, model: Any) -> dict[str, Any]:
        return {"vision": model.model.vision_tower, "projector": model.model.multi_modal_projector}

    def make_projector_linear(self, model: Any) -> None:
        model.model.multi_modal_projector.act = torch.nn.Identity()

    def features(self, model: Any, x: dict[str, Tensor]) -> list[Tensor]:
        return [model.get_video_features(x["pixel_values_videos"]).pooler_output[0]]

    def received(self, model: Any, x: dict[str, Tensor]) -> np.ndarray:
        layer = model.model.vision_tower.encoder.layers[-2].self_attn
        received = eager_weights(layer, lambda: self.features(model, x)).mean((1, 2))[:, 1:]  # [T, P] without the class
        return model.model.vision_resampler(received[..., None])[..., 0].numpy()


TOY = LlavaNextVideoToy()
