"""Slow, plain oracle of HoliTom's outer reduction and inner merge, written from the formulas.

Source: HoliTom (arXiv 2505.21334, NeurIPS 2025) as released: segmentation, temporal and spatial merging, inner merge.
It imports nothing from holimerge and uses no torch: float64 numpy and Python loops, one line of code per line of the
description wherever possible, so that a mistake of the fast code is not repeated here. Speed does not matter.

Words: T frames, N tokens per frame, D width; the flat index of token (frame t, position n) is t*N + n; a *segment* is a
run of frames; a *static group* is one position of a segment whose neighbouring frames are all alike there; every other
token is *dynamic*; the *anchor* is the original token at whose place a kept token stands.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Segment = tuple[int, int]  # first and last frame, both inclusive


@dataclass(frozen=True)
class KeptToken:
    """One token of the reduced sequence: where it stands, and which original tokens it holds with what weight."""

    anchor: int  # flat index t*N + n
    members: dict[int, float]  # flat index -> weight; the weights sum to 1


@dataclass(frozen=True)
class OracleResult:
    """The record of one reduction; it merges any per-token array of the same video."""

    segments: list[Segment]
    removed: int  # R, the tokens that temporal merging alone would remove
    kept: list[KeptToken]  # in sequence order
    total: int  # T*N

    def merge(self, y: NDArray[Any]) -> Floats:
        """Apply the record to `y` [T*N, ...] and return the merged array [K, ...] in float64."""
        y = np.asarray(y, dtype=np.float64)
        if y.shape[0] != self.total:
            raise ValueError(f"y has {y.shape[0]} rows, the record needs {self.total}")
        out = np.zeros((len(self.kept), *y.shape[1:]))
        for ordinal, token in enumerate(self.kept):
            for flat, weight in token.members.items():
                out[ordinal] += weight * y[flat]
        return out

    def assignment(self) -> tuple[NDArray[np.int64], Floats]:
        """For every original token the ordinal of the kept token that holds it, or -1, and its weight: [T*N] each."""
        owner = np.full(self.total, -1, dtype=np.int64)
        weights = np.zeros(self.total)
        for ordinal, token in enumerate(self.kept):
            for flat, weight in token.members.items():
                assert owner[flat] == -1, f"token {flat} is held twice"
                owner[flat] = ordinal
                weights[flat] = weight
        return owner, weights


# --- shared formulas ------------------------------------------------------------------------------------------------


def cosine(a: Floats, b: Floats) -> float:
    """Cosine of two vectors [D]; a zero vector gives 0."""
    return float(np.dot(a, b)) / max(math.sqrt(float(np.dot(a, a))) * math.sqrt(float(np.dot(b, b))), 1e-12)


def received_attention(q: Floats, k: Floats, scale: float) -> Floats:
    """Attention each key receives: the mean over heads and queries of softmax(scale * q k^T).

    `q`, `k`: [heads, n, d] of one frame. Returns [n]; the entries sum to 1.
    """
    heads, n, _ = q.shape
    received = np.zeros(n)
    for h in range(heads):
        for i in range(n):
            logits = [scale * float(np.dot(q[h, i], k[h, j])) for j in range(n)]
            top = max(logits)
            exps = [math.exp(value - top) for value in logits]
            for j in range(n):
                received[j] += exps[j] / sum(exps) / (heads * n)
    return received


# --- segmentation (1a.1 to 1a.3) ------------------------------------------------------------------------------------


def static_flags(x: Floats, tau: float) -> Bools:
    """Static flags [T-1, N] of `x` [T, N, D]: is token (t, n) more than `tau` like token (t+1, n)?

    Tokens that differ by no more than rounding (a cosine above 1 - 2**-16) are alike also where `tau` is 1.
    """
    T, N, _ = x.shape
    flags = np.zeros((T - 1, N), dtype=bool)
    for t in range(T - 1):
        for n in range(N):
            alike = cosine(x[t, n], x[t + 1, n])
            flags[t, n] = alike > tau or (tau <= 1 and alike > 1 - 2**-16)
    return flags


def static_positions(flags: Bools, start: int, end: int) -> list[int]:
    """Positions of segment [start, end] whose pair flags are all true; none in a segment of one frame."""
    if start == end:
        return []
    return [n for n in range(flags.shape[1]) if all(flags[t, n] for t in range(start, end))]


def gain(flags: Bools, start: int, end: int) -> int:
    """Tokens removed when the static positions of [start, end] become one frame: G(s, e) = cnt(s, e) (e - s)."""
    return len(static_positions(flags, start, end)) * (end - start)


def segment_dp(flags: Bools, max_segment: int | None = None) -> tuple[list[Segment], int]:
    """Best segmentation by the dynamic programme of 1a.3, with its tie rule.

    `flags`: [T-1, N]; `max_segment`: longest segment in frames, None for no limit. Returns the segments in time order
    and the objective R, the number of tokens removed.
    """
    T = flags.shape[0] + 1
    best = [0] * T  # best[i]: most tokens removed among frames 0..i
    first = list(range(T))  # first[i]: first frame of the segment that ends at i
    for i in range(T):
        best[i] = best[i - 1] if i > 0 else 0  # frame i alone
        longest = i + 1 if max_segment is None else min(i + 1, max_segment)
        for w in range(2, longest + 1):
            start = i - w + 1
            candidate = (best[start - 1] if start > 0 else 0) + gain(flags, start, i)
            if candidate > best[i]:  # strictly: on a tie the shorter last segment stays
                best[i] = candidate
                first[i] = start
    segments: list[Segment] = []
    end = T - 1
    while end >= 0:
        segments.insert(0, (first[end], end))
        end = first[end] - 1
    return segments, best[T - 1]


def segment_brute_force(flags: Bools, max_segment: int | None = None) -> int:
    """Best objective over all 2^(T-1) segmentations of `flags` [T-1, N], each one counted out token by token."""
    pairs, N = flags.shape
    best = 0
    for cuts in range(2**pairs):  # bit t: a segment ends after frame t
        bounds = [0, *(t + 1 for t in range(pairs) if cuts >> t & 1), pairs + 1]
        objective = 0
        allowed = True
        for start, stop in itertools.pairwise(bounds):
            if max_segment is not None and stop - start > max_segment:
                allowed = False
            for n in range(N):
                if np.all(flags[start : stop - 1, n]):
                    objective += stop - start - 1  # all its tokens but one go; a segment of one frame loses none
        if allowed:
            best = max(best, objective)
    return best


# --- density-peak clustering of a segment's static set (section 0, 1b) ----------------------------------------------


def density_peaks(points: Floats, centres: int, neighbours: int) -> tuple[list[int], list[int]]:
    """Density-peak clustering without noise; every tie goes to the lower index.

    `points`: [n, D]; `centres`: how many, 0 < centres < n. Returns the centres' indices ascending, and for every point
    the index of its centre (a centre's is itself).
    """
    n, D = points.shape
    assert 0 < centres < n
    dist = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            dist[i, j] = math.sqrt(sum(float(v) ** 2 for v in points[i] - points[j])) / math.sqrt(D)

    k = min(neighbours, centres)
    rho = []
    for i in range(n):
        nearest = sorted(dist[i])[:k]  # includes i itself, at distance 0
        rho.append(math.exp(-sum(float(d) ** 2 for d in nearest) / k))

    gamma = []
    for i in range(n):
        denser = [j for j in range(n) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta = min(dist[i, j] for j in denser) if denser else dist.max()
        gamma.append(rho[i] * float(delta))

    chosen = sorted(sorted(range(n), key=lambda i: (-gamma[i], i))[:centres])
    owner = [i if i in chosen else min(chosen, key=lambda c: (dist[i, c], c)) for i in range(n)]
    return chosen, owner


def spatial_weights(
    points: Floats, count: int, beta: float | None, neighbours: int
) -> list[tuple[int, dict[int, float]]]:
    """Reduce a static set `points` [n, D] to `count` tokens: for each, its centre's index and {point: weight}."""
    n = points.shape[0]
    if count == 0:
        return []
    if count == n:
        return [(i, {i: 1.0}) for i in range(n)]
    chosen, owner = density_peaks(points, count, neighbours)
    tokens = []
    for centre in chosen:
        assigned = [i for i in range(n) if owner[i] == centre and i != centre]
        if not assigned:
            weights = {centre: 1.0}
        elif beta is None:  # plain mean of the centre and its points
            weights = {i: 1.0 / (1 + len(assigned)) for i in (centre, *assigned)}
        else:
            weights = {centre: beta, **{i: (1.0 - beta) / len(assigned) for i in assigned}}
        tokens.append((centre, weights))
    return tokens


# --- budget ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What a share of the budget is given to: a segment's static set (frame None) or one frame's dynamic set."""

    segment: int
    frame: int | None
    positions: list[int]  # never empty


def units_in_time_order(flags: Bools, segments: list[Segment]) -> list[Unit]:
    """All units that hold tokens: for each segment first its static set, then the dynamic set of each of its frames."""
    N = flags.shape[1]
    units = []
    for index, (start, end) in enumerate(segments):
        static = static_positions(flags, start, end)
        if static:
            units.append(Unit(index, None, static))
        dynamic = [n for n in range(N) if n not in static]
        if dynamic:
            units.extend(Unit(index, t, dynamic) for t in range(start, end + 1))
    return units


def authors_counts(units: list[Unit], retain: float, T: int, N: int, removed: int) -> list[int]:
    """Tokens per unit with the authors' rounding: ceil for dynamic units, round-half-even for static ones."""
    # Evaluated from left to right: 0.1 * 7 * 15 is more than 10.5 in floats, 0.1 * 105 is not, and round() sees it.
    ratio = min(retain * T * N / (T * N - removed), 1)
    counts = []
    for unit in units:
        n = len(unit.positions)
        # The guard takes back float error only: 49.00000000001 tokens are 49, not 50.
        counts.append(round(n * ratio) if unit.frame is None else max(0, math.ceil(n * ratio - 1e-9)))
    if sum(counts) == 0:
        counts[0] = 1
    return counts


def exact_counts(units: list[Unit], keep: int, entering: int) -> list[int]:
    """Tokens per unit, `keep` <= `entering` in all: floors, and the rest by largest remainder, earlier unit first."""
    sizes = [len(unit.positions) for unit in units]
    assert sum(sizes) == entering
    counts = [n * keep // entering for n in sizes]
    remainders = [n * keep % entering for n in sizes]
    by_remainder = sorted(range(len(units)), key=lambda u: (-remainders[u], u))
    for u in by_remainder[: keep - sum(counts)]:
        counts[u] += 1
    return counts


def released_members(x: Floats, groups: dict[tuple[int, int], list[int]], number: int) -> set[tuple[int, int]]:
    """The `number` static members (frame, position) that leave their groups, least like the group's mean first.

    `x`: [T, N, D]; `groups`: {(segment, position): frames}. One pass over the groups' full means; the member of a group
    that comes last in the order (cosine ascending, frame, position) stays.
    """
    everyone: list[tuple[int, int, int, int]] = []
    for (segment, n), frames in groups.items():
        mean = sum(x[t, n] for t in frames) / len(frames)
        # on a grid of 2^-20, so that equal members tie instead of being ordered by rounding noise
        everyone.extend((round(cosine(x[t, n], mean) * 2**20), t, n, segment) for t in frames)
    everyone.sort()
    left = {group: len(frames) for group, frames in groups.items()}
    released: set[tuple[int, int]] = set()
    for _, t, n, segment in everyone:
        if len(released) == number:
            break
        # Members are visited in order, so the one that finds itself alone is the group's last.
        if left[segment, n] > 1:
            left[segment, n] -= 1
            released.add((t, n))
    assert len(released) == number
    return released


# --- the outer reduction --------------------------------------------------------------------------------------------


def reduce_video(
    x: Floats,
    scores: Floats,
    *,
    retain: float | None = None,
    keep: int | None = None,
    exact: bool,
    tau: float,
    beta: float | None = 0.6,
    neighbours: int = 7,
    max_segment: int | None = None,
    order: str = "raster",
) -> OracleResult:
    """Reduce one video: segment, merge in time, then in space.

    Args:
        x: token features [T, N, D].
        scores: importance of every token [T, N].
        retain: share of T*N to keep, 0 to 1. With `exact` it means keep = min(T N, max(1, floor(retain T N + 0.5))).
        keep: number of tokens to keep, 1 to T*N; only with `exact`.
        exact: True keeps exactly that many tokens; False follows the authors' rounding.
        tau: cosine above which (strictly) two neighbouring frames count as alike at a position.
        beta: weight of a cluster's centre against the mean of its other points; None for the plain mean of them all.
        neighbours: neighbours of the density estimate (at most the number of centres are used).
        max_segment: longest segment in frames; None for no limit.
        order: "raster" (by anchor) or "segment" (per segment: static tokens, then frame after frame the dynamic ones).
    """
    x = np.asarray(x, dtype=np.float64)
    scores = np.asarray(scores, dtype=np.float64)
    T, N, _ = x.shape
    total = T * N
    if scores.shape != (T, N):
        raise ValueError(f"scores must be [{T}, {N}], not {list(scores.shape)}")
    if (retain is None) == (keep is None):
        raise ValueError("give exactly one of retain and keep")
    if order not in ("raster", "segment"):
        raise ValueError(f"order must be 'raster' or 'segment', not {order!r}")

    flags = static_flags(x, tau)
    segments, removed = segment_dp(flags, max_segment)
    units = units_in_time_order(flags, segments)
    entering = total - removed  # M: tokens after temporal merging

    groups: dict[tuple[int, int], list[int]] = {}  # (segment, position) -> frames of the static group
    for unit in units:
        if unit.frame is None:
            start, end = segments[unit.segment]
            groups.update({(unit.segment, n): list(range(start, end + 1)) for n in unit.positions})

    released: set[tuple[int, int]] = set()
    if not exact:
        if retain is None:
            raise ValueError("the authors' rounding needs retain, not keep")
        counts = authors_counts(units, retain, T, N, removed)
    else:
        if keep is None:
            assert retain is not None
            keep = min(total, max(1, math.floor(retain * total + 0.5)))
        if not 1 <= keep <= total:
            raise ValueError(f"keep must be from 1 to {total}, not {keep}")
        counts = exact_counts(units, min(keep, entering), entering)
        if keep > entering:
            released = released_members(x, groups, keep - entering)
            groups = {(s, n): [t for t in frames if (t, n) not in released] for (s, n), frames in groups.items()}

    per_segment_static: list[list[KeptToken]] = [[] for _ in segments]
    dynamic: list[tuple[int, int]] = sorted(released)
    for unit, count in zip(units, counts, strict=True):
        if unit.frame is None:
            frames_of = [groups[unit.segment, n] for n in unit.positions]
            means = np.stack(
                [
                    sum(x[t, n] for t in frames) / len(frames)
                    for n, frames in zip(unit.positions, frames_of, strict=True)
                ]
            )
            for centre, point_weights in spatial_weights(means, count, beta, neighbours):
                members = {
                    t * N + unit.positions[i]: weight / len(frames_of[i])
                    for i, weight in point_weights.items()
                    for t in frames_of[i]
                }
                anchor = frames_of[centre][0] * N + unit.positions[centre]
                per_segment_static[unit.segment].append(KeptToken(anchor, members))
        else:
            t = unit.frame
            best = sorted(unit.positions, key=lambda n: (-scores[t, n], n))[:count]
            dynamic.extend((t, n) for n in best)

    kept: list[KeptToken] = []
    for (start, end), static in zip(segments, per_segment_static, strict=True):
        kept.extend(sorted(static, key=lambda token: token.anchor % N))
        for t in range(start, end + 1):
            kept.extend(KeptToken(t * N + n, {t * N + n: 1.0}) for n in sorted(n for u, n in dynamic if u == t))
    if order == "raster":
        kept.sort(key=lambda token: token.anchor)
    return OracleResult(segments, removed, kept, total)


# --- the inner merge (1d) -------------------------------------------------------------------------------------------


def inner_merge(
    hidden: Floats, is_video: Bools, query_scores: Floats, sizes: Floats, retain: float, mode: str
) -> tuple[list[int], Floats]:
    """Merge the video tokens of one sequence inside the language model.

    Args:
        hidden: hidden states entering the layer [L, D].
        is_video: which rows are video tokens [L].
        query_scores: attention of the query to every row [L].
        sizes: how many original tokens every row holds [L].
        retain: share of the V video tokens to keep: max(1, round(V retain)) of them, none where V = 0.
        mode: "mean" (weighted by sizes), "pairwise" (the authors' repeated halving) or "drop".

    Returns:
        The kept rows' indices ascending, and their new hidden states [kept, D].
    """
    if mode not in ("mean", "pairwise", "drop"):
        raise ValueError(f"mode must be 'mean', 'pairwise' or 'drop', not {mode!r}")
    hidden = np.asarray(hidden, dtype=np.float64)
    video = [i for i in range(len(hidden)) if is_video[i]]
    count = min(len(video), max(1, round(len(video) * retain)))
    kept_video = sorted(sorted(video, key=lambda i: (-query_scores[i], i))[:count])
    dropped = [i for i in video if i not in kept_video]

    new = hidden.copy()
    if mode != "drop":
        home = {}
        for i in dropped:  # always by the states before any merging
            home[i] = min(kept_video, key=lambda j: (-cosine(hidden[i], hidden[j]), j))
        if mode == "pairwise":
            for i in dropped:
                new[home[i]] = (new[home[i]] + hidden[i]) / 2
        else:
            for j in kept_video:
                together = [j, *(i for i in dropped if home[i] == j)]
                weight = sum(float(sizes[i]) for i in together)
                new[j] = sum(float(sizes[i]) * hidden[i] for i in together) / weight
    rows = [i for i in range(len(hidden)) if not is_video[i] or i in kept_video]
    return rows, new[rows]
