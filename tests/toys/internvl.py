from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from .base import HERE, IMAGE, TEXT, VISION_END, VISION_START, FrameToy, eager_weights

FRAME, NEW_LINE = 60, 59


class InternVLToy(FrameToy):
    stock_fails: ClassVar[dict[str, str]] = (
        {"beams": "frames are repeated one by one, not row by row, without an error", "samples": "as beams"}
        if Version("5.19") > HERE
        else {}
    )

    def model(self, attn: str, **text: Any) -> Any:
        vision = {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "use_qk_norm": True,  # as the large towers; where there is none, it is the identity
            "norm_type": "rms_norm",
        }  # a class token and 8 x 8 patches, of which 2 x 2 make one token
        config = InternVLConfig(
            vision_config=vision,
            text_config={"model_type": "qwen2", **TEXT, **text},
            image_token_id=IMAGE,
            image_seq_length=self.per_frame,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
        return InternVLForConditionalGeneration._from_config(config, attn_implementation=attn)

    def video_ids(self, video: Tensor) -> list[int]:
        ids: list[int] = []
        for number in range(video.shape[0]):  # "Frame1: <img>...</img>\nFrame2: ..."
            ids += [NEW_LINE] * (number > 0) + [FRAME, FRAME + 1 + number % 20]
            ids += [VISION_START, *[IMAGE] * self.per_frame, VISION_END]
        return ids

    def image_ids(self, image: Tensor) -> list[int]:
        # two tiles and the whole picture, in one run
        return [VISION_START, *[IMAGE] * (3 * self.per_frame), VISION_END]

    def begins_an_image(self, ids: list[int], start: int, length: int) -> bool:
        return length > self.per_frame

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        pictures = [picture for row in self.pictures(ids, videos, images) for picture in row]
        return {"pixel_values": torch.stack(pictures).to(dtype)} if pictures else {}

    def modules(self, model: Any) -> dict[str, Any]:
        return {"vision": model.model.vision_tower, "projector": model.model.multi_modal_projector}

    def make_projector_linear(self, model: Any) -> None:
        projector = model.model.multi_modal_projector
        projector.layer_norm = projector.act = torch.nn.Identity()

    def features(self, model: Any, x: dict[str, Tensor]) -> list[Tensor]:
        return [model.get_image_features(x["pixel_values"]).pooler_output.flatten(0, 1)]

    def received(self, model: Any, x: dict[str, Tensor]) -> np.ndarray:
        layer = model.model.vision_tower.encoder.layer[-1].attention
        received = eager_weights(layer, lambda: self.features(model, x)).mean((1, 2))[:, 1:]  # [T, P] without the class
        grid = received.unflatten(1, (8, 8))[..., None]
        return model.model.pixel_shuffle(grid, 0.5).mean(-1).flatten(1).numpy()


TOY = InternVLToy()
