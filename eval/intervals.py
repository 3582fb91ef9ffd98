"""Uncertainty of accuracies: intervals clustered by video, McNemar's exact test, a bootstrap over videos.

Questions about one video are right or wrong together, so they are not independent draws: videos are. Chosen here for
one accuracy: the cluster-robust standard error of the mean, turned into an effective number of samples, in Wilson's
interval with a t quantile (the plan of Korn and Graubard, Survey Methodology 24, 1998, with Wilson's score interval in
the place of Clopper and Pearson's). Why not the plain mean +- t SE: near 0 and 100 % it is too short and leaves the
scale, and where all answers are right it has no width at all. Why not a bootstrap: it shares these faults with few
videos. `tests/test_intervals.py` simulates the coverage. For the difference of two runs, which is nowhere near the end
of its scale, the bootstrap over videos makes no assumption about how answers hang together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A share in percent with its 95 % interval; `n` samples of `clusters` videos. None without samples."""

    percent: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Ready for JSON, percentages with four digits."""
        values = self._asdict()
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


class Paired(NamedTuple):
    """B minus A in percentage points, with a 95 % interval; `n` pairs of `clusters` videos.

    `low` and `high` are None where drawing videos anew tells nothing: there is one, or all differ by the same.
    """

    difference: float
    low: float | None
    high: float | None
    n: int
    clusters: int


def clustered_interval(outcomes: Sequence[float], clusters: Sequence[str], confidence: float = 0.95) -> Interval:
    """The mean of outcomes and an interval for it that respects clusters.

    With p the mean of n outcomes in G clusters, SE^2 = G / (G - 1) sum_g (sum_{i in g} (y_i - p))^2 / n^2; the
    effective size is p (1 - p) / SE^2, at most n; where it cannot be known (p is 0 or 1, or there is one cluster) it is
    G, as if all answers of a video were one. The quantile is Student's with G - 1 degrees of freedom.

    Args:
        outcomes: 0 or 1 (bool) each.
        clusters: the video of each.
        confidence: of the two-sided interval.

    Raises:
        ValueError: unequal lengths.
    """
    if len(outcomes) != len(clusters):
        raise ValueError(f"{len(outcomes)} outcomes with {len(clusters)} clusters; each outcome has one")
    n, names = len(outcomes), sorted(set(clusters))
    if not n:
        return Interval(None, None, None, 0, 0)
    count = len(names)
    mean = math.fsum(float(y) for y in outcomes) / n
    sums = dict.fromkeys(names, 0.0)
    for outcome, name in zip(outcomes, clusters, strict=True):
        sums[name] += float(outcome) - mean
    size = float(count)
    if count > 1 and 0 < mean < 1:
        variance = count / (count - 1) * math.fsum(s * s for s in sums.values()) / n**2
        size = min(float(n), mean * (1 - mean) / variance) if variance > 0 else float(n)
    low, high = _wilson(mean, size, t_quantile(0.5 + confidence / 2, max(1, count - 1)))
    return Interval(100 * mean, 100 * low, 100 * high, n, count)


def _wilson(share: float, size: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a share seen in `size` (effective) samples."""
    square = quantile**2
    centre = (share + square / (2 * size)) / (1 + square / size)
    half = quantile / (1 + square / size) * math.sqrt(share * (1 - share) / size + square / (4 * size**2))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """Student's t: the value that `probability` (above a half) lies below, with whole degrees of freedom.

    By bisection on the closed forms of the distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Raises:
        ValueError: a probability outside [0.5, 1) or fewer than one degree of freedom.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(
            f"probability {probability!r} with {freedom!r} degrees of freedom: between 0.5 and 1, at least 1"
        )
    low, high = 0.0, 1.0
    while _inside(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _inside(t: float, freedom: int) -> float:
    """Probability that |T| is below t."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= cosine**2 * 2 * k / (2 * k + 1)
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k - 1) / (2 * k)
    return sine * total


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float | int]:
    """McNemar's exact test: are the answers on which two runs differ as often right in one as in the other?

    Returns:
        `only_first`, `only_second` (right in one run alone) and the two-sided `p` of the binomial with a half. It
        takes samples as independent; with several questions on a video p is somewhat too small.

    Raises:
        ValueError: unequal lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} answers with {len(second)}: McNemar's test needs pairs")
    b = sum(bool(x) and not y for x, y in zip(first, second, strict=True))
    c = sum(bool(y) and not x for x, y in zip(first, second, strict=True))
    n = b + c
    term = tail = 1
    for k in range(min(b, c)):
        term = term * (n - k) // (k + 1)
        tail += term
    return {"only_first": b, "only_second": c, "p": min(1.0, 2 * tail / 2**n)}


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[str],
    *,
    seed: int = 0,
    repeats: int = 10_000,
    confidence: float = 0.95,
) -> Paired:
    """Mean of second minus first, with the percentile interval of a bootstrap that draws whole videos.

    Args:
        first, second: outcomes of the same samples in two runs.
        clusters: the video of each sample.
        seed: of the draws; the same seed gives the same interval.
        repeats: draws.
        confidence: of the interval.

    Raises:
        ValueError: unequal lengths, or no pairs.
    """
    if not len(first) == len(second) == len(clusters):
        raise ValueError(f"{len(first)}, {len(second)} outcomes, {len(clusters)} clusters: these are no pairs")
    if not first:
        raise ValueError("no pairs to compare")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    place = np.array([names[name] for name in clusters])
    change = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    sums = np.bincount(place, weights=change, minlength=len(names))
    sizes = np.bincount(place, minlength=len(names)).astype(np.float64)
    if np.ptp(sums / sizes) < 1e-12:  # an interval without width would look like certainty
        return Paired(100 * float(change.mean()), None, None, len(change), len(names))
    random = np.random.default_rng(seed)
    found = []
    for start in range(0, repeats, 500):  # in pieces: draws x videos need not fit in memory at once
        drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=min(500, repeats - start))
        found.append((drawn @ sums) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Paired(100 * float(change.mean()), 100 * float(low), 100 * float(high), len(change), len(names))
