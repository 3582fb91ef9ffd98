"""What LLaVA's video families share: CLIP or SigLIP, features of chosen layers, one projector."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from holimerge.capture import first_argument
from holimerge.encoder.gate import row_sources
from holimerge.encoder.patch_run import Patches
from holimerge.encoder.tower import Tower
from holimerge.encoding import Grid, Request

from ._frames import FrameFamily, layer_of_hidden_state


def pixels_by_patch(frame: Tensor, patch: int) -> Tensor:
    """[N, C patch^2] of a frame [C, H, W], in raster order; a rest at the right or the bottom belongs to none."""
    rows, columns = (size // patch * patch for size in frame.shape[1:])
    grid = frame[:, :rows, :columns].unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
    return grid.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


class LlavaFamily(FrameFamily):
    """CLIP or SigLIP, features of chosen layers, `multi_modal_projector`; videos [B, T, C, H, W] of one length."""

    no_images = "images are cut into tiles of their own; hand the frames over as a video (pixel_values_videos)"

    @abstractmethod
    def side(self, core: Any) -> int:
        """Tokens per side of a frame."""

    def patches(self, core: Any) -> int:
        """Patches per side of a frame."""
        vision = core.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def projector(self, core: Any) -> Any:
        return core.multi_modal_projector

    def grids(self, core: Any, arguments: dict[str, Any]) -> list[Grid]:
        pixels = arguments[first_argument(arguments, "pixel_values_videos", "pixel_values")]
        return [Grid(pixels.shape[1], self.side(core), self.side(core))] * pixels.shape[0]

    def _layers(self, core: Any, arguments: dict[str, Any]) -> tuple[Any, list[int]]:
        """The tower's layers, and the hidden states that make the features."""
        layer = arguments.get("vision_feature_layer")
        layer = core.config.vision_feature_layer if layer is None else layer
        tower: Any = core.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        return layers, list(layer) if isinstance(layer, (list, tuple)) else [layer]

    def attention(self, core: Any, arguments: dict[str, Any]) -> Any:
        """The attention of the layer whose output is the (last) selected hidden state."""
        layers, states = self._layers(core, arguments)
        return layer_of_hidden_state(layers, states[-1]).self_attn

    def graphed(self, core: Any) -> Any:
        return core.vision_tower

    def transposed(self, core: Any, arguments: dict[str, Any]) -> Any:
        return self._layers(core, arguments)[0][0]

    def no_encoder(self, core: Any, kind: str) -> str:
        implementation = core.vision_tower.config._attn_implementation
        if kind in ("tokens", "patches") and implementation not in ("sdpa", "eager"):
            need = "sizes of merged tokens" if kind == "tokens" else "mask that keeps parts of frames apart"
            return (
                f"the tower's attention is {implementation}, which takes no {need}; load the model "
                "with attn_implementation='sdpa' or 'eager' (a dict sets it for vision_config alone)"
            )
        return ""

    def encoder_tower(self, core: Any, arguments: dict[str, Any], frames: list[int]) -> Tower:
        layers, states = self._layers(core, arguments)
        last = list(layers).index(layer_of_hidden_state(layers, states[-1]))
        tower = getattr(core.vision_tower, "vision_model", core.vision_tower)
        fixed = int(hasattr(tower.embeddings, "class_embedding"))
        rows = self.patches(core) ** 2 + fixed
        return Tower(
            blocks=layers[: last + 1],
            videos=[(t, rows) for t in frames],
            output=core.vision_tower,
            states=[state % (len(layers) + 1) for state in states],
            fixed=fixed,
            names=("layer_norm2", "mlp", "self_attn", "k_proj"),
        )

    def gated(self, core: Any, arguments: dict[str, Any], request: Request) -> tuple[dict[str, Any], Tensor | None]:
        name = first_argument(arguments, "pixel_values_videos", "pixel_values")
        pixels, patch = arguments[name], int(core.config.vision_config.patch_size)
        encoder = request.encoder
        if encoder is None or encoder.options.gate is None:
            return arguments, None

        gate = encoder.gate([(video, partial(pixels_by_patch, patch=patch)) for video in pixels])
        tower = self.encoder_tower(core, arguments, [pixels.shape[1]] * pixels.shape[0])
        encoder.count(tower, gate)
        if gate.places:
            rows = [row_sources(x, fixed=tower.fixed) for x in gate.places]
            encoder.patches = Patches(rows, request.chunk is not None)
        if gate.all:
            return arguments, None
        return {**arguments, name: pixels.flatten(0, 1)[gate.encoded(pixels.device)][None]}, gate.index(pixels.device)

    def assemble(self, core: Any, arguments: dict[str, Any], features: list[Tensor]) -> Tensor:
        return torch.stack(features)
