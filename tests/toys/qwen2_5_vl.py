from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from .base import PatchToy


class Qwen25VLToy(PatchToy):
    real = Qwen2_5_VLForConditionalGeneration
    tower: ClassVar[dict[str, Any]] = {"window_size": 16, "fullatt_block_indexes": [2], "tokens_per_second": 2}

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        inputs = super().tensors(ids, videos, images, dtype)
        if videos:
            inputs["second_per_grid_ts"] = torch.tensor([1.0] * len(videos))
        return inputs


TOY = Qwen25VLToy()
