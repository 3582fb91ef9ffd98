"""The oracle is judged before it judges: brute force, hand-worked examples, and laws, each of which can fail.

The last section holds the re-creation of the authors' procedure against the oracle.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import (
    OracleResult,
    cosine,
    density_peaks,
    gain,
    inner_merge,
    received_attention,
    reduce_video,
    segment_brute_force,
    segment_dp,
    static_flags,
    static_positions,
)

from holimerge.eval.authors_procedure import authors_outer

TAU = 0.8
KINDS = ("mixed", "static", "different", "ties", "cuts")


def make_video(kind: str, seed: int, T: int, N: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    """A small video [T, N, D] and its scores [T, N], both exactly representable in fp32.

    "mixed": some positions hardly change, some do, a few scene cuts; "cuts": more of them; "static": every frame nearly
    the same; "different": every token points away from the next frame's; "ties": few distinct vectors and scores.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    if kind == "static":
        x = rng.normal(size=(1, N, D)) + 0.02 * rng.normal(size=(T, N, D))
    elif kind == "different":
        x = np.abs(rng.normal(size=(T, N, D)))
        x[1::2] *= -1  # without this, tokens of small width are alike by chance
    elif kind == "ties":
        x = rng.integers(0, 2, size=(T, N, D)).astype(float)
    else:
        scenes = np.cumsum(rng.random(T) < (0.2 if kind == "mixed" else 0.4))
        backgrounds = rng.normal(size=(T + 1, N, D))
        motion = np.where(rng.random((T, N, 1)) < 0.35, 1.0, 0.1)
        x = backgrounds[scenes] + motion * rng.normal(size=(T, N, D))
    scores = rng.integers(0, 3, size=(T, N)) / 4 if kind == "ties" else rng.random((T, N))
    return x.astype(np.float32).astype(np.float64), scores.astype(np.float32).astype(np.float64)


def check_record(result: OracleResult, N: int, order: str) -> None:
    """The laws every record obeys: weights sum to one, nothing is held twice, anchors are members and in order."""
    owner, weights = result.assignment()  # asserts that nothing is held twice
    for ordinal, token in enumerate(result.kept):
        assert token.anchor in token.members
        assert sum(token.members.values()) == pytest.approx(1.0, abs=1e-12)
        assert all(w > 0 for w in token.members.values())
        assert weights[owner == ordinal].sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(result.merge(np.ones(result.total)), 1.0, atol=1e-12)
    anchors = [token.anchor for token in result.kept]
    assert len(set(anchors)) == len(anchors)
    if order == "raster":
        assert anchors == sorted(anchors)
    assert result.segments[0][0] == 0
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(result.segments))
    assert result.segments[-1][1] == result.total // N - 1


# --- segmentation ---------------------------------------------------------------------------------------------------


def all_segmentations(T: int) -> list[list[tuple[int, int]]]:
    """Every way to cut T frames into runs."""
    out = []
    for cuts in itertools.product((False, True), repeat=T - 1):
        bounds = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), T]
        out.append([(a, b - 1) for a, b in itertools.pairwise(bounds)])
    return out


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("T", range(1, 9))
def test_segmentation_is_the_best_of_all_and_breaks_ties_by_the_shortest_last_segment(T: int, density: float) -> None:
    rng = np.random.default_rng([T, int(density * 100)])
    for _ in range(12):
        N = int(rng.integers(1, 5))  # few positions: many segmentations tie
        flags = rng.random((T - 1, N)) < density
        segments, removed = segment_dp(flags, None)
        assert removed == segment_brute_force(flags)
        assert removed == sum(gain(flags, *segment) for segment in segments)
        objectives = [(sum(gain(flags, *s) for s in cut), cut) for cut in all_segmentations(T)]
        best = [cut for objective, cut in objectives if objective == removed]
        # "Replace only if strictly greater" = among the best, the shortest last segment, then the one before it, ...
        assert segments == min(best, key=lambda cut: [b - a for a, b in reversed(cut)])


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_segments_respect_the_longest_window(limit: int) -> None:
    rng = np.random.default_rng(limit)
    for _ in range(30):
        flags = rng.random((6, 3)) < 0.8
        segments, removed = segment_dp(flags, limit)
        assert max(end - start + 1 for start, end in segments) <= limit
        assert removed == segment_brute_force(flags, limit)


