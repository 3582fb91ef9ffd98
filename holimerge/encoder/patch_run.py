"""Towers whose blocks see only the rows of places that changed (`holimerge.encoder.gate`).

In a sequence these rows are simply the ones that are left. Where frames are a batch, what is left of several frames
shares one frame's worth of rows, and attention is kept inside each by a bias; what is free behind them repeats a row,
which is read by nothing.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..tokens import upload
from .tower import EncoderReport, Run, Tower


class Patches:
    """Where every row that a prompt's calls of the tower work on takes its features from."""

    def __init__(self, rows: list[Tensor], several: bool) -> None:
        """rows: of every video, as `holimerge.encoder.gate.row_sources` gives them. several: whether there may be more
        than one call; then the last frame of each is kept for the next."""
        starts = accumulate((len(x) for x in rows), initial=0)
        self.rows = torch.cat([x + start for x, start in zip(rows, starts, strict=False)])
        self.carry: dict[int, Tensor] | None = {} if several else None  # [P, C] by block, and -1 for scores
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """[count]: the sources of the next call's rows, numbered from its first; negative if of an earlier call."""
        start = self._taken
        self._taken += count
        return self.rows[start : self._taken] - start


class PatchRun(Run):
    """A call of a tower. All indices are known on the host before it starts."""

    def __init__(self, tower: Tower, report: EncoderReport, patches: Patches) -> None:
        super().__init__(tower, [], report)
        self.carry = patches.carry
        self.size = tower.videos[-1][1]  # rows of a frame; the same in all videos but in a sequence of a single call
        source = patches.take(tower.rows)
        self.pairs: list[int] = []  # of each block of a sequence
        self.own = source == torch.arange(len(source), device="cpu")
        self.whole = bool(self.own.all())
        rows = self.own.nonzero().flatten()
        videos = self.own.split([t * p for t, p in tower.videos])
        frames = [own.view(t, p).sum(1) for own, (t, p) in zip(videos, tower.videos, strict=True)]
        # of the mean row of a frame in attention, as if all were there: scores of several frames stand side by side
        self.shares = torch.cat([(n / p).repeat_interleave(n) for n, (_, p) in zip(frames, tower.videos, strict=True)])
        self.groups: Tensor | None = None  # [B, P], the frame that each row of a batch belongs to, -1 for none
        place = torch.arange(len(rows), device="cpu")
        self.filled = rows
        if tower.batched:
            place, self.filled, self.groups = _packed(torch.cat(frames).tolist(), rows, self.size)
        at = torch.zeros(len(source), dtype=torch.long, device="cpu").index_copy_(0, rows, place)
        self.earlier = bool((source < 0).any())
        behind = (
            len(self.filled) + torch.arange(len(source), device="cpu") % self.size
        )  # the last frame of the call before
        self.index = at[source.clamp_min(0)].where(source >= 0, behind)
        self._apart: Tensor | None = None  # [B, 1, P, P] bool, of rows that must not see each other
        self._bias: dict[torch.dtype, Tensor] = {}

    def enter(self, block: int, hidden: Tensor) -> Tensor:
        if block or (self.whole and self.tower.batched):
            return hidden
        device = hidden.device
        self.index, self.filled = upload(self.index, device), upload(self.filled, device)
        if not self.tower.batched:
            self.shorten(self.filled)
            return hidden[self.filled]
        assert self.groups is not None
        groups = self.groups
        if not bool((groups == groups[:, :1]).all()):
            groups = upload(groups, device)
            self._apart = (groups[:, :, None] != groups[:, None, :])[:, None]
        return hidden.flatten(0, 1)[self.filled].unflatten(0, (-1, self.size))

    def spans_left(self, lengths: list[int]) -> list[int]:
        before = [0, *self.own.cumsum(0).tolist()]
        left = [before[end] - before[start] for start, end in pairwise(accumulate(lengths, initial=0))]
        return [count for count in left if count]

    def _shorter(self, kwargs: dict[str, Any], kept: Tensor) -> dict[str, Any]:
        shorter = super()._shorter(kwargs, kept)
        self.pairs.append(sum(n**2 for n in self.tower.spans.lengths(shorter["cu_seqlens"])))
        return shorter

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        if self._apart is None:
            return None
        if dtype not in self._bias:
            self._bias[dtype] = torch.zeros_like(self._apart, dtype=dtype).masked_fill_(self._apart, -torch.inf)
        return self._bias[dtype]

    def restored(self, hidden: Tensor, block: int) -> Tensor:
        if not self.tower.batched:
            return self._every(hidden, block)
        return self._every(hidden.flatten(0, 1), block).unflatten(0, (-1, self.size))

    def spread(self, received: Tensor) -> Tensor:
        if self.tower.batched:  # a mean over all P queries, of which the frame's own n give n / P
            return self._every(received.flatten()[:, None], -1)[:, 0].unflatten(0, (-1, self.size))
        return self._every((received * upload(self.shares, received.device))[:, None], -1)[:, 0]

    def _every(self, rows: Tensor, key: int) -> Tensor:
        if self.earlier:
            assert self.carry is not None
            rows = torch.cat([rows, self.carry[key]])
        every = rows if self.whole else rows[self.index]
        if self.carry is not None:
            self.carry[key] = every[-self.size :].clone()
        return every

    def count(self) -> None:
        self.report.add(0, self.seen, [], self.pairs)  # frames and all rows are counted when the gate is asked


def _packed(counts: list[int], rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of frames, in as few lots of `size` rows as the largest first, each where it fits first, need.

    Args:
        counts: rows that are left of each frame, at most `size`.
        rows: [S'], those rows, frame by frame.

    Returns:
        place [S'] of each among the rows of all lots; the row in every place [B size]; its frame [B, size], -1 for a
        free place.
    """
    used: list[int] = []
    begins = [0] * len(counts)
    for frame in sorted(range(len(counts)), key=lambda f: -counts[f]):
        lot = next((i for i, n in enumerate(used) if n + counts[frame] <= size), len(used))
        if lot == len(used):
            used.append(0)
        begins[frame] = lot * size + used[lot]
        used[lot] += counts[frame]
    begin, count = (torch.tensor(x, device="cpu") for x in (begins, counts))
    within = torch.arange(len(rows), device="cpu") - (count.cumsum(0) - count).repeat_interleave(count)
    place = begin.repeat_interleave(count) + within
    filled = rows[:1].repeat(len(used) * size).index_copy_(0, place, rows)
    frames = torch.arange(len(counts), device="cpu").repeat_interleave(count)
    groups = torch.full((len(used) * size,), -1, device="cpu").index_copy_(0, place, frames)
    return place, filled, groups.view(-1, size)
