"""LLaVA-OneVision: SigLIP, a projector on every patch, bilinear pooling (27 x 27 to 14 x 14), one newline token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from holimerge.capture import first_argument
from holimerge.tokens import MergeRecord, VideoTokens

from ._frames import FrameFamily, layer_of_hidden_state, spans
from .base import Encoded, Grid, Level


def bilinear_taps(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each pooled token comes from when a square map of `size` is halved bilinearly (no aligned corners).

    Returns:
        index [M * M, 4] int64 into the size * size patches and weight [M * M, 4] float32, with M = ceil(size / 2).
    """
    pooled = math.ceil(size / 2)
    at = ((torch.arange(pooled, device=device) + 0.5) * (size / pooled) - 0.5).clamp_min(0)
    low = at.floor().long()
    high = (low + 1).clamp_max(size - 1)
    fraction = at - low
    line = torch.stack([low, high], 1)  # [M, 2]
    share = torch.stack([1 - fraction, fraction], 1)
    index = line[:, None, :, None] * size + line[None, :, None, :]
    weight = share[:, None, :, None] * share[None, :, None, :]
    return index.reshape(-1, 4), weight.reshape(-1, 4)


@dataclass
class Pooled(Level):
    """Patches [T, P, C] of `side` x `side`, pooled after the projector."""

    side: int = 0

    def merged(self, record: MergeRecord) -> Tensor:
        return merge_then_project(self.tokens, record, self.project, self.side)


class LlavaOnevision(FrameFamily):
    no_images = (
        "LLaVA-OneVision cuts images into tiles of its own; hand the frames over as a video (pixel_values_videos)"
    )

    def _side(self, core: Any) -> int:
        vision = core.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def projector(self, core: Any) -> Any:
        return core.multi_modal_projector

    def grids(self, core: Any, arguments: dict[str, Any]) -> list[Grid]:
        pixels = arguments[first_argument(arguments, "pixel_values_videos", "pixel_values")]
        side = math.ceil(self._side(core) / 2)
        return [Grid(pixels.shape[1], side, side)] * pixels.shape[0]

    def layout(self, core: Any, grid: Grid) -> Tensor:
        return torch.cat([torch.arange(grid.total), torch.tensor([-1])])

    def attention(self, core: Any, arguments: dict[str, Any]) -> Any:
        """The attention of the layer whose output is the (last) selected hidden state."""
        layer = arguments.get("vision_feature_layer")
        layer = core.config.vision_feature_layer if layer is None else layer
        layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
        tower: Any = core.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        return layer_of_hidden_state(layers, layer, "vision_feature_layer").self_attn

    def pooled_scores(self, core: Any, arguments: dict[str, Any], received: Tensor) -> Tensor:
        strategy = arguments.get("vision_feature_select_strategy") or core.config.vision_feature_select_strategy
        patches = received[:, 1:] if strategy == "default" else received
        return core.apply_pooling(patches[..., None])[..., 0]

    def encoded(self, core: Any, hidden: Tensor, grids: list[Grid], scores: Tensor | None, at: str) -> list[Encoded]:
        project: Callable[[Tensor], Tensor] = core.multi_modal_projector
        pool: Callable[[Tensor], Tensor] = core.apply_pooling

        @cache
        def after() -> Tensor:
            # the same operators on the same tensors as the stock code, for all videos at once
            return pool(project(hidden))

        shown = after() if at == "projector_output" else pool(hidden.detach())

        def one(span: slice) -> Encoded:
            tokens = VideoTokens(shown[span].detach(), None if scores is None else scores[span].detach())

            def whole() -> Tensor:
                return after()[span].flatten(0, 1)

            if at == "projector_output":
                return Encoded(tokens, [Level(whole(), lambda x: x, whole)])
            return Encoded(tokens, [Pooled(hidden[span], project, whole, self._side(core))])

        return [one(span) for span in spans(grids)]

    def assemble(self, core: Any, arguments: dict[str, Any], features: list[Tensor]) -> Tensor:
        stacked = torch.stack(features)
        if "mm_encoder_outputs" not in inspect.signature(core.forward).parameters:
            return stacked  # transformers before 5.18 appends the newline itself
        newline = core.image_newline[None, None].expand(len(features), 1, -1)
        return torch.cat([stacked, newline.to(stacked)], dim=1)


def merge_then_project(patches: Tensor, record: MergeRecord, project: Callable[[Tensor], Tensor], side: int) -> Tensor:
    """Merge a video's patches, project only the merged ones, pool them with the anchors' weights.

    A pooled token is a weighted sum of (at most) four projected patches. The tokens that one kept token holds have
    their patches merged corner by corner with the record's weights; the four merged patches are projected and summed
    with the bilinear weights of the anchor. For a token that holds only itself this is what the stock code computes.

    Args:
        patches: [T, P, C], the projector's input.
        record: of T frames of M * M tokens.
        project: the projector.
        side: patches per side, P = side * side.

    Returns:
        [K, D].
    """
    frames, count, width = patches.shape
    index, weight = bilinear_taps(side, patches.device)
    frame = torch.arange(frames, device=patches.device)[:, None] * count
    flat = patches.reshape(frames * count, width)
    corners = [record.merge(flat, (frame + index[:, c]).flatten()) for c in range(4)]
    projected = project(torch.cat(corners)[None])[0].unflatten(0, (4, record.kept))
    share = weight[record.anchor % record.per_frame].to(torch.promote_types(projected.dtype, torch.float32))
    return torch.einsum("ckd,kc->kd", projected.to(share.dtype), share).to(projected.dtype)


FAMILY = LlavaOnevision()
