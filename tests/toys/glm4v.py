"""GLM-4.1V: a video is a row of images between markers; its tokens have the id of an image's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Glm4vForConditionalGeneration

from .base import FPS, IMAGE, OUTER_END, OUTER_START, TEXT, VISION_END, VISION_START, PatchToy, words


class Glm4vToy(PatchToy):
    real = Glm4vForConditionalGeneration
    tower: ClassVar[dict[str, Any]] = {"image_size": 24}
    text: ClassVar[dict[str, Any]] = {"rope_parameters": {"partial_rotary_factor": 0.5}}
    config: ClassVar[dict[str, Any]] = {
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
        "video_start_token_id": OUTER_START,
        "video_end_token_id": OUTER_END,
    }
    markers = (OUTER_START, OUTER_END)
    placeholder = IMAGE
    time: ClassVar[str] = "{:.0f}"
    stock_fails: ClassVar[dict[str, str]] = {
        "image and video": "every placeholder is counted for both",
        "beams": "features are repeated by counting the video id, which no prompt has",
        "samples": "as beams",
        "embeds": "placeholders are looked for by the video id, which no prompt has",
        "chunked prefill": "features are cut by the video id, which no prompt has: chunks get none, without an error",
    }

    def model(self, attn: str, **text: Any) -> Any:
        # half as many heads of twice the width: half of it is rotated, and three axes need four frequencies
        heads = ("num_attention_heads", "num_key_value_heads")
        return super().model(attn, **{**text, **{k: {**TEXT, **text}[k] // 2 for k in heads}})

    def video_ids(self, video: Tensor) -> list[int]:
        t, h, w = self.grid(video)
        ids = [OUTER_START]
        for step in range(t):
            ids += [VISION_START, *[IMAGE] * (h * w // 4), VISION_END]
            ids += words(self.time.format(step * self.temporal / FPS))
        return [*ids, OUTER_END]

    def token_types(self, ids: Tensor) -> Tensor:
        inside = (ids == OUTER_START).cumsum(1) > (ids == OUTER_END).cumsum(1)
        return (ids == IMAGE).int() * (1 + inside.int())

    def make_projector_linear(self, model: Any) -> None:
        merger = model.model.visual.merger
        merger.post_projection_norm = torch.nn.Identity()
        merger.act1 = torch.nn.Identity()
        merger.act_fn = torch.nn.Threshold(float("inf"), 1.0)  # a gate that is always 1


TOY = Glm4vToy()
