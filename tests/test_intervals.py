"""Intervals cover what they say, quantiles are those of the tables, McNemar's p is the binomial's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from holimerge.eval.intervals import clustered_interval, mcnemar, paired_bootstrap, t_quantile


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (120, 1.97993)],
)
def test_quantiles_of_student(freedom: int, value: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=1e-4)  # from printed tables


def test_quantiles_come_near_the_normal_one() -> None:
    assert t_quantile(0.975, 5000) == pytest.approx(1.95996, abs=1e-3)
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="freedom"):
        t_quantile(0.975, 0)


def simulated(rate: float, spread: float, videos: int, questions: int, rounds: int = 400) -> tuple[float, float]:
    """Coverage of the clustered interval, and of one that takes every question as a video of its own."""
    random = np.random.default_rng(5)
    hits = np.zeros(2)
    for _ in range(rounds):
        a, b = rate * (1 / spread - 1), (1 - rate) * (1 / spread - 1)
        chance = random.beta(a, b, size=videos)  # `spread` is the correlation within a video
        right = random.random((videos, questions)) < chance[:, None]
        names = np.repeat(np.arange(videos), questions).astype(str).tolist()
        for i, clusters in enumerate((names, [str(k) for k in range(len(names))])):
            found = clustered_interval(right.ravel().tolist(), clusters)
            assert found.low is not None
            assert found.high is not None
            hits[i] += found.low <= 100 * rate <= found.high
    return hits[0] / rounds, hits[1] / rounds


@pytest.mark.parametrize(("rate", "videos"), [(0.6, 40), (0.95, 40), (0.3, 12)])
def test_the_interval_covers(rate: float, videos: int) -> None:
    clustered, naive = simulated(rate, 0.5, videos, 5)
    assert 0.92 <= clustered <= 0.995
    assert naive < 0.85  # the mistake it is there against


def test_without_clusters_it_is_not_too_wide() -> None:
    found = clustered_interval([i % 2 for i in range(400)], [str(i) for i in range(400)])
    assert found.percent == 50
    assert found.low == pytest.approx(45.1, abs=0.2)
    assert found.high == pytest.approx(54.9, abs=0.2)
    assert (found.n, found.clusters) == (400, 400)


def wilson(share: float, size: float, quantile: float) -> tuple[float, float]:
    """Where the score test just does not refuse a share, found by the quadratic formula, in percent."""
    a, b, c = 1 + quantile**2 / size, -2 * share - quantile**2 / size, share**2
    root = math.sqrt(b * b - 4 * a * c)
    return 100 * (-b - root) / (2 * a), 100 * (-b + root) / (2 * a)


@pytest.mark.parametrize(
    ("outcomes", "clusters", "size", "freedom"),
    [
        ([1, 0] * 5, "abcdefghij", 9, 9),  # every sample a video: n - 1
        ([1, 0] * 5, "aabbccddee", 10, 4),  # one right and one wrong in each: no video differs, at most n
        ([1, 1, 0, 0] * 3, "aabbccddeeff", 5, 5),  # both alike: as if each video had one question, less one
        ([1] * 6, "aabbcc", 3, 2),  # unknown: one answer a video
    ],
)
def test_the_effective_size(outcomes: list[int], clusters: str, size: float, freedom: int) -> None:
    found = clustered_interval(outcomes, list(clusters))
    assert (found.low, found.high) == pytest.approx(
        wilson(sum(outcomes) / len(outcomes), size, t_quantile(0.975, freedom))
    )


def test_ends_of_the_scale_keep_a_width() -> None:
    full = clustered_interval([1] * 20, [str(i // 2) for i in range(20)])
    assert full.percent == full.high == 100
    assert full.low is not None
    assert 55 < full.low < 75  # ten videos, not twenty questions
    none = clustered_interval([0] * 20, [str(i) for i in range(20)])
    assert (none.percent, none.low) == (0, 0)
    assert clustered_interval([], []).percent is None
    assert clustered_interval([1], ["a"]).to_dict()["clusters"] == 1
    with pytest.raises(ValueError, match="2 outcomes with 1"):
        clustered_interval([1, 0], ["a"])


def test_whole_videos_count_once() -> None:
    """Ten copies of each answer tell no more than one."""
    once = clustered_interval([1, 0, 1, 1, 0, 1], list("abcdef"))
    copied = clustered_interval(
        [y for y in (1, 0, 1, 1, 0, 1) for _ in range(10)], [v for v in "abcdef" for _ in "0123456789"]
    )
    assert once.low is not None
    assert copied.low is not None
    assert copied.low <= once.low + 1e-9


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 1), (12, 12), (3, 20)])
def test_mcnemar_is_the_binomial(b: int, c: int) -> None:
    first = [True] * b + [False] * c + [True] * 7
    second = [False] * b + [True] * c + [True] * 7
    found = mcnemar(first, second)
    assert (found["only_first"], found["only_second"]) == (b, c)
    n = b + c
    chances = [math.comb(n, k) * 0.5**n for k in range(n + 1)]
    slow = sum(p for p in chances if p <= chances[b] * (1 + 1e-9)) if n else 1.0
    assert found["p"] == pytest.approx(min(1.0, slow))


def test_mcnemar_of_many() -> None:
    assert mcnemar([True] * 3000 + [False] * 3000, [False] * 3000 + [True] * 3000)["p"] == 1
    assert 0 <= mcnemar([True] * 5000, [False] * 5000)["p"] < 1e-300
    with pytest.raises(ValueError, match="pairs"):
        mcnemar([True], [])


def test_the_bootstrap_draws_videos() -> None:
    random = np.random.default_rng(0)
    videos = [str(i // 8) for i in range(240)]
    shift = np.repeat(random.random(30) < 0.4, 8)
    first, second = np.zeros(240), shift.astype(float)  # all questions of a video change together
    clustered = paired_bootstrap(first.tolist(), second.tolist(), videos)
    alone = paired_bootstrap(first.tolist(), second.tolist(), [str(i) for i in range(240)])
    assert clustered.difference == alone.difference == pytest.approx(100 * second.mean())
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)
    assert clustered.low < clustered.difference < clustered.high
    assert (clustered.n, clustered.clusters) == (240, 30)
    assert paired_bootstrap(first.tolist(), second.tolist(), videos) == clustered
    few = [paired_bootstrap(first.tolist(), second.tolist(), videos, seed=seed, repeats=30) for seed in (0, 1)]
    assert few[0] != few[1]
    back = paired_bootstrap(second.tolist(), first.tolist(), videos)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-clustered.difference, -clustered.high, -clustered.low)
    )
    with pytest.raises(ValueError, match="no pairs"):
        paired_bootstrap([], [], [])
    one = paired_bootstrap([0, 1, 0], [1, 1, 0], ["a"] * 3)  # a bootstrap of one video would have no width
    assert one == (pytest.approx(100 / 3), None, None, 3, 1)
    equal = paired_bootstrap([1, 0, 1, 0], [1, 0, 1, 0], list("abca"))  # three videos show no certain nought
    assert equal == (0, None, None, 4, 3)


def test_the_bootstrap_covers() -> None:
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(150):
        better = random.beta(2, 2, size=40)
        second = (random.random((40, 4)) < better[:, None]).astype(float)
        first = (random.random((40, 4)) < 0.3).astype(float)
        names = np.repeat(np.arange(40), 4).astype(str).tolist()
        found = paired_bootstrap(first.ravel().tolist(), second.ravel().tolist(), names, repeats=500)
        hits += found.low <= 20 <= found.high
    assert hits / 150 >= 0.88
