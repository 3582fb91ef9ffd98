"""LLaVA-Video: the modules of LLaVA-OneVision, frames pooled by averages, a newline after each row, frame or video.

The published checkpoints (lmms-lab/LLaVA-Video-7B-Qwen2 and its like) have no class in transformers. Here is one, on
top of `LlavaOnevisionForConditionalGeneration`; `holimerge convert-llava-video` writes their weights for it. Importing
this module registers it with the Auto classes.

Source of pooling and newlines: github.com/LLaVA-VL/LLaVA-NeXT, llava/model/llava_arch.py (`get_2dPool`,
`add_token_per_grid`, `add_token_per_frame`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionPreTrainedModel

NEWLINES = ("grid", "frame", "one_token")


class LlavaVideoConfig(LlavaOnevisionConfig):
    """A LLaVA-OneVision configuration.

    video_newline: where a newline token stands: after every row of every frame ("grid"), after every frame ("frame"),
        or after the video ("one_token").
    """

    model_type = "llava_video"
    video_newline: str = "grid"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.video_newline not in NEWLINES:
            raise ValueError(f"video_newline: {self.video_newline!r} is not valid; valid: {', '.join(NEWLINES)}")


def side_of(config: Any) -> int:
    """Tokens per side of a frame: patches averaged two by two, an odd last row and column left out (27 to 13)."""
    return int(config.vision_config.image_size // config.vision_config.patch_size // 2)


def layout_of(config: Any, frames: int) -> Tensor:
    """[M] int64: the token each placeholder of a video of so many frames stands for, -1 for a newline."""
    side = side_of(config)
    tokens = torch.arange(frames * side * side, device="cpu").view(frames, side, side)
    if config.video_newline == "grid":
        tokens = nn.functional.pad(tokens, (0, 1), value=-1)
    elif config.video_newline == "frame":
        tokens = nn.functional.pad(tokens.flatten(1), (0, 1), value=-1)
    else:
        tokens = nn.functional.pad(tokens.flatten(), (0, 1), value=-1)
    return tokens.flatten()


class LlavaVideoModel(LlavaOnevisionModel):
    """LLaVA-OneVision's core with LLaVA-Video's pooling and newlines."""

    config_class = LlavaVideoConfig

    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Features of videos [B, T, C, H, W] of one length: `pooler_output` [B, M, D], newlines included."""
        as_dict = kwargs.pop("return_dict", None)
        output = super().get_video_features(
            pixel_values_videos,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            return_dict=True,
            **kwargs,
        )
        tokens = output.pooler_output[:, :-1]  # without LLaVA-OneVision's newline
        layout = layout_of(self.config, pixel_values_videos.shape[1]).to(tokens.device)
        newline = self.image_newline.to(tokens).expand(tokens.shape[0], layout.shape[0], -1)
        output.pooler_output = torch.where((layout < 0)[:, None], newline, tokens[:, layout.clamp_min(0)])
        return output.to_tuple() if as_dict is False else output

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        """Averages of 2 x 2 patches: [F, P, C] to [F, N, C]."""
        side = round(image_features.shape[1] ** 0.5)
        maps = image_features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return nn.functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """LLaVA-Video with its language modelling head."""

    config_class = LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig) -> None:
        LlavaOnevisionPreTrainedModel.__init__(self, config)
        text: Any = config.text_config
        self.model = LlavaVideoModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(LlavaVideoConfig.model_type, LlavaVideoConfig)
AutoModelForImageTextToText.register(LlavaVideoConfig, LlavaVideoForConditionalGeneration)
