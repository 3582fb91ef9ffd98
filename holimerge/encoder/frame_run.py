"""Frames that merge on entering blocks of a tower."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import upload
from .frames import FrameMerge, frame_similarity, plan_frames
from .options import Frames
from .tower import EncoderReport, Run, Tower


class FrameRun(Run):
    """Per video: the frame in whose place each remaining one stands, and of every frame the one that stands for it."""

    def __init__(self, tower: Tower, layers: list[int], report: EncoderReport, options: Frames) -> None:
        super().__init__(tower, layers, report)
        self.options = options
        self.places = [list(range(t)) for t, _ in tower.videos]
        self.owners = [list(range(t)) for t, _ in tower.videos]
        self._before: list[list[list[int]]] = []  # owners by block

    def frames(self) -> list[int]:
        return [len(places) for places in self.places]

    def parts_left(self) -> list[tuple[int, int]]:
        found = []
        for places, (frames, rows) in zip(self.places, self.tower.videos, strict=True):
            left = set(places)
            found += [(rows, rows if frame in left else 0) for frame in range(frames)]
        return found

    def enter(self, block: int, hidden: Tensor) -> Tensor:
        if block in self.layers:
            hidden = self._merge(hidden)
        self._before.append(self.owners)
        return hidden

    def _merge(self, hidden: Tensor) -> Tensor:
        parts = self._parts(hidden, self.frames())
        plans = [self._plan(part.detach()) for part in parts]
        if all(plan.nothing for plan in plans):
            return hidden
        self.owners = [[plan.owner[i] for i in owners] for plan, owners in zip(plans, self.owners, strict=True)]
        self.places = [[places[i] for i, _, _ in plan.pairs] for plan, places in zip(plans, self.places, strict=True)]
        self.shorten(None if self.tower.batched else self._rows(hidden.device))
        return self._joined([plan.merged(part) for plan, part in zip(plans, parts, strict=True)])

    @torch.no_grad()
    def _plan(self, x: Tensor) -> FrameMerge:
        options = self.options
        with torch.autocast(x.device.type, enabled=False):
            similarity = frame_similarity(x, max(1, min(options.longest, x.shape[0]) - 1))
        return plan_frames(similarity.tolist(), options.similarity, options.longest, options.merge)

    def _rows(self, device: torch.device) -> Tensor:
        parts, start = [], 0
        for places, (frames, rows) in zip(self.places, self.tower.videos, strict=True):
            row = torch.arange(start, start + rows, device=device)
            parts.append((upload(places, device)[:, None] * rows + row).flatten())
            start += frames * rows
        return torch.cat(parts)

    def _parts(self, hidden: Tensor, counts: list[int]) -> list[Tensor]:
        """[T', P, C] of each video."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        sizes = [count * rows for count, (_, rows) in zip(counts, self.tower.videos, strict=True)]
        return [part.unflatten(0, (count, -1)) for part, count in zip(flat.split(sizes), counts, strict=True)]

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts if self.tower.batched else [part.flatten(0, 1) for part in parts])

    def _spread(self, hidden: Tensor, owners: list[list[int]]) -> Tensor:
        parts = self._parts(hidden, [owner[-1] + 1 for owner in owners])
        index = [upload(owner, hidden.device) for owner in owners]
        return self._joined([part[i] for part, i in zip(parts, index, strict=True)])

    def restored(self, hidden: Tensor, block: int) -> Tensor:
        owners = self._before[block]
        nothing = all(owner[-1] + 1 == len(owner) for owner in owners)
        return hidden if nothing else self._spread(hidden, owners)

    def spread(self, received: Tensor) -> Tensor:
        return self._spread(received[..., None], self._before[-1])[..., 0]
