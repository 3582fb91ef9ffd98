"""Merging whole frames between two blocks of a vision tower (EarlyTom, arXiv 2605.30010, stage I).

Differs from the paper where its text and its authors' defects leave room: equal similarities count as "larger", so
that a still video is merged at all; no middle frame is lost at a segment's end; negative similarities weigh nothing;
received attention is read in the last block and is not merged on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..tokens import upload

MEMORY = 0.9  # weight of the newest similarity in the running one


@dataclass(frozen=True)
class FrameMerge:
    """Which frames of a video become one.

    pairs: per remaining frame (i, j, w): w times frame i plus (1 - w) times frame j; (i, i, 1.0) for one that is kept.
    """

    pairs: tuple[tuple[int, int, float], ...]

    @property
    def nothing(self) -> bool:
        """Whether every frame is kept."""
        return all(i == j for i, j, _ in self.pairs)

    @cached_property
    def owner(self) -> list[int]:
        """Per frame, the remaining frame that stands for it."""
        return [place for place, (i, j, _) in enumerate(self.pairs) for _ in range(j - i + 1)]

    def merged(self, x: Tensor) -> Tensor:
        """[T', N, C] of x [T, N, C], in its dtype; a frame that is kept keeps its bits."""
        result = x[upload([i for i, _, _ in self.pairs], x.device)]
        for place, (i, j, w) in enumerate(self.pairs):
            if i != j:
                result[place] = w * x[i].float() + (1 - w) * x[j].float()
        return result


def frame_similarity(x: Tensor, reach: int) -> Tensor:
    """Mean over tokens of the cosine of a frame's token and the same token up to `reach` frames later.

    Args:
        x: [T, N, C], any float dtype.

    Returns:
        [T, reach] float32: entry (t, d - 1) compares frames t and t + d; 0 past the end.
    """
    frames = x.shape[0]
    result = x.new_zeros((frames, reach), dtype=torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp_min(1e-12)
    for t in range(frames - 1):  # frame by frame: no second copy of the video in float32
        later = slice(t + 1, t + 1 + reach)
        products = (x[later].float() * x[t].float()).sum(-1)
        found = (products / (norm[later] * norm[t])).mean(-1)
        result[t, : found.shape[0]] = found
    return result


def plan_frames(similarity: list[list[float]], threshold: float, longest: int, merge: float | None) -> FrameMerge:
    """Which frames merge.

    Segments: the first frame of the running segment is the reference; the running similarity of frame t is
    0.9 sim(reference, t) + 0.1 of the one before (1 at a segment's start); below `threshold`, or after `longest`
    frames, a new segment starts. First and last frame of a segment stay. Of the frames between them, i and i + 1 become
    one if their similarity s_i reaches the merge threshold and s_{i+1}, with weights s_i and s_{i+1}; of the last two,
    frame i + 1 is dropped.

    Args:
        similarity: as `frame_similarity` gives, at least `longest` - 1 wide.
        threshold: of the running similarity, in (0, 1].
        longest: frames of a segment, at least 1.
        merge: the merge threshold; None for the similarity of the segment's first and last frame.
    """
    frames = len(similarity)
    pairs: list[tuple[int, int, float]] = []
    start = 0
    while start < frames:
        end, running = start + 1, 1.0
        while end < frames and end - start < longest:
            running = MEMORY * similarity[start][end - start - 1] + (1 - MEMORY) * running
            if running < threshold:
                break
            end += 1
        pairs += _segment(similarity, start, end - 1, merge)
        start = end
    return FrameMerge(tuple(pairs))


def _segment(similarity: list[list[float]], first: int, last: int, merge: float | None) -> list[tuple[int, int, float]]:
    if first == last:
        return [(first, first, 1.0)]
    least = similarity[first][last - first - 1] if merge is None else merge
    pairs = [(first, first, 1.0)]
    i = first + 1
    while i < last:
        next_to_last = i + 1 == last - 1  # i and i + 1 are the last two between the segment's ends
        if i + 1 < last:
            here = similarity[i][0]
            after = 0.0 if next_to_last else similarity[i + 1][0]
            if here >= least and (next_to_last or here >= after):
                here, after = max(here, 0.0), max(after, 0.0)
                pairs.append((i, i + 1, here / (here + after) if here + after > 0 else 1.0))
                i += 2
                continue
        pairs.append((i, i, 1.0))
        i += 1
    return [*pairs, (last, last, 1.0)]
