"""Towers that take frames one by one as images: [..., C, H, W] in, patches [F, P, C] out, then a projector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from holimerge.attention import received_attention
from holimerge.capture import StopForward, captured, first_argument
from holimerge.encoder.tower import EncoderReport, Tower
from holimerge.encoding import Encoded, Grid, Level, Request
from holimerge.tokens import VideoTokens

from .base import Family

_CHOICES = ("layer", "select_strategy")  # of features, where the call leaves them to the model's config


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

    def transposed(self, core: Any, arguments: dict[str, Any]) -> Any:
        """The tower's first block, where the patch embedding hands it a transposed tensor; None where it does not.

        Sums keep that order of memory, so that every block would work across it.
        """
        return None

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
        grids = self.grids(core, arguments)
        arguments, source = self.gated(core, arguments, request)
        hidden, scores = [], []
        call = partial(self._call, core, features, grids, request)
        also = (tuple(grids), *(repr(getattr(core.config, f"vision_feature_{of}", None)) for of in _CHOICES))
        for part in self.calls(core, arguments, request.chunk):
            (x, received), report = call(part) if request.graphs is None else request.graphs.run(call, part, also)
            assert x is not None
            hidden.append(x)
            if received is not None:
                scores.append(received)
            if report is not None and request.encoder is not None and report.rows:
                request.encoder.report.add(report.total, report.rows, report.frames, report.pairs)
        whole, scored = torch.cat(hidden), torch.cat(scores) if request.scored else None
        if source is not None:
            whole, scored = whole[source], None if scored is None else scored[source]
        return self.encoded(core, whole, grids, scored, request.at)

    def _call(
        self, core: Any, features: Callable[..., Any], grids: list[Grid], request: Request, part: Mapping[str, Any]
    ) -> tuple[list[Tensor | None], EncoderReport | None]:
        """One call of the tower: the projector's input [F, P, C] and the scores [F, N] (None if not asked for); and
        what its blocks worked on, if they reduce. Nothing here waits for the device where the tower does not."""
        attention = self.attention(core, dict(part))
        stage = None if request.encoder is None else request.encoder.of_call()
        run = None if stage is None else stage.run(self._tower_of(core, dict(part), grids))
        hooks: list[tuple[Any, str, Any]] = [] if run is None else run.hooks()
        block = self.transposed(core, dict(part))
        if block is not None:
            hooks.append((block, "swap", Tensor.contiguous))
        hooks.append((self.projector(core), "pre", _stop))
        if request.scored:
            hooks += [(module, "out", name) for name, module in self.query_and_key(attention).items()]
        hidden = None
        with captured(hooks) as got:
            try:
                features(**part)
            except StopForward as stop:
                hidden = stop.value
        scores = None
        if request.scored:
            q, k = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in (got["q"], got["k"]))
            if run is None:
                received = received_attention(q, k, attention.scale)
            else:
                bias, weight = run.bias(torch.float32), run.query_weight()
                received = run.spread(received_attention(q, k, attention.scale, bias=bias, weight=weight))
            scores = self.pooled_scores(core, dict(part), received)
        return [hidden, scores], None if stage is None else stage.report

    def gated(self, core: Any, arguments: dict[str, Any], request: Request) -> tuple[dict[str, Any], Tensor | None]:
        """The arguments without frames that need not be encoded, and the encoded frame [F] each frame is taken from."""
        return arguments, None

    def _tower_of(self, core: Any, part: dict[str, Any], grids: list[Grid]) -> Tower:
        """The tower for one call; where a call holds only some of the frames, they count as one video."""
        here = part[first_argument(part, "pixel_values_videos", "pixel_values")].shape[1]
        frames = [grid.frames for grid in grids]
        return self.encoder_tower(core, part, frames if sum(frames) == here else [here])

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
