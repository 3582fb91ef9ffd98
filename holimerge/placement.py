"""Where a video's tokens stand among the placeholders of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from .tokens import MergeRecord, upload


@dataclass(frozen=True)
class Placement:
    """One video's record and the layout of its placeholders.

    layout: [M] int64, the token each placeholder stands for, -1 for a separator (a newline); None: the tokens in order.
    """

    record: MergeRecord
    layout: Tensor | None = None

    @property
    def placeholders(self) -> int:
        """M, how many placeholders the video takes."""
        return self.record.total if self.layout is None else self.layout.shape[0]

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """Per placeholder, how many original tokens it holds and where its token's anchor stands.

        Returns:
            sizes [M] float32 (0 for what is dropped, -1 for a separator that stays) and anchor [M] int64, the
            placeholder of the anchor (its own where there is none; elsewhere only out of raster order).
        """
        record, device = self.record, self.record.anchor.device
        size = torch.zeros(record.total, device=device)
        size[record.slots] = record.sizes.to(size.dtype)
        anchor = torch.arange(record.total, device=device)
        anchor[record.slots] = record.anchor
        if self.layout is None:
            return size, anchor
        layout = self.layout.to(device)
        token, separator = layout.clamp_min(0), layout < 0
        size = size[token].masked_fill(separator, 0)
        # a separator ends the tokens since the one before it, and stays if one of those does
        seen = (size > 0).long().cumsum(0)
        at_separators = torch.where(separator, seen, 0).cummax(0).values
        before = torch.cat([at_separators.new_zeros(1), at_separators[:-1]])
        size = torch.where(separator & (seen > before), -1.0, size)
        place = torch.arange(layout.shape[0], device=device)
        of_token = torch.zeros(record.total + 1, dtype=torch.long, device=device)  # the last entry takes separators
        of_token[torch.where(separator, record.total, layout)] = place
        return size, torch.where(separator, place, of_token[anchor[token]])

    def separators(self) -> int:
        """How many separators stay (asks the device)."""
        return 0 if self.layout is None else int((self.values[0] < 0).sum())


@dataclass(frozen=True)
class FrameImages:
    """Which images of a batch are the frames of videos.

    videos: for each video, the grids (images, or tiles of images) that are its frames, in order.
    inside: for each row and each of its image placeholders, whether it belongs to a video.
    """

    videos: list[list[int]]
    inside: list[list[bool]]

    def within(self, mask: Tensor) -> Tensor:
        """Of image placeholders [B, L], those that belong to a video."""
        flags = upload([flag for row in self.inside for flag in row], mask.device, torch.bool)
        return torch.zeros_like(mask).masked_scatter(mask, flags)


def frames_among_images(mask: Tensor, grids: Sequence[tuple[int, int, int]]) -> FrameImages:
    """Find the videos among images: two or more in one row of the batch whose runs of placeholders hold one grid each.

    A run that holds several grids is one large image in tiles, and stays an image; so does an image alone in its row.

    Args:
        mask: [B, L] bool, image placeholders.
        grids: (frames, rows, columns) of every image or tile, in the order of the placeholders.

    Raises:
        ValueError: the runs do not fit the grids, or the frames of a row differ in size.
    """
    lengths = [t * h * w for t, h, w in grids]
    if int(mask.sum()) != sum(lengths):
        raise ValueError(f"the prompt has {int(mask.sum())} image placeholders, its images make {sum(lengths)} tokens")
    videos, inside = [], []
    grid = 0
    for row in mask.cpu().tolist():
        runs = [sum(run) for is_image, run in groupby(row) if is_image]
        tiles: list[list[int]] = []
        for run in runs:
            held: list[int] = []
            while run > 0 and grid < len(grids):
                run -= lengths[grid]
                held.append(grid)
                grid += 1
            if run:
                raise ValueError(
                    f"a run of {sum(lengths[i] for i in held) + run} image placeholders holds no whole image"
                )
            tiles.append(held)
        frames = [held[0] for held in tiles if len(held) == 1]
        if len({tuple(grids[i]) for i in frames}) > 1:
            sizes = ", ".join(f"{h} x {w}" for _, h, w in sorted({tuple(grids[i]) for i in frames}))
            raise ValueError(f"treat_images_as_video: the images of a prompt must have one size, got tokens of {sizes}")
        frames = frames if len(frames) > 1 else []
        videos += [frames] if frames else []
        inside.append([held[0] in frames for held in tiles for i in held for _ in range(lengths[i])])
    return FrameImages(videos, inside)
