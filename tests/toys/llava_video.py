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

    def features(self, model: Any, x: dict[str, Tensor]) -> list[Tensor]:
        rows = model.get_video_features(x["pixel_values_videos"]).pooler_output[0].unflatten(0, (-1, 4))
        return [rows[:, :3].flatten(0, 1)]

    not_by_hand = "a newline after each row of a frame stays or goes with its tokens; see test_llava_video"


TOY = LlavaVideoToy()