def test_segmentation_ties_by_hand() -> None:
    # Positions as columns, frame pairs as rows. Gains: [0,1] 2, [1,2] 2, [0,2] 2: the last frame stays alone.
    assert segment_dp(np.array([[1, 1, 0], [1, 0, 1]], dtype=bool), None) == ([(0, 1), (2, 2)], 2)
    # Gains: [0,1] 1, [1,2] 2, [0,2] 2: the window of two comes first.
    assert segment_dp(np.array([[1, 0], [1, 1]], dtype=bool), None) == ([(0, 0), (1, 2)], 2)
    # Nothing gained, nothing joined; no pairs at all.
    assert segment_dp(np.zeros((2, 3), dtype=bool), None) == ([(0, 0), (1, 1), (2, 2)], 0)
    assert segment_dp(np.zeros((0, 3), dtype=bool), None) == ([(0, 0)], 0)


def test_static_means_strictly_above_tau() -> None:
    x = np.array([[[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])  # cosines 1, 0.6, 0
    assert static_flags(x, 0.6).tolist() == [[True, False, False]]
    assert static_flags(x, 0.59).tolist() == [[True, True, False]]
    assert static_flags(x, -0.1).tolist() == [[True, True, True]]


# --- laws of the whole reduction --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"exact": True},
        {"exact": True, "retain": 0.5, "keep": 3},
        {"exact": True, "keep": 0},
        {"exact": True, "keep": 7},
        {"exact": False, "keep": 3},
        {"exact": True, "keep": 3, "order": "frames"},
    ],
)
def test_wrong_budgets_are_errors(wrong: dict[str, Any]) -> None:
    x, scores = make_video("mixed", 0, 2, 3, 4)
    with pytest.raises(ValueError):
        reduce_video(x, scores, tau=TAU, **wrong)


