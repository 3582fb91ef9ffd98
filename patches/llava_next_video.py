"""LLaVA-NeXT-Video: CLIP, pooling of the patches (24 x 24 to 12 x 12), then the projector; no newline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._llava import LlavaFamily


class LlavaNextVideo(LlavaFamily):
    def side(self, core: Any) -> int:
        return self.patches(core) // int(core.config.spatial_pool_stride)

    def pooled_scores(self, core: Any, arguments: dict[str, Any], received: Tensor) -> Tensor:
        patches = self.without_class(core, arguments, received).unflatten(1, (1, self.patches(core), -1))
        # the mean, also where features are pooled by a maximum or a convolution
        return torch.nn.functional.avg_pool2d(patches, core.config.spatial_pool_stride).flatten(1)


FAMILY = LlavaNextVideo()
