"""VideoLLaMA3: SigLIP with rotary positions, bilinear pooling by a merge size of each video, then the projector.

Its own token compression drops placeholders by pixel differences before any feature exists; here every token has one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from holimerge.capture import first_argument
from holimerge.encoder.tower import Tower
from holimerge.spans import Spans
from holimerge.tokens import upload

from ._grids import GridFamily


class VideoLlama3(GridFamily):
    mrope = False
    framed = True

    def tower(self, core: Any) -> Any:
        return core.vision_model

    def mergers(self, core: Any) -> list[Any]:
        return [core.projector]

    def no_encoder(self, core: Any, kind: str) -> str:
        if kind == "tokens":
            return "queries and keys of this tower come from layers of their own; use frames or gate"
        return ""

    def encoder_tower(self, core: Any, arguments: dict[str, Any], frames: list[int]) -> Tower:
        grid = arguments[first_argument(arguments, "video_grid_thw", "image_grid_thw")].tolist() if arguments else []
        layers, names = core.vision_model.encoder.layers, ("layer_norm2", "mlp", "self_attn", "k_proj")
        spans = Spans([[h * w for t, h, w in grid for _ in range(t)]])
        return Tower(blocks=layers, videos=[(t, h * w) for t, h, w in grid], names=names, spans=spans)

    def unit(self, core: Any) -> int:
        return 1  # pooled before the projector

    def merge_sizes(self, core: Any, arguments: dict[str, Any]) -> list[int]:
        sizes: list[int] = arguments[first_argument(arguments, "video_merge_sizes", "image_merge_sizes")].tolist()
        return sizes

    def pooled_scores(self, core: Any, received: Tensor, sizes: list[int], grids: Tensor) -> Tensor:
        merge = upload(sizes, grids.device)
        return core.vision_model.pixel_unshuffle(received[:, None], grids, merge)[:, 0]

    def check(self, arguments: dict[str, Any], *, contiguous: bool) -> None:
        kept = arguments.get("video_compression_mask")
        if kept is not None and not bool(kept.all()):
            raise ValueError(
                "video_compression_mask: the processor has dropped video tokens already, so the frames are no full "
                "grids; call the processor with use_token_compression=False"
            )


FAMILY = VideoLlama3()
