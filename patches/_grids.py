"""Towers that take flat patches and grids (t, h, w), and merge windows of patches into tokens: the Qwen-VL line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holimerge.capture import captured, first_argument
from holimerge.encoder.tower import Tower
from holimerge.encoding import Encoded, Grid, Level, Request
from holimerge.shapes import window_rows
from holimerge.spans import Spans
from holimerge.tokens import VideoTokens

from ._grid_attention import projections, received_by_patch
from ._grid_gate import frames_of, gated, grid_of
from ._grid_spans import BatchedAttention
from .base import Family


class GridFamily(Family):
    """A tower called with `grid_thw`; `blocks` of attention with rotary positions, each over its own frame."""

    mrope = True

    def tower(self, core: Any) -> Any:
        """The vision tower."""
        return core.visual

    def mergers(self, core: Any) -> list[Any]:
        """The modules that make the LLM's tokens: of what it reads, then of each deepstack level."""
        return [self.tower(core).merger]

    def unit(self, core: Any) -> int:
        """Rows of a merger's input that become one token."""
        return int(self.tower(core).spatial_merge_size) ** 2

    def merge_sizes(self, core: Any, arguments: dict[str, Any]) -> list[int]:
        """Patches per side of a token, for each video."""
        return [int(self.tower(core).spatial_merge_size)] * len(grid_of(arguments)[1])

    def pooled_scores(self, core: Any, received: Tensor, sizes: list[int], grids: Tensor) -> Tensor:
        """[T N]: a value per token from one per patch [S], in the tower's own order."""
        return received.unflatten(0, (-1, sizes[0] ** 2)).mean(1)

    def grids(self, core: Any, arguments: dict[str, Any]) -> list[Grid]:
        sizes = self.merge_sizes(core, arguments)
        return [Grid(t, h // m, w // m) for (t, h, w), m in zip(grid_of(arguments)[1].tolist(), sizes, strict=True)]

    def encode(
        self, core: Any, features: Callable[..., Any], arguments: dict[str, Any], request: Request
    ) -> list[Encoded]:
        grids = self.grids(core, arguments)
        arguments, sources = gated(self, core, arguments, request)
        parts: list[list[tuple[list[Tensor], Tensor | None]]] = [[] for _ in grids]
        for videos, call in self._calls(arguments, request.chunk):
            for video, part in zip(videos, self._encode_once(core, features, call, request), strict=True):
                parts[video].append(part)
        mergers, unit = self.mergers(core), self.unit(core)

        def level(x: Tensor, merger: Any) -> Level:
            def project(rows: Tensor) -> Tensor:
                return rows if request.at == "projector_output" else merger(rows.reshape(rows.shape[0] * unit, -1))

            return Level(x, project, lambda: project(x))

        def one(video: int) -> Encoded:
            grid = grids[video]
            shape = (grid.frames, grid.rows * grid.columns)
            levels = [torch.cat(pieces) for pieces in zip(*(levels for levels, _ in parts[video]), strict=True)]
            received = [scores for _, scores in parts[video] if scores is not None]
            scores = torch.cat(received) if request.scored else None
            if sources is not None:
                levels = [frames_of(x, sources[video]) for x in levels]
                scores = None if scores is None else frames_of(scores, sources[video])
            scores = None if scores is None else scores.view(shape)
            tokens = VideoTokens(levels[0].detach().reshape(*shape, -1), scores)
            return Encoded(tokens, [level(x, merger) for x, merger in zip(levels, mergers, strict=True)])

        return [one(video) for video in range(len(grids))]

    def no_encoder(self, core: Any, kind: str) -> str:
        return ""

    def encoder_tower(self, core: Any, arguments: dict[str, Any], frames: list[int]) -> Tower:
        tower = self.tower(core)
        grid = grid_of(arguments)[1].tolist() if arguments else []
        edge = 0
        if getattr(tower, "fullatt_block_indexes", None) is not None:
            merge = int(tower.spatial_merge_size)
            edge = int(tower.window_size) // merge // int(tower.patch_size) * merge
        frames = [h * w for t, h, w in grid for _ in range(t)]
        windows = [rows for t, h, w in grid for rows in window_rows((h, w), edge) * t] if edge else []
        return Tower(
            blocks=tower.blocks,
            videos=[(t, h * w) for t, h, w in grid],
            readers=self.mergers(core)[1:],
            windows=windows,
            unit=int(tower.spatial_merge_size) ** 2,
            spans=Spans([frames, windows]),
        )

    def _calls(self, arguments: dict[str, Any], chunk: int | None) -> list[tuple[list[int], dict[str, Any]]]:
        """The stock call, or one call per `chunk` frames of each video (attention never leaves a frame)."""
        name, grid = grid_of(arguments)
        if chunk is None:
            return [(list(range(len(grid))), arguments)]
        pixels = first_argument(arguments, "pixel_values_videos", "pixel_values")
        # what is given once per video goes with it (merge sizes)
        single = [k for k, v in arguments.items() if isinstance(v, Tensor) and k not in (name, pixels)]
        calls = []
        start = 0
        for video, (frames, rows, columns) in enumerate(grid.tolist()):
            for first in range(0, frames, chunk):
                count = min(chunk, frames - first)
                span = slice(start + first * rows * columns, start + (first + count) * rows * columns)
                piece = {
                    **arguments,
                    **{k: arguments[k][video : video + 1] for k in single},
                    pixels: arguments[pixels][span],
                    name: grid.new_tensor([[count, rows, columns]]),
                }
                calls.append(([video], piece))
            start += frames * rows * columns
        return calls

    def _encode_once(
        self, core: Any, features: Callable[..., Any], arguments: dict[str, Any], request: Request
    ) -> list[tuple[list[Tensor], Tensor | None]]:
        """Per video, every level's tokens [T N, C] and the scores [T N], in raster order."""
        unit, mergers, tower = self.unit(core), self.mergers(core), self.encoder_tower(core, arguments, [])
        attention = tower.attentions[-1]  # its spans are whole frames
        seen: list[Tensor] = []  # per level: the merger's input in tokens, or its output

        def remember(hidden: Tensor) -> Tensor:
            # A tower may undo a window order of its own on the merger's output. Fed row numbers instead of features, it
            # tells the order; the merger itself is skipped by showing it a single token.
            seen.append(hidden.unflatten(0, (-1, unit)).flatten(1))
            return hidden[:unit] if request.at == "projector_input" else hidden

        def number(output: Tensor) -> Tensor:
            rows = torch.arange(seen[-1].shape[0], device=output.device)[:, None]
            if request.at == "projector_output":
                seen[-1] = output
            return rows

        run = None if request.encoder is None else request.encoder.run(tower)
        batched = BatchedAttention(tower, request.attention)
        hooks: list[tuple[Any, str, Any]] = batched.hooks() if run is None else [*run.hooks(), *batched.hooks()]
        for merger in mergers:
            hooks += [(merger, "swap", remember), (merger, "replace", number)]
        if request.scored:
            hooks += [(attention, "in", "call")]
            hooks += [(module, "out", name) for name, module in projections(attention).items()]
        with batched.named(), captured(hooks) as got:
            orders = [rows.squeeze(1) for rows in features(**{**arguments, "return_dict": True}).pooler_output]
        # deepstack mergers run before the last one
        levels = [seen[-1], *seen[:-1]]
        received = None
        if request.scored:
            received = received_by_patch(attention, got, tower.spans, None if run is None else run.query_weight())
            received = received if run is None else run.spread(received)
            received = self.pooled_scores(core, received, self.merge_sizes(core, arguments), grid_of(arguments)[1])
        return [([x[order] for x in levels], None if received is None else received[order]) for order in orders]
