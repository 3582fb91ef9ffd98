"""Spans of a sequence that attend to nothing but themselves (a tower's windows or frames), batched by their length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .tokens import upload


@dataclass(frozen=True)
class Batches:
    """The spans of a sequence of S rows, grouped by length.

    lengths: of every span, in the order of the sequence.
    groups: (length, spans of that length), in the order in which lengths first appear.
    order: [S] int64, the rows group by group; None where they lie so already.
    back: [S] int64, where each row of the sequence lies among the groups; None as `order`.
    """

    lengths: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    order: Tensor | None = None
    back: Tensor | None = None

    @property
    def longest(self) -> int:
        """The length of the longest span."""
        return max(self.lengths, default=0)

    def in_turn(self) -> Batches:
        """The same spans, each by itself, in the order of the sequence."""
        return Batches(self.lengths, tuple((n, 1) for n in self.lengths if n))

    def grouped(self, rows: Tensor) -> Tensor:
        """[S, ...] of the sequence, group by group."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def in_place(self, rows: Tensor) -> Tensor:
        """[S, ...] group by group, as the sequence has them."""
        return rows if self.back is None else rows.index_select(0, self.back)

    def attend(self, attention: Callable[..., Tensor], rows: tuple[Tensor, ...], most: Callable[[int], int]) -> Tensor:
        """[S, heads, d']: what attention gives of every span, in the place of its rows.

        Args:
            attention: queries, keys, values [n, heads, L, d] of n spans -> [n, L, heads, d'].
            rows: queries, keys and values [S, heads, d].
            most: length of a span -> spans of one call, at least 1.
        """
        assert sum(self.lengths) == rows[0].shape[0]
        rows = tuple(map(self.grouped, rows))
        parts, start = [], 0
        for length, count in self.groups:
            step = most(length)
            for first in range(0, count, step):
                n = min(step, count - first)
                stop = start + n * length
                batch = [x[start:stop].unflatten(0, (n, length)).transpose(1, 2) for x in rows]
                parts.append(attention(*batch).flatten(0, 1))
                start = stop
        return self.in_place(parts[0] if len(parts) == 1 else torch.cat(parts))


def by_length(lengths: list[int], device: torch.device, kinds: Sequence[int] | None = None) -> Batches:
    """Spans of one length together. Made on the device from where spans begin, without asking it anything.

    kinds: of each span, to group by instead; spans of a kind have one length.
    """
    begins: dict[tuple[int, int], list[int]] = {}
    kinds = lengths if kinds is None else kinds
    for kind, length, begin in zip(kinds, lengths, accumulate(lengths, initial=0), strict=False):
        if length:
            begins.setdefault((kind, length), []).append(begin)
    groups = tuple((length, len(found)) for (_, length), found in begins.items())
    flat = [begin for found in begins.values() for begin in found]
    if flat == sorted(flat):
        return Batches(tuple(lengths), groups)
    places = upload(flat, device).split([count for _, count in groups])
    order = torch.cat(
        [
            (begin[:, None] + torch.arange(length, device=device)).flatten()
            for begin, (length, _) in zip(places, groups, strict=True)
        ]
    )
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    return Batches(tuple(lengths), groups, order, back)


class Spans:
    """What is known on the host of the spans in one call of a tower: a tensor that marks them is read once at most."""

    def __init__(self, expected: Sequence[list[int]] = ()) -> None:
        """expected: lengths of the ways in which the sequence is cut, as far as they are known: as many spans as one of
        them has are those."""
        self._expected = {len(lengths): lengths for lengths in expected}
        self._shortened = False
        self._lengths: dict[int, tuple[Tensor, list[int]]] = {}  # by the tensor's id; kept, so that none is used again
        self._batches: dict[tuple[int, torch.device], Batches] = {}

    def lengths(self, ends: Tensor) -> list[int]:
        """Of every span. ends: [n + 1] integers, where spans begin, and the end of the last."""
        # once some are shorter, marks that were copied (to another device) no longer tell by their number what they are
        return self._known(ends, {} if self._shortened else self._expected)

    def stock(self, ends: Tensor) -> list[int]:
        """The same of marks as the tower made them, with all rows."""
        return self._known(ends, self._expected)

    def _known(self, ends: Tensor, expected: dict[int, list[int]]) -> list[int]:
        if id(ends) not in self._lengths:
            known = expected.get(ends.shape[0] - 1)
            self._lengths[id(ends)] = (ends, known or [b - a for a, b in pairwise(ends.tolist())])
        return self._lengths[id(ends)][1]

    def marked(self, lengths: list[int], like: Tensor) -> Tensor:
        """[n + 1] of the type and on the device of `like`: where spans of these lengths begin, and the end."""
        self._shortened = True
        ends = upload(list(accumulate(lengths, initial=0)), like.device).to(like.dtype)
        self._lengths[id(ends)] = (ends, lengths)
        return ends

    def batches(self, ends: Tensor, device: torch.device) -> Batches:
        """Of the spans that `ends` marks, for rows on this device."""
        key = id(ends), device
        if key not in self._batches:
            self._batches[key] = by_length(self.lengths(ends), device)
        return self._batches[key]


def spans_left(lengths: list[int], parts: Sequence[tuple[int, int]]) -> list[int]:
    """Lengths of the spans of what is left of a sequence, empty ones left out.

    Args:
        lengths: of the spans before.
        parts: of consecutive parts of the sequence (rows, rows that are left). A span begins and ends between two of
            them, or inside one of which all rows are left, or none.
    """
    marks, places = iter(accumulate(lengths)), [0]
    start = after = 0
    mark = next(marks, None)
    for rows, left in parts:
        while mark is not None and mark <= start + rows:
            assert mark == start + rows or left in (0, rows)
            places.append(after + min(left, mark - start))
            mark = next(marks, None)
        start, after = start + rows, after + left
    assert mark is None
    assert sum(lengths) == start
    return [b - a for a, b in pairwise(places) if b > a]
