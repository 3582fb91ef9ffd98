"""LLaVA-OneVision: SigLIP, a projector on every patch, bilinear pooling (27 x 27 to 14 x 14), one newline token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from holimerge.attention import received_attention
from holimerge.capture import StopForward, captured, first_argument
from holimerge.tokens import MergeRecord, VideoTokens

from .base import Encoded, Family


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


class LlavaOnevision(Family):
    separators = 1

    def _side(self, core: Any) -> int:
        vision = core.config.vision_config
        return vision.image_size // vision.patch_size

    def grids(self, core: Any, arguments: dict[str, Any]) -> list[tuple[int, int, int]]:
        pixels = arguments[first_argument(arguments, "pixel_values_videos", "pixel_values")]
        side = math.ceil(self._side(core) / 2)
        return [(pixels.shape[1], side, side)] * pixels.shape[0]

    def encode(
        self,
        core: Any,
        features: Callable[..., Any],
        arguments: dict[str, Any],
        *,
        at: str,
        scored: bool,
        chunk: int | None,
    ) -> list[Encoded]:
        name = first_argument(arguments, "pixel_values_videos", "pixel_values")
        pixels = arguments[name]
        videos, frames = pixels.shape[:2]
        attention = self._probed_attention(core, arguments)
        strips_class = (
            arguments.get("vision_feature_select_strategy") or core.config.vision_feature_select_strategy
        ) == "default"
        patches, scores = [], []
        flat = pixels.flatten(0, 1)[None]  # the tower sees single frames: videos may share a call
        for start in range(0, videos * frames, chunk or videos * frames):
            part = flat[:, start : start + (chunk or videos * frames)]
            hooks: list[tuple[Any, str, Any]] = [(core.multi_modal_projector, "pre", _stop)]
            if scored:
                hooks += [(attention.q_proj, "out", "q"), (attention.k_proj, "out", "k")]
            with captured(hooks) as got:
                try:
                    features(**{**arguments, name: part})
                except StopForward as stop:
                    patches.append(stop.value)
            if scored:
                heads = [got[x].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in "qk"]
                received = received_attention(heads[0], heads[1], attention.scale)
                scores.append(received[:, 1:] if strips_class else received)
        hidden = torch.cat(patches)
        pooled_scores = core.apply_pooling(torch.cat(scores)[..., None])[..., 0] if scored else None
        project: Callable[[Tensor], Tensor] = core.multi_modal_projector
        pool: Callable[[Tensor], Tensor] = core.apply_pooling
        # the same operators on the same tensors as the stock code, for all videos at once
        after = pool(project(hidden)) if at == "projector_output" else None
        shown = pool(hidden.detach()) if after is None else after
        side = self._side(core)

        @cache
        def all_tokens() -> Tensor:
            return pool(project(hidden)) if after is None else after

        def one(video: int) -> Encoded:
            span = slice(video * frames, (video + 1) * frames)
            decision = VideoTokens(
                shown[span].detach(), pooled_scores[span].detach() if pooled_scores is not None else None
            )

            def merged(record: MergeRecord) -> Tensor:
                if after is not None:
                    return record.merge(after[span].flatten(0, 1))
                return merge_then_project(hidden[span], record, project, side)

            return Encoded(decision, lambda: all_tokens()[span].flatten(0, 1), merged)

        return [one(video) for video in range(videos)]

    def _probed_attention(self, core: Any, arguments: dict[str, Any]) -> Any:
        """The attention of the layer whose output is the (last) selected hidden state."""
        layer = arguments.get("vision_feature_layer")
        layer = core.config.vision_feature_layer if layer is None else layer
        layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
        tower: Any = core.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        index = layer % (len(layers) + 1) - 1  # hidden state 0 is the embedding
        if index < 0:
            raise ValueError(f"vision_feature_layer {layer} selects the patch embedding, which has no attention")
        return layers[index].self_attn

    def assemble(self, core: Any, features: list[Tensor]) -> Tensor:
        stacked = torch.stack(features)
        if "mm_encoder_outputs" not in inspect.signature(core.forward).parameters:
            return stacked  # transformers before 5.18 appends the newline itself
        newline = core.image_newline[None, None].expand(len(features), 1, -1)
        return torch.cat([stacked, newline.to(stacked)], dim=1)


def _stop(value: Tensor) -> None:
    raise StopForward(value)


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
