"""SmolVLM: frames are images, patches are shuffled into one token in the connector, images of zeros are padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holimerge.encoding import Grid

from ._frames import FrameFamily


class SmolVLM(FrameFamily):
    since = "5.21"  # before, features had to be one tensor for all rows
    video_input = False
    framed = True

    def language_model(self, model: Any) -> Any:
        return model.model.text_model

    def projector(self, core: Any) -> Any:
        return core.connector.modality_projection

    def _real(self, arguments: dict[str, Any]) -> Tensor:
        """[B, n] bool: images that are not padding, by the stock rule."""
        real = (arguments["pixel_values"] != 0).flatten(2).any(-1)
        real[:1, :1] |= ~real.any()
        return real

    def grids(self, core: Any, arguments: dict[str, Any]) -> list[Grid]:
        side = core.config.vision_config.image_size // core.config.vision_config.patch_size // core.config.scale_factor
        return [Grid(1, side, side)] * int(self._real(arguments).sum())

    def calls(self, core: Any, arguments: dict[str, Any], chunk: int | None) -> list[dict[str, Any]]:
        if chunk is None:
            return [arguments]
        real = self._real(arguments).flatten()
        calls: list[dict[str, Any]] = []
        given = {k: arguments.get(k) for k in ("pixel_values", "pixel_attention_mask")}
        images = {k: x.flatten(0, 1)[real] for k, x in given.items() if x is not None}
        for start in range(0, int(real.sum()), chunk):
            calls.append({**arguments, **{k: x[None, start : start + chunk] for k, x in images.items()}})
        return calls

    def attention(self, core: Any, arguments: dict[str, Any]) -> Any:
        return core.vision_model.encoder.layers[-1].self_attn

    def transposed(self, core: Any, arguments: dict[str, Any]) -> Any:
        return core.vision_model.encoder.layers[0]

    def pooled_scores(self, core: Any, arguments: dict[str, Any], received: Tensor) -> Tensor:
        return core.connector.pixel_shuffle(received[..., None], core.connector.scale_factor).mean(-1)

    def assemble(self, core: Any, arguments: dict[str, Any], features: list[Tensor]) -> list[Tensor]:
        counts = self._real(arguments).sum(1).tolist()
        grouped = torch.stack(features).split(counts)
        return [part.flatten(0, 1) for part in grouped]


FAMILY = SmolVLM()
