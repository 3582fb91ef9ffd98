"""What need not be encoded of videos in flat patches and grids: whole frames, or the patches of single tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from holimerge.capture import first_argument
from holimerge.encoder.gate import Places, row_sources
from holimerge.encoder.patch_run import Patches
from holimerge.encoding import Request
from holimerge.tokens import upload

if TYPE_CHECKING:
    from ._grids import GridFamily


def gated(
    family: GridFamily, core: Any, arguments: dict[str, Any], request: Request
) -> tuple[dict[str, Any], list[list[int]] | None]:
    """The arguments without frames that need not be encoded, and per video the encoded frame of every frame."""
    encoder = request.encoder
    if encoder is None or encoder.options.gate is None:
        return arguments, None
    name, grid = grid_of(arguments)
    pixels = first_argument(arguments, "pixel_values_videos", "pixel_values")
    tower = family.encoder_tower(core, arguments, [])
    videos = [
        part.unflatten(0, (t, -1))
        for part, (t, _) in zip(arguments[pixels].split([t * p for t, p in tower.videos]), tower.videos, strict=True)
    ]
    by_patch = encoder.options.gate.unit == "patch"
    units = [m**2 if by_patch else 1 for m in family.merge_sizes(core, arguments)]

    def joined(unit: int) -> Places:
        return lambda frame: frame.reshape(-1, unit * frame.shape[-1])

    gate = encoder.gate([(video, joined(unit)) for video, unit in zip(videos, units, strict=True)])
    encoder.count(tower, gate)
    if gate.places:
        orders = [_place_order(family.tower(core), h, w) for _, h, w in grid.tolist()]
        rows = [row_sources(x, unit, 0, o) for x, unit, o in zip(gate.places, units, orders, strict=True)]
        encoder.patches = Patches(rows, request.chunk is not None)
    if gate.all:
        return arguments, None
    left = [sorted(set(source)) for source in gate.sources]
    shorter = grid.clone()
    shorter[:, 0] = upload([len(frames) for frames in left], grid.device)
    kept = [video[frames].flatten(0, 1) for video, frames in zip(videos, left, strict=True)]
    places = [[frames.index(i) for i in source] for frames, source in zip(left, gate.sources, strict=True)]
    return {**arguments, pixels: torch.cat(kept), name: shorter}, places


def _place_order(tower: Any, rows: int, columns: int) -> Tensor | None:
    """[N]: the order in which the blocks have the tokens of a frame of so many patches; None for raster order."""
    if getattr(tower, "fullatt_block_indexes", None) is None:
        return None
    frame = torch.tensor([[1, rows, columns]], device="cpu")
    order, _ = get_vision_window_index(frame, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return order.cpu()  # it is made on the user's default device


def frames_of(x: Tensor, frames: list[int]) -> Tensor:
    """[T N, ...] of the frames [T' N, ...] that are there, in this order."""
    return x.unflatten(0, (max(frames) + 1, -1))[upload(frames, x.device)].flatten(0, 1)


def grid_of(arguments: dict[str, Any]) -> tuple[str, Tensor]:
    """The name and value of the grid argument."""
    name = first_argument(arguments, "video_grid_thw", "image_grid_thw")
    return name, arguments[name]
