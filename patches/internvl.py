"""InternVL: frames are images, 2 x 2 patches are shuffled into one token, then the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holimerge.encoding import Grid

from ._frames import FrameFamily, layer_of_hidden_state


class InternVL(FrameFamily):
    video_input = False
    framed = True

    def projector(self, core: Any) -> Any:
        return core.multi_modal_projector

    def grids(self, core: Any, arguments: dict[str, Any]) -> list[Grid]:
        vision = core.config.vision_config
        rows, columns = (
            int(size // patch * core.config.downsample_ratio)
            for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return [Grid(1, rows, columns)] * arguments["pixel_values"].shape[0]

    def calls(self, core: Any, arguments: dict[str, Any], chunk: int | None) -> list[dict[str, Any]]:
        parts = arguments["pixel_values"].split(chunk or arguments["pixel_values"].shape[0])
        return [{**arguments, "pixel_values": part} for part in parts]

    def attention(self, core: Any, arguments: dict[str, Any]) -> Any:
        layer = arguments.get("vision_feature_layer")
        layer = core.config.vision_feature_layer if layer is None else layer
        return layer_of_hidden_state(core.vision_tower.encoder.layer, layer).attention

    def query_and_key(self, attention: Any) -> dict[str, Any]:
        return {"q": attention.q_norm, "k": attention.k_norm}

    def pooled_scores(self, core: Any, arguments: dict[str, Any], received: Tensor) -> Tensor:
        patches = self.without_class(core, arguments, received)
        side = int(patches.shape[1] ** 0.5)
        shuffled = core.pixel_shuffle(patches.unflatten(1, (side, side))[..., None], core.config.downsample_ratio)
        return shuffled.flatten(1, 2).mean(-1)

    def assemble(self, core: Any, arguments: dict[str, Any], features: list[Tensor]) -> Tensor:
        return torch.stack(features)


FAMILY = InternVL()
