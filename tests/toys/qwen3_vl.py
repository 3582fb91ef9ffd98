"""Qwen3-VL: each step of a video stands between markers of its own, after its time; two levels of deepstack."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from .base import FPS, VIDEO, VISION_END, VISION_START, PatchToy, words


class Qwen3VLToy(PatchToy):
    real = Qwen3VLForConditionalGeneration
    tower: ClassVar[dict[str, Any]] = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
    text: ClassVar[dict[str, Any]] = {"head_dim": 8}
    sections: ClassVar[list[int] | None] = [2, 1, 1]  # interleaved: the first axis has what the others leave
    inner_layers = (2, 3)  # deepstack adds to all video tokens after layers 0 and 1

    def video_ids(self, video: Tensor) -> list[int]:
        t, h, w = self.grid(video)
        ids = [VISION_START]  # the chat template's pair stays around what the processor writes
        for step in range(t):
            first, last = step * self.temporal, (step + 1) * self.temporal - 1
            ids += words(f"<{(first + last) / 2 / FPS:.1f} seconds>")
            ids += [VISION_START, *[VIDEO] * (h * w // 4), VISION_END]
        return [*ids, VISION_END]

    def make_projector_linear(self, model: Any) -> None:
        visual = model.model.visual
        for merger in (visual.merger, *getattr(visual, "deepstack_merger_list", ())):
            merger.norm = torch.nn.Identity()
            merger.act_fn = torch.nn.Identity()


TOY = Qwen3VLToy()
