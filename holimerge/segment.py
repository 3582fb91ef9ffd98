"""Temporal segmentation: which runs of frames share so many tokens that one frame can stand for them.

HoliTom (arXiv 2505.21334), global redundancy-aware temporal merging. Memory and time are O(T^2 + T N).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = {"cuda": 2**25}  # values of a float32 copy held at once; elsewhere those of one frame
ROUNDING = 2.0**-16  # a cosine closer to 1 than this is 1: float32 sums over a few thousand numbers stray less


def pair_cosines(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of every token with the token at the same position in the next frame.

    Args:
        x: [T, N, D].

    Returns:
        cosines [T-1, N] in [-1, 1] and norms [T, N], both float32 (float64 for float64); a zero vector has cosine 0.
    """
    frames, per_frame, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    dots = x.new_empty(max(frames - 1, 0), per_frame, dtype=dtype)
    norm = x.new_empty(frames, per_frame, dtype=dtype)
    # A few frames at a time through the same buffers: no float32 copy of all features is held, and on a CPU fresh
    # memory costs more than the arithmetic. On a GPU fewer, larger steps are faster.
    step = min(frames, max(1, _AT_ONCE.get(x.device.type, 0) // (per_frame * width)))
    half = x.dtype != dtype
    copies = int(half) * (1 if x.is_cuda else 2)  # a GPU multiplies two dtypes as fast as one
    product, *copied = (x.new_empty(step, per_frame, width, dtype=dtype) for _ in range(1 + copies))
    for start in range(0, frames, step):
        here = x[start : start + step]
        there = x[start + 1 : start + 1 + step]
        if half:
            here = copied[0][: here.shape[0]].copy_(here)
        torch.linalg.vector_norm(here, dim=-1, out=norm[start : start + step])
        pairs = there.shape[0]
        if pairs:
            if copies == 2:
                there = copied[1][:pairs].copy_(there)
            torch.mul(here[:pairs], there, out=product[:pairs])
            torch.sum(product[:pairs], dim=-1, out=dots[start : start + pairs])
    return (dots / (norm[:-1] * norm[1:]).clamp_min(1e-12)).clamp(-1, 1), norm


def unchanged(cosine: Tensor, similarity: float) -> Tensor:
    """Which tokens count as unchanged between two frames: those whose cosine exceeds `similarity`.

    A cosine of 1 always counts (within rounding, see ROUNDING), so that with `similarity` 1 equal tokens do.

    Args:
        cosine: [T-1, N] from `pair_cosines`.

    Returns:
        [T-1, N] bool.
    """
    return cosine > min(similarity, 1 - ROUNDING)


def run_lengths(static: Tensor) -> Tensor:
    """For every pair of frames and position: how many static pairs in a row end here.

    Args:
        static: [P, N] bool, pair p joins frames p and p + 1.

    Returns:
        [P, N] int64, between 0 and p + 1.
    """
    pair = torch.arange(static.shape[0], device=static.device)[:, None]
    last_change = torch.where(static, -1, pair).cummax(0).values if static.shape[0] else pair.expand_as(static)
    return pair - last_change


def window_counts(runs: np.ndarray) -> np.ndarray:
    """How many positions are static through every window of frames.

    Args:
        runs: [P, N] integers from `run_lengths`.

    Returns:
        [P, P + 2] int64: entry (e, w) counts the positions whose run ending at pair e is at least w pairs long.
    """
    pairs = runs.shape[0]
    row = np.arange(pairs)[:, None] * (pairs + 2)
    histogram = np.bincount((row + runs).ravel(), minlength=pairs * (pairs + 2)).reshape(pairs, pairs + 2)
    return histogram[:, ::-1].cumsum(1)[:, ::-1]


def optimal_segments(counts: np.ndarray, max_segment: int | None = None) -> tuple[list[tuple[int, int]], int]:
    """The segmentation that lets temporal merging remove the most tokens (global optimum, dynamic programme).

    A segment of w > 1 frames in which `c` positions never change removes c (w - 1) tokens.

    Args:
        counts: [T-1, T+1] integers from `window_counts`.
        max_segment: longest segment in frames; None for no limit.

    Returns:
        first and last frame of each segment, in time order, and R, the tokens removed. Among equal optima the last
        segment is as short as possible.
    """
    frames = counts.shape[0] + 1
    best = np.zeros(frames + 1, dtype=np.int64)  # best[i]: most tokens removed from the first i frames
    start = np.arange(-1, frames, dtype=np.int64)  # start[i]: first frame of the segment that ends at frame i - 1
    saved = counts * np.arange(counts.shape[1])  # [e, w]: what a segment of w + 1 frames ending with pair e removes
    for i in range(2, frames + 1):
        longest = i if max_segment is None else min(i, max_segment)
        best[i] = best[i - 1]
        if longest < 2:
            continue
        gain = best[i - longest : i - 1][::-1] + saved[i - 2, 1:longest]
        top = int(gain.argmax())  # the first of equals: the shortest window
        if gain[top] > best[i]:
            best[i], start[i] = gain[top], i - 2 - top
    segments: list[tuple[int, int]] = []
    end = frames
    while end > 0:
        segments.append((int(start[end]), end - 1))
        end = int(start[end])
    return segments[::-1], int(best[frames])
