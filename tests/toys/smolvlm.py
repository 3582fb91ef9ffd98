from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from .base import IMAGE, TEXT, VISION_END, VISION_START, FrameToy, eager_weights

AROUND_IMAGE, GLOBAL_IMAGE = VISION_START, VISION_END
FRAME, NEW_LINE, INTRO, FIRST_TILE = 60, 59, 58, 81


class SmolVLMToy(FrameToy):
    images_are_frames = True  # each of an image's tiles is a run as long as a frame's

    def model(self, attn: str, **text: Any) -> Any:
        vision = {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        }  # 8 x 8 patches, of which 2 x 2 make one token
        config = SmolVLMConfig(
            vision_config=vision,
            text_config={"model_type": "llama", **TEXT, **text},
            image_token_id=IMAGE,
            scale_factor=2,
            tie_word_embeddings=False,
        )
        return SmolVLMForConditionalGeneration._from_config(config, attn_implementation=attn)

    def _picture(self, marker: int) -> list[int]:
        return [AROUND_IMAGE, marker, *[IMAGE] * self.per_frame]

    def video_ids(self, video: Tensor) -> list[int]:
        ids = [INTRO]  # "You are provided the following series of six frames", then "Frame from 00:01:<picture>"
        for second in range(video.shape[0]):
            ids += [NEW_LINE, FRAME, FRAME + 1 + second % 20, *self._picture(GLOBAL_IMAGE), AROUND_IMAGE]
        return [*ids, NEW_LINE]

    def image_ids(self, image: Tensor) -> list[int]:
        # one row of two tiles, then the whole picture
        tiles = self._picture(FIRST_TILE) + self._picture(FIRST_TILE + 1)
        return [*tiles, NEW_LINE, *self._picture(GLOBAL_IMAGE), AROUND_IMAGE]

    def begins_an_image(self, ids: list[int], start: int, length: int) -> bool:
        return ids[start - 1] == FIRST_TILE

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        rows = self.pictures(ids, videos, images)
        most = max(map(len, rows))
        if most == 0:
            return {}
        pixels = torch.zeros(len(rows), most, 3, 32, 32)  # a row with fewer pictures ends with pictures of zeros
        for row, pictures in zip(pixels, rows, strict=True):
            for place, picture in zip(row, pictures, strict=False):
                place.copy_(picture)
        counts = torch.tensor([len(pictures) for pictures in rows])
        real = torch.arange(most) < counts[:, None]
        return {
            "pixel_values": pixels.to(dtype),
            "pixel_attention_mask": real[..., None, None].expand(-1, -1, 32, 32).long(),
        }

    def modules(self, model: Any) -> dict[str, Any]:
        # the connector first joins 2 x 2 patches, which is not yet projecting
        return {"vision": model.model.vision_model, "projector": model.model.connector.modality_projection}

    def make_projector_linear(self, model: Any) -> None:
        """It is linear."""

    def language_model(self, model: Any) -> Any:
        return model.model.text_model

    def features(self, model: Any, x: dict[str, Tensor]) -> list[Tensor]:
        return [model.get_image_features(x["pixel_values"], x["pixel_attention_mask"]).pooler_output[0]]

    def received(self, model: Any, x: dict[str, Tensor]) -> np.ndarray:
        layer = model.model.vision_model.encoder.layers[-1].self_attn
        received = eager_weights(layer, lambda: self.features(model, x)).mean((1, 2))  # [T, P]
        return model.model.connector.pixel_shuffle(received[..., None], 2).mean(-1).numpy()


TOY = SmolVLMToy()
