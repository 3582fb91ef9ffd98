"""Sharing a budget among units (static sets of segments, dynamic sets of frames) in whole tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence


def largest_remainder(sizes: Sequence[int], keep: int) -> list[int]:
    """Share `keep` tokens among units in proportion to their sizes, floored, the rest by largest remainder.

    Args:
        sizes: tokens in each unit.
        keep: tokens to keep in all, at most sum(sizes).

    Returns:
        one count per unit, at most its size, with the sum `keep`; equal remainders go to the earlier unit.
    """
    total = sum(sizes)
    if total == 0:
        return [0] * len(sizes)
    share = [size * keep // total for size in sizes]
    # whole numbers throughout, so that a tie is a tie and not a rounding
    by_remainder = sorted(range(len(sizes)), key=lambda u: (-(sizes[u] * keep % total), u))
    for unit in by_remainder[: keep - sum(share)]:
        share[unit] += 1
    return share


def authors_counts(static: Sequence[int], dynamic: Sequence[Sequence[int]], wanted: float) -> list[list[int]]:
    """Counts as HoliTom's authors round them: per segment [static, first frame, second frame, ...].

    Args:
        static: static tokens of each segment, after temporal merging.
        dynamic: dynamic tokens of each frame, by segment.
        wanted: r T N, not rounded.

    Returns:
        ceil(n r') dynamic tokens per frame and round(n r') static ones per segment, r' = min(r T N / (T N - R), 1).
        If that comes to no token at all, the earliest unit that has one keeps one.
    """
    left = sum(static) + sum(map(sum, dynamic))
    ratio = min(wanted / left, 1.0)
    counts = [
        [round(s * ratio), *(math.ceil(d * ratio - 1e-9) for d in frames)]  # guarded against float error
        for s, frames in zip(static, dynamic, strict=True)
    ]
    if not any(map(sum, counts)):
        first = next(
            (i, j)
            for i, (s, frames) in enumerate(zip(static, dynamic, strict=True))
            for j, n in enumerate([s, *frames])
            if n
        )
        counts[first[0]][first[1]] = 1
    return counts
