"""Towers that take frames one by one as images: [..., C, H, W] in, patches [F, P, C] out, then a projector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from holimerge.attention import received_attention
from holimerge.capture import StopForward, captured, first_argument
from holimerge.encoding import Encoded, Grid, Level, Request
from holimerge.tokens import VideoTokens

from .base import Family


def _stop(value: Tensor) -> None:
    raise StopForward(value)


class FrameFamily(Family):
    """The tower runs as the stock code calls it, up to the projector's input; what follows differs by family."""

    @abstractmethod
    def projector(self, core: Any) -> Any:
        """The module whose input the tower's output is taken from."""

    @abstractmethod
    def attention(self, core: Any, arguments: dict[str, Any]) -> Any:
        """The attention of the layer that made the features: with q_proj, k_proj, head_dim and scale."""

    @abstractmethod
    def pooled_scores(self, core: Any, arguments: dict[str, Any], received: Tensor) -> Tensor:
        """[F, N] from what the layer's tokens received, [F, P] (a class token included), pooled as features are."""

    def encoded(self, core: Any, hidden: Tensor, grids: list[Grid], scores: Tensor | None, at: str) -> list[Encoded]:
        """One entry per grid, from the projector's input [F, P, C]; here its rows P are the LLM's tokens already."""
        stock = self.projector(core)

        @cache
        def projected() -> Tensor:
            return stock(hidden)

        shown = projected() if at == "projector_output" else hidden

        def one(span: slice) -> Encoded:
            def project(rows: Tensor) -> Tensor:
                return rows if at == "projector_output" else stock(rows[None])[0]

            tokens = VideoTokens(shown[span].detach(), None if scores is None else scores[span].detach())
            whole = shown[span].flatten(0, 1)
            return Encoded(tokens, [Level(whole, project, lambda: projected()[span].flatten(0, 1))])

        return [one(span) for span in spans(grids)]

    def encode(
        self, core: Any, features: Callable[..., Any], arguments: dict[str, Any], request: Request
    ) -> list[Encoded]:
        attention = self.attention(core, arguments)
        hidden, scores = [], []
        for part in self.calls(core, arguments, request.chunk):
            hooks: list[tuple[Any, str, Any]] = [(self.projector(core), "pre", _stop)]
            if request.scored:
                hooks += [(module, "out", name) for name, module in self.query_and_key(attention).items()]
            with captured(hooks) as got:
                try:
                    features(**part)
                except StopForward as stop:
                    hidden.append(stop.value)
            if request.scored:
                q, k = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in (got["q"], got["k"]))
                received = received_attention(q, k, attention.scale)
                scores.append(self.pooled_scores(core, arguments, received))
        return self.encoded(
            core,
            torch.cat(hidden),
            self.grids(core, arguments),
            torch.cat(scores) if request.scored else None,
            request.at,
        )

    def without_class(self, core: Any, arguments: dict[str, Any], received: Tensor) -> Tensor:
        """[F, P] without the class token, where the features leave it out."""
        strategy = arguments.get("vision_feature_select_strategy") or core.config.vision_feature_select_strategy
        return received[:, 1:] if strategy == "default" else received

    def query_and_key(self, attention: Any) -> dict[str, Any]:
        """The modules whose outputs are the queries "q" and keys "k", [F, P, heads d]."""
        return {"q": attention.q_proj, "k": attention.k_proj}

    def calls(self, core: Any, arguments: dict[str, Any], chunk: int | None) -> list[dict[str, Any]]:
        """The arguments of every call of the tower: all videos' frames in one, or `chunk` frames at a time.

        The tower sees single frames, so videos may share a call.
        """
        name = first_argument(arguments, "pixel_values_videos", "pixel_values")
        pixels = arguments[name]
        flat = pixels.flatten(0, 1)[None]
        step = chunk or flat.shape[1]
        return [{**arguments, name: flat[:, start : start + step]} for start in range(0, flat.shape[1], step)]


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

    def attention(self, core: Any, arguments: dict[str, Any]) -> Any:
        """The attention of the layer whose output is the (last) selected hidden state."""
        layer = arguments.get("vision_feature_layer")
        layer = core.config.vision_feature_layer if layer is None else layer
        layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
        tower: Any = core.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        return layer_of_hidden_state(layers, layer).self_attn

    def assemble(self, core: Any, arguments: dict[str, Any], features: list[Tensor]) -> Tensor:
        return torch.stack(features)


def spans(grids: list[Grid]) -> list[slice]:
    """Where each video's frames stand among all frames."""
    ends = list(accumulate((grid.frames for grid in grids), initial=0))
    return [slice(start, end) for start, end in pairwise(ends)]


def layer_of_hidden_state(layers: Any, index: int) -> Any:
    """The layer whose output is hidden state `index` (0 is the embedding, negative from the end)."""
    position = index % (len(layers) + 1) - 1
    if position < 0:
        raise ValueError(f"vision_feature_layer {index} selects the patch embedding, which has no attention")
    return layers[position]
