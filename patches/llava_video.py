"""LLaVA-Video (`holimerge.llava_video`): LLaVA-OneVision with average pooling (27 x 27 to 13 x 13) and more newlines.

A newline stays where a token of its row (or frame) does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holimerge.encoding import Grid
from holimerge.llava_video import layout_of, side_of

from .llava_onevision import LlavaOnevision


class LlavaVideo(LlavaOnevision):
    since = "5.18"  # before, LLaVA-OneVision appended its newline outside of what encodes videos

    def side(self, core: Any) -> int:
        return side_of(core.config)

    def taps(self, core: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        at = 2 * torch.arange(self.side(core), device=device)
        line = torch.stack([at, at + 1], 1)
        index = line[:, None, :, None] * self.patches(core) + line[None, :, None, :]
        return index.reshape(-1, 4), torch.full((index[..., 0, 0].numel(), 4), 0.25, device=device)

    def layout(self, core: Any, grid: Grid) -> Tensor:
        return layout_of(core.config, grid.frames)


FAMILY = LlavaVideo()
