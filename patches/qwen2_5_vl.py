"""Qwen2.5-VL: a ViT with windowed attention, a merger that joins 2 x 2 patches, 3-D rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from holimerge.attention import received_attention, rotate
from holimerge.capture import captured
from holimerge.tokens import MergeRecord, VideoTokens

from .base import Encoded, Family


class Qwen25VL(Family):
    mrope = True

    def grids(self, core: Any, arguments: dict[str, Any]) -> list[tuple[int, int, int]]:
        merge = core.visual.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in arguments["video_grid_thw"].tolist()]

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
        visual: Any = core.visual
        unit = visual.spatial_merge_size**2
        grid = arguments["video_grid_thw"].tolist()
        parts: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in grid]
        for videos, call in self._calls(arguments, grid, chunk):
            for video, part in zip(videos, self._encode_once(visual, features, call, at, scored, unit), strict=True):
                parts[video].append(part)

        def one(video: int) -> Encoded:
            frames, rows, columns = grid[video]
            per_frame = rows * columns // unit
            tokens = torch.cat([t for t, _ in parts[video]])  # [T N, unit * C] or [T N, D]
            received = [s for _, s in parts[video] if s is not None]
            scores = torch.cat(received).view(frames, per_frame) if scored else None
            decision = VideoTokens(tokens.detach().reshape(frames, per_frame, -1), scores)

            def project(x: Tensor) -> Tensor:
                return visual.merger(x.reshape(x.shape[0] * unit, -1)) if at == "projector_input" else x

            def merged(record: MergeRecord) -> Tensor:
                return project(record.merge(tokens))

            return Encoded(decision, lambda: project(tokens), merged)

        return [one(video) for video in range(len(grid))]

    def _calls(
        self, arguments: dict[str, Any], grid: list[list[int]], chunk: int | None
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """The stock call, or one call per `chunk` frames of each video (attention never leaves a frame)."""
        if chunk is None:
            return [(list(range(len(grid))), arguments)]
        calls = []
        start = 0
        for video, (frames, rows, columns) in enumerate(grid):
            for first in range(0, frames, chunk):
                count = min(chunk, frames - first)
                span = slice(start + first * rows * columns, start + (first + count) * rows * columns)
                piece = {
                    **arguments,
                    "pixel_values_videos": arguments["pixel_values_videos"][span],
                    "video_grid_thw": arguments["video_grid_thw"].new_tensor([[count, rows, columns]]),
                }
                calls.append(([video], piece))
            start += frames * rows * columns
        return calls

    def _encode_once(
        self, visual: Any, features: Callable[..., Any], arguments: dict[str, Any], at: str, scored: bool, unit: int
    ) -> list[tuple[Tensor, Tensor | None]]:
        attention = visual.blocks[-1].attn
        state: dict[str, Tensor] = {}

        def remember(hidden: Tensor) -> Tensor:
            # The tower undoes its window order on the merger's output. Fed row numbers instead of features, it tells
            # the order; the merger itself is skipped by showing it a single token.
            state["hidden"] = hidden
            return hidden[:unit] if at == "projector_input" else hidden

        def number(output: Tensor) -> Tensor:
            count = state["hidden"].shape[0] // unit
            rows = torch.arange(count, device=output.device)[:, None]
            if at == "projector_input":
                return rows
            state["output"] = output
            return rows

        hooks: list[tuple[Any, str, Any]] = [
            (visual.merger, "swap", remember),
            (visual.merger, "replace", number),
        ]
        if scored:
            hooks += [(attention.qkv, "out", "qkv"), (attention, "in", "call")]
        with captured(hooks) as got:
            orders = [rows.squeeze(1) for rows in features(**{**arguments, "return_dict": True}).pooler_output]
        source = state["output"] if at == "projector_output" else state["hidden"].unflatten(0, (-1, unit)).flatten(1)
        received = None
        if scored:
            received = self._received(attention, got["qkv"], got["call"]).unflatten(0, (-1, unit)).mean(1)
        return [(source[order], None if received is None else received[order]) for order in orders]

    def _received(self, attention: Any, qkv: Tensor, call: dict[str, Any]) -> Tensor:
        """[S] float32, attention each patch received inside its attention span, in the tower's own order."""
        q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        cos, sin = (x[:, None].float() for x in call["position_embeddings"])
        q, k = (rotate(x.float(), cos, sin).to(x.dtype) for x in (q, k))
        ends = call["cu_seqlens"].tolist()
        lengths = [b - a for a, b in pairwise(ends)]
        parts, start, i = [], 0, 0
        while i < len(lengths):  # runs of equal spans go together; the last block's spans are whole frames
            j = i
            while j < len(lengths) and lengths[j] == lengths[i]:
                j += 1
            stop = start + (j - i) * lengths[i]
            spans = [x[start:stop].unflatten(0, (j - i, lengths[i])).transpose(1, 2) for x in (q, k)]
            parts.append(received_attention(spans[0], spans[1], attention.scaling).flatten())
            start, i = stop, j
        return torch.cat(parts)

    def assemble(self, core: Any, features: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(features)

    def _rotated(self, projected: Tensor, attention: Any, cos: Tensor, sin: Tensor) -> Tensor:
        if cos.ndim > projected.ndim:  # transformers 5.16 hands three axes to every layer; later versions join them
            sections = attention.rope_parameters["mrope_section"] * 2
            cos, sin = (
                torch.cat([m[i % 3] for i, m in enumerate(x.split(sections, dim=-1))], dim=-1) for x in (cos, sin)
            )
        return super()._rotated(projected, attention, cos, sin)


FAMILY = Qwen25VL()
