"""LLaVA-NeXT-Video: CLIP, pooling of the patches (24 x 24 to 12 x 12), then the projector; no newline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holimerge.capture import first_argument

from ._frames import FrameFamily, layer_of_hidden_state
from .base import Grid


class LlavaNextVideo(FrameFamily):
    no_images = "LLaVA-NeXT cuts images into tiles of its own; hand the frames over as a video (pixel_values_videos)"

    def projector(self, core: Any) -> Any:
        return core.multi_modal_projector

    def grids(self, core: Any, arguments: dict[str, Any]) -> list[Grid]:
        pixels = arguments[first_argument(arguments, "pixel_values_videos", "pixel_values")]
        side = core.config.vision_config.image_size // core.config.vision_config.patch_size
        pooled = side // core.config.spatial_pool_stride
        return [Grid(pixels.shape[1], pooled, pooled)] * pixels.shape[0]

    def attention(self, core: Any, arguments: dict[str, Any]) -> Any:
        layer = arguments.get("vision_feature_layer")
        layer = core.config.vision_feature_layer if layer is None else layer
        layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
        tower: Any = core.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        return layer_of_hidden_state(layers, layer, "vision_feature_layer").self_attn

    def pooled_scores(self, core: Any, arguments: dict[str, Any], received: Tensor) -> Tensor:
        strategy = arguments.get("vision_feature_select_strategy") or core.config.vision_feature_select_strategy
        patches = received[:, 1:] if strategy == "default" else received
        side = int(patches.shape[1] ** 0.5)
        # the mean, also where features are pooled by a maximum or a convolution
        stride = core.config.spatial_pool_stride
        return torch.nn.functional.avg_pool2d(patches.unflatten(1, (1, side, side)), stride).flatten(1)

    def assemble(self, core: Any, arguments: dict[str, Any], features: list[Tensor]) -> Tensor:
        return torch.stack(features)


FAMILY = LlavaNextVideo()
