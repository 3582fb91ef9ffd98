"""The maths of `holimerge.encoder` again, slowly, from the formulas. Plain Python numbers and numpy float64."""

from __future__ import annotations

import numpy as np


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def frame_cosine(x: np.ndarray, i: int, j: int) -> float:
    """Mean over tokens of the cosine of frames i and j; x: [T, N, C]."""
    return float(np.mean([cosine(a, b) for a, b in zip(x[i], x[j], strict=True)]))


def merged_frames(
    x: np.ndarray, threshold: float, longest: int, merge: float | None
) -> list[tuple[list[int], np.ndarray]]:
    """EarlyTom, stage I: per remaining frame, its members and its tokens [N, C]."""
    segments: list[list[int]] = []
    running = 1.0
    for t in range(len(x)):
        if segments:
            running = 0.9 * frame_cosine(x, segments[-1][0], t) + 0.1 * running
        if not segments or running < threshold or len(segments[-1]) == longest:
            segments.append([])
            running = 1.0
        segments[-1].append(t)
    result = []
    for segment in segments:
        middle = segment[1:-1]
        least = frame_cosine(x, segment[0], segment[-1]) if merge is None else merge
        result.append(([segment[0]], x[segment[0]]))
        while middle:
            i = middle.pop(0)
            here = frame_cosine(x, i, middle[0]) if middle else -np.inf
            after = frame_cosine(x, middle[0], middle[1]) if len(middle) > 1 else None
            if here >= least and middle and (after is None or here >= after):
                j = middle.pop(0)
                w = 1.0 if after is None else max(here, 0.0) / (max(here, 0.0) + max(after, 0.0))
                result.append(([i, j], w * x[i] + (1 - w) * x[j]))
            else:
                result.append(([i], x[i]))
        if len(segment) > 1:
            result.append(([segment[-1]], x[segment[-1]]))
    return result


def merged_tokens(metric: np.ndarray, r: int, fixed: int) -> list[list[int]]:
    """ToMe for one frame: the members of every remaining token, in raster order of the token in whose place it stands.

    metric: [n, d]. The first member of a group is that token.
    """
    n = len(metric)
    first, second = list(range(fixed, n, 2)), list(range(fixed + 1, n, 2))
    best = []
    for a in first if second else []:
        cosines = [cosine(metric[a], metric[b]) for b in second]
        partner = max(range(len(second)), key=lambda k: (cosines[k], -k))
        best.append((-cosines[partner], a, second[partner]))
    groups = {i: [i] for i in range(n)}
    for _, a, b in sorted(best)[: min(r, len(second))]:
        groups[b] += groups.pop(a)
    return [groups[i] for i in sorted(groups)]


def sources(frames: np.ndarray, threshold: float, changed: float) -> list[int]:
    """Which frame each frame takes its features from; frames: [T, P, V], patches by their pixel values."""
    encoded = [0]
    result = [0]
    for t in range(1, len(frames)):
        last = frames[encoded[-1]]
        moved = [
            np.mean([abs(a - b) for a, b in zip(p, q, strict=True)]) > threshold
            for p, q in zip(frames[t], last, strict=True)
        ]
        if sum(moved) > changed * len(moved):
            encoded.append(t)
        result.append(encoded[-1])
    return result


def place_sources(frames: np.ndarray, threshold: float, changed: float) -> list[list[int]]:
    """Which frame each place takes its features from; frames: [T, N, V], places by their pixel values."""
    result = [[0] * len(frames[0])]
    for t in range(1, len(frames)):
        moved = []
        for place, source in enumerate(result[-1]):
            mean = np.mean([abs(a - b) for a, b in zip(frames[t][place], frames[source][place], strict=True)])
            moved.append(bool(mean > threshold or np.isnan(mean)))
        whole = sum(moved) > changed * len(moved)
        result.append([t if whole or m else source for m, source in zip(moved, result[-1], strict=True)])
    return result
