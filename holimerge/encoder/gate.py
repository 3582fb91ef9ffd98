"""What did not change in the pixels takes the features of the last frame in which it was encoded.

After the gating of Gated Residual Tokenization. A unit of two sizes:

* a frame (a temporal step): a frame is encoded as a whole, or it takes all its features from the last one that was.
  With both limits at zero that is what encoding it again would give, since frames do not see each other; above zero,
  what moved in a frame that is not encoded is lost.
* a place: a patch, or in towers with a merger the patches that become one token. A place that changed since the frame
  it was last encoded in is encoded anew, any other takes its features (and its score) from that frame. The first frame
  is whole, and so is one in which many places changed (a cut, a moving camera). What is left of any other frame runs
  through the tower as a shorter frame: its places attend to each other and to nothing that did not change. That is an
  approximation beyond the gate itself, and exact only where nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Places = Callable[[Tensor], Tensor]


def gate_sources(frames: Tensor, places: Places, threshold: float, changed: float) -> Tensor:
    """Which frame each frame takes its features from: itself, or the last one before it that is encoded.

    Args:
        frames: [T, ...], pixel values as the tower gets them.
        places: one frame [...] -> the pixel values of its patches [N, V].
        threshold: a patch has changed if its mean absolute difference is above it.
        changed: a frame is encoded if more than this share of its patches has changed.

    Returns:
        [T] int64, ascending. Found without asking the device.
    """
    source = torch.zeros(frames.shape[0], dtype=torch.long, device=frames.device)
    last = source[:1]
    for t in range(1, frames.shape[0]):
        moved = _moved(places(frames[t]), places(frames.index_select(0, last)[0]), threshold)
        # counts, not a mean: a share of 0 must mean none at all
        encode = moved.sum() > changed * moved.numel()
        last = torch.where(encode, t, last)
        source[t] = last[0]
    return source


def place_sources(frames: Tensor, places: Places, threshold: float, changed: float) -> Tensor:
    """Which frame each place takes its features from: its own, or the last one before it that it is encoded in.

    Args:
        frames, places, threshold: as in `gate_sources`.
        changed: all places of a frame are encoded if more than this share of them has changed.

    Returns:
        [T, N] int64, ascending along T. Found without asking the device.
    """
    seen = places(frames[0])
    last = torch.zeros(len(seen), dtype=torch.long, device=frames.device)
    sources = [last]
    for t in range(1, frames.shape[0]):
        now = places(frames[t])
        moved = _moved(now, seen, threshold)
        moved = moved | (moved.sum() > changed * moved.numel())
        seen = torch.where(moved[:, None], now, seen)
        last = torch.where(moved, t, last)
        sources.append(last)
    return torch.stack(sources)


def _moved(now: Tensor, before: Tensor, threshold: float) -> Tensor:
    difference = (now.float() - before.float()).abs().mean(-1)
    return ~(difference <= threshold)  # also what is not a number


def encoded_frames(sources: Tensor) -> tuple[list[int], Tensor]:
    """Frames in which any place is encoded. sources: [T, N] on the host, as `place_sources` gives them.

    Returns:
        of every frame the last one up to it that is encoded; and the sources of those that are [T', N], numbered among
        themselves. A frame that is not encoded looks like that last one, place by place.
    """
    frames = torch.arange(len(sources), device="cpu")
    any_place = (sources == frames[:, None]).any(1)
    left = frames[any_place]
    return frames.where(any_place, 0).cummax(0).values.tolist(), torch.searchsorted(left, sources[any_place])


def row_sources(sources: Tensor, unit: int = 1, fixed: int = 0, order: Tensor | None = None) -> Tensor:
    """Which row of a video's hidden states each row takes its features from.

    Args:
        sources: [T, N] on the host; any place of every frame is encoded.
        unit: rows of a place.
        fixed: leading rows of a frame that are no place; they are encoded in every frame.
        order: [N], the places in the order in which the tower has them; None for their own.

    Returns:
        [T (fixed + N unit)] int64, of a video whose rows begin at 0.
    """
    if order is not None:
        sources = sources[:, order]
    every = torch.arange(len(sources), device="cpu")[:, None].expand(-1, fixed)
    frame = torch.cat([every, sources.repeat_interleave(unit, 1)], 1)
    return (frame * frame.shape[1] + torch.arange(frame.shape[1], device="cpu")).flatten()