@pytest.mark.parametrize("order", ["raster", "segment"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (2, 3), (4, 4), (5, 6)])
def test_every_exact_budget_is_met(shape: tuple[int, int], kind: str, order: str) -> None:
    T, N = shape
    x, scores = make_video(kind, 1, T, N, 3)
    for keep in range(1, T * N + 1):
        result = reduce_video(x, scores, keep=keep, exact=True, tau=TAU, order=order)
        assert len(result.kept) == keep
        check_record(result, N, order)
        owner, _ = result.assignment()
        if keep >= T * N - result.removed:
            assert (owner >= 0).all()  # no spatial reduction: every token is in some kept one
    np.testing.assert_array_equal(
        reduce_video(x, scores, keep=T * N, exact=True, tau=TAU).merge(x.reshape(T * N, -1)), x.reshape(T * N, -1)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_orders_hold_the_same_tokens(kind: str) -> None:
    x, scores = make_video(kind, 2, 5, 6, 3)
    for keep in (3, 9, 14, 20, 27, 30):
        raster = reduce_video(x, scores, keep=keep, exact=True, tau=TAU, order="raster")
        segment = reduce_video(x, scores, keep=keep, exact=True, tau=TAU, order="segment")
        assert sorted(segment.kept, key=lambda token: token.anchor) == raster.kept


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_counts(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    T, N = int(rng.integers(1, 7)), int(rng.integers(1, 8))
    retain = float(rng.choice([0.05, 0.1, 0.25, 0.5, 0.9, 1.0]))
    x, scores = make_video(kind, seed, T, N, 4)
    result = reduce_video(x, scores, retain=retain, exact=False, tau=TAU, order="segment")
    check_record(result, N, "segment")
    flags = static_flags(x, TAU)
    share = min(retain * T * N / (T * N - result.removed), 1)
    expected = 0
    for start, end in result.segments:
        static = len(static_positions(flags, start, end))
        expected += round(static * share) + (end - start + 1) * math.ceil((N - static) * share - 1e-9)
    assert len(result.kept) == max(expected, 1)


@pytest.mark.parametrize("exact", [True, False])
def test_dynamic_tokens_are_the_highest_scores_of_their_frame(exact: bool) -> None:
    for seed in range(20):
        x, scores = make_video("ties" if seed % 2 else "different", seed, 4, 7, 3)
        result = reduce_video(x, scores, retain=0.4, exact=exact, tau=1.1)  # nothing is static
        owner, _ = result.assignment()
        kept = (owner >= 0).reshape(4, 7)
        for t in range(4):
            inside = [(-scores[t, n], n) for n in range(7) if kept[t, n]]
            outside = [(-scores[t, n], n) for n in range(7) if not kept[t, n]]
            assert len(inside) in (2, 3)  # 2.8 a frame: exact keeps 11 in all, the authors 3 in each
            assert max(inside) < min(outside)


def test_retain_stands_for_the_rounded_count() -> None:
    x, scores = make_video("mixed", 3, 2, 5, 3)
    for retain, keep in [(0.0, 1), (0.24, 2), (0.25, 3), (0.45, 5), (1.0, 10)]:  # 2.5 and 4.5 go up, not to even
        assert len(reduce_video(x, scores, retain=retain, exact=True, tau=TAU).kept) == keep


def test_released_tokens_are_the_least_similar_ones() -> None:
    checked = 0
    for seed in range(30):
        T, N = 5, 4
        x, scores = make_video("cuts", seed, T, N, 6)
        base = reduce_video(x, scores, keep=T * N, exact=True, tau=TAU)
        entering = T * N - base.removed
        merged = reduce_video(x, scores, keep=entering, exact=True, tau=TAU)
        groups = [sorted(token.members) for token in merged.kept if len(token.members) > 1]
        table = []
        for group in groups:
            mean = np.mean([x[f // N, f % N] for f in group], axis=0)
            ranked = sorted((cosine(x[f // N, f % N], mean), f) for f in group)
            table.extend(ranked[:-1])  # the group's last never leaves
        table.sort()
        for extra in range(len(table) + 1):
            result = reduce_video(x, scores, keep=entering + extra, exact=True, tau=TAU)
            gone = {f for _, f in table[:extra]}
            holders = {token.anchor: token for token in result.kept}
            for flat in gone:
                assert holders[flat].members == {flat: 1.0}
            for group in groups:
                rest = [f for f in group if f not in gone]
                assert holders[rest[0]].members == pytest.approx({f: 1 / len(rest) for f in rest})
                checked += 1
    assert checked > 500


# --- examples worked by hand ------------------------------------------------------------------------------------------


def unit_vectors(degrees: list[float]) -> np.ndarray:
    """Points of the unit circle [len(degrees), 2]."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1)


def test_release_by_hand() -> None:
    # Position 0 turns by 0, 10, 30 degrees (13.3 off the mean, 3.3, 16.7), position 1 by 0, 5, 12 (5.7, 0.7, 6.3).
    x = np.stack([unit_vectors([0, 10, 30]), unit_vectors([0, 5, 12])], axis=1)
    scores = np.zeros((3, 2))

    def anchors_and_members(keep: int, order: str = "raster") -> list[tuple[int, list[int]]]:
        result = reduce_video(x, scores, keep=keep, exact=True, tau=0.9, order=order)
        assert (result.segments, result.removed) == ([(0, 2)], 4)
        return [(token.anchor, sorted(token.members)) for token in result.kept]

    assert anchors_and_members(2) == [(0, [0, 2, 4]), (1, [1, 3, 5])]
    assert anchors_and_members(3) == [(0, [0, 2]), (1, [1, 3, 5]), (4, [4])]
    assert anchors_and_members(4) == [(0, [0]), (1, [1, 3, 5]), (2, [2]), (4, [4])]
    assert anchors_and_members(5) == [(0, [0]), (1, [1, 3]), (2, [2]), (4, [4]), (5, [5])]
    assert anchors_and_members(6) == [(flat, [flat]) for flat in range(6)]
    # Static tokens of the segment first, by position: the one at position 0 now stands at frame 1 (flat 2).
    assert anchors_and_members(4, "segment") == [(2, [2]), (1, [1, 3, 5]), (0, [0]), (4, [4])]


def test_release_ties_go_by_frame_then_position() -> None:
    # Axis vectors of length one, three times the same frame: every cosine is exactly 1 in any precision.
    x = np.stack([np.eye(2)] * 3)
    for keep, alone in [(2, []), (3, [0]), (4, [0, 1]), (5, [0, 1, 2, 4]), (6, [0, 1, 2, 3, 4, 5])]:
        kept = reduce_video(x, np.zeros((3, 2)), keep=keep, exact=True, tau=TAU).kept
        assert [token.anchor for token in kept if len(token.members) == 1] == alone


def test_shares_by_hand() -> None:
    # Positions 0-2 stay, 3 and 4 flip their sign: units of 3 static, 2 and 2 dynamic tokens; 7 enter.
    x = np.ones((2, 5, 2))
    x[:, :3] += np.arange(3)[None, :, None] * [[[1.0, 0.5]]]
    x[1, 3:] *= -1
    scores = np.array([[9, 9, 9, 0.1, 0.2], [9, 9, 9, 0.7, 0.7]])

    def units(**budget: float) -> list[int]:
        exact = "keep" in budget
        result = reduce_video(x, scores, exact=exact, tau=TAU, order="segment", **budget)  # type: ignore[arg-type]
        assert result.removed == 3
        static = sum(token.anchor in (0, 1, 2) for token in result.kept)
        first = sum(token.anchor in (3, 4) for token in result.kept)
        return [static, first, len(result.kept) - static - first]

    assert units(keep=1) == [1, 0, 0]  # remainders 3, 2, 2
    assert units(keep=4) == [2, 1, 1]  # 12/7, 8/7, 8/7
    assert units(keep=5) == [2, 2, 1]  # 15/7, 10/7, 10/7: the earlier of two equal remainders
    assert units(keep=6) == [2, 2, 2]  # 18/7, 12/7, 12/7
    assert units(keep=7) == [3, 2, 2]
    assert units(retain=0.5) == [2, 2, 2]  # r' = 5/7: round(2.14), ceil(1.43) twice
    assert units(retain=0.35) == [2, 1, 1]  # r' = 1/2: round(1.5) = 2, ceil(1.0)

    kept = reduce_video(x, scores, keep=4, exact=True, tau=TAU, order="segment").kept
    assert [token.anchor for token in kept][2:] == [4, 8]  # the higher score; of two equal ones the lower position


def test_rounding_by_hand() -> None:
    x = np.random.default_rng(0).normal(size=(1, 100, 3))
    scores = np.zeros((1, 100))
    assert 0.07 * 100 > 7  # the float error that the guard takes back
    assert len(reduce_video(x, scores, retain=0.07, exact=False, tau=TAU).kept) == 7
    # Five static positions at r' = 1/2: 2.5 rounds to even.
    still = np.repeat(x[:, :5], 2, axis=0)
    assert len(reduce_video(still, np.zeros((2, 5)), retain=0.25, exact=False, tau=TAU).kept) == 2
    # retain * T * N from left to right: 10.500000000000002 rounds to 11.
    assert len(reduce_video(np.ones((7, 15, 1)), np.zeros((7, 15)), retain=0.1, exact=False, tau=TAU).kept) == 11
    # Everything rounds to nothing: the earliest unit keeps one.
    assert len(reduce_video(still[:, :1], np.zeros((2, 1)), retain=0.1, exact=False, tau=TAU).kept) == 1
    assert len(reduce_video(still, np.zeros((2, 5)), retain=0.01, exact=False, tau=TAU).kept) == 1


def test_clustering_by_hand() -> None:
    # Neighbour distances 0.5, 0.5, 0.7, 0.4, 0.4; peaks are the first of each close pair: points 0 and 3.
    points = np.array([1.0, 1.5, 2.2, 4.0, 4.4])[:, None]
    assert density_peaks(points, 2, 7) == ([0, 3], [0, 0, 0, 3, 3])

    x = np.stack([points, points])
    scores = np.zeros((2, 5))
    result = reduce_video(x, scores, keep=2, exact=True, tau=TAU)
    assert [token.anchor for token in result.kept] == [0, 3]
    assert result.kept[0].members == pytest.approx({0: 0.3, 5: 0.3, 1: 0.1, 6: 0.1, 2: 0.1, 7: 0.1})
    assert result.kept[1].members == pytest.approx({3: 0.3, 8: 0.3, 4: 0.2, 9: 0.2})
    np.testing.assert_allclose(result.merge(x.reshape(10, 1))[:, 0], [1.34, 4.16])
    plain = reduce_video(x, scores, keep=2, exact=True, tau=TAU, beta=None)
    np.testing.assert_allclose(plain.merge(x.reshape(10, 1))[:, 0], [4.7 / 3, 4.2])


def test_clustering_ties_go_to_the_lower_index() -> None:
    # One centre: every density is exp(0); point 0 is the densest by index and takes the largest distance.
    assert density_peaks(np.array([[0.0], [5.0], [5.0]]), 1, 7) == ([0], [0, 0, 0])
    # All points equal: all peaks are 0.
    assert density_peaks(np.ones((4, 2)), 2, 7) == ([0, 1], [0, 1, 0, 0])
    # Three equal densities; peaks 4, 2, 2 (times the density).
    assert density_peaks(np.array([[-2.0], [0.0], [2.0]]), 2, 7) == ([0, 1], [0, 1, 1])
    # The middle point is as near to one centre as to the other.
    assert density_peaks(np.array([[-2.0], [-2.0], [0.0], [2.0], [2.0]]), 2, 7) == ([0, 3], [0, 0, 0, 3, 3])


def test_clustering_scales_with_the_square_root_of_the_width() -> None:
    # Zero columns widen the space: distances shrink, so that far points count as denser relative to near ones.
    points = np.random.default_rng(5).normal(size=(9, 2))
    wide = np.concatenate([points, np.zeros((9, 6))], axis=1)
    for count in range(1, 9):
        assert density_peaks(wide, count, 3) == density_peaks(points / 2, count, 3)


# --- attention and inner merge ----------------------------------------------------------------------------------------


def test_received_attention() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))
    logits = 0.5 * q @ k.transpose(0, 2, 1)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    received = received_attention(q, k, 0.5)
    np.testing.assert_allclose(received, weights.mean(axis=(0, 1)))
    assert received.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(received_attention(np.zeros_like(q), k, 0.5), 0.2)
    # One head, two keys, by hand: rows (2/3, 1/3) and (1/2, 1/2).
    one = received_attention(np.array([[[1.0], [0.0]]]), np.array([[[math.log(2)], [0.0]]]), 1.0)
    np.testing.assert_allclose(one, [7 / 12, 5 / 12])


def test_inner_merge_by_hand() -> None:
    hidden = np.array([[9.0, 9.0], [1.0, 0.0], [2.0, 0.5], [0.0, 1.0], [4.0, -1.0], [7.0, 0.0]])
    video = np.array([False, True, True, True, True, False])
    scores = np.array([1.0, 0.5, 0.1, 0.5, 0.2, 1.0])
    sizes = np.array([1.0, 1.0, 3.0, 2.0, 4.0, 1.0])
    # Rows 1 and 3 stay; 2 and 4 are most like row 1 (row 5 is more so, but it is text).
    for mode, first in {"drop": [1, 0], "pairwise": [2.75, -0.375], "mean": [23 / 8, -2.5 / 8]}.items():
        rows, new = inner_merge(hidden, video, scores, sizes, 0.5, mode)
        assert rows == [0, 1, 3, 5]
        np.testing.assert_allclose(new, [[9, 9], first, [0, 1], [7, 0]])


def test_inner_merge_edges() -> None:
    rng = np.random.default_rng(1)
    hidden, sizes = rng.normal(size=(6, 3)), np.ones(6)
    everything, nothing = np.ones(6, dtype=bool), np.zeros(6, dtype=bool)
    for mode in ("drop", "pairwise", "mean"):
        rows, new = inner_merge(hidden, everything, np.zeros(6), sizes, 1.0, mode)
        assert rows == list(range(6))
        np.testing.assert_array_equal(new, hidden)
        rows, new = inner_merge(hidden, nothing, np.zeros(6), sizes, 0.5, mode)
        assert rows == list(range(6))
        np.testing.assert_array_equal(new, hidden)
        assert inner_merge(hidden, everything, np.zeros(6), sizes, 0.01, mode)[0] == [0]  # at least one; ties by index
        assert inner_merge(hidden[:5], everything[:5], np.zeros(5), sizes[:5], 0.5, mode)[0] == [0, 1]  # 2.5 to even
    # Rows 0 and 1 point the same way: the dropped row goes to the lower one.
    same = np.array([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    _, new = inner_merge(same, everything[:3], np.array([2.0, 2.0, 1.0]), sizes[:3], 0.67, "mean")
    np.testing.assert_allclose(new, [[2.5, 0], [2, 0]])


def test_inner_mean_does_not_depend_on_the_order_of_tokens_and_pairwise_does() -> None:
    rng = np.random.default_rng(2)
    hidden, scores, sizes = rng.normal(size=(12, 4)), rng.random(12), rng.integers(1, 6, size=12).astype(float)
    video = np.ones(12, dtype=bool)
    shuffle = rng.permutation(12)
    for mode, invariant in {"mean": True, "drop": True, "pairwise": False}.items():
        rows, new = inner_merge(hidden, video, scores, sizes, 0.25, mode)
        rows_s, new_s = inner_merge(hidden[shuffle], video, scores[shuffle], sizes[shuffle], 0.25, mode)
        back = {int(shuffle[row]): new_s[i] for i, row in enumerate(rows_s)}
        assert sorted(back) == rows
        assert np.allclose([back[row] for row in rows], new) is invariant


# --- the authors' procedure -------------------------------------------------------------------------------------------


def compare_with_authors(
    kind: str, seed: int, shape: tuple[int, int, int], retain: float, beta: float = 0.6, tau: float = TAU
) -> int:
    """Hold `authors_outer` against the oracle on one random video; returns the number of static tokens it clustered."""
    T, N, D = shape
    x, scores = make_video(kind, seed, T, N, D)
    merged, segments = authors_outer(
        torch.tensor(x, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32), retain, tau, beta
    )
    result = reduce_video(x, scores, retain=retain, exact=False, tau=tau, beta=beta, order="segment")
    assert segments == result.segments
    if len(merged) == 0:  # the authors may keep nothing at all, the oracle then keeps one
        assert len(result.kept) == 1
        return 0
    expected = result.merge(x.reshape(T * N, D))
    assert merged.shape == expected.shape
    np.testing.assert_allclose(merged.double().numpy(), expected, atol=2e-5, rtol=1e-5)
    return sum(len({flat % N for flat in token.members}) > 1 for token in result.kept)


@pytest.mark.parametrize("seed", range(50))
def test_the_authors_procedure_agrees(seed: int) -> None:
    rng = np.random.default_rng([seed, 99])
    # At most 25 positions: there cdist takes differences, so that equal densities are equal on both sides.
    shape = (int(rng.integers(1, 9)), int(rng.integers(1, 26)), int(rng.integers(3, 17)))
    kind = ("mixed", "static", "different", "cuts")[seed % 4]
    compare_with_authors(
        kind, seed, shape, float(rng.choice([0.05, 0.1, 0.2, 0.5])), float(rng.choice([0.6, 0.3, 1.0]))
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_authors_procedure_agrees_on_larger_frames(seed: int) -> None:
    assert compare_with_authors("mixed", seed, (6, 49, 24), 0.25) > 0


def test_the_authors_noise_is_off_unless_asked_for() -> None:
    x, scores = make_video("static", 0, 4, 20, 8)
    features, importance = torch.tensor(x, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32)
    state = torch.random.get_rng_state()
    first, _ = authors_outer(features, importance, 0.1, TAU)
    assert torch.equal(torch.random.get_rng_state(), state)
    again, _ = authors_outer(features, importance, 0.1, TAU)
    assert torch.equal(first, again)
    noisy, _ = authors_outer(features, importance, 0.1, TAU, noise=True)
    assert noisy.shape == first.shape
    assert not torch.equal(torch.random.get_rng_state(), state)
    torch.random.set_rng_state(state)
