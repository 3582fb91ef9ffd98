from __future__ import annotations

from typing import Any

from torch import Tensor

from holimerge.llava_video import LlavaVideoConfig, LlavaVideoForConditionalGeneration

from .base import VIDEO
from .llava_onevision import LlavaOnevisionToy


class LlavaVideoToy(LlavaOnevisionToy):
    def model(self, attn: str, **text: Any) -> Any:
        shared = super().model(attn, **text).config.to_dict()
        config = LlavaVideoConfig(**shared | {"model_type": "llava_video", "video_newline": "grid"})
        return LlavaVideoForConditionalGeneration._from_config(config, attn_implementation=attn)

    def video_ids(self, video: Tensor) -> list[int]:
        return [VIDEO] * (video.shape[0] * 3 * 4)  # 7 x 7 patches, averaged to 3 x 3, a newline after each row


TOY = LlavaVideoToy()
