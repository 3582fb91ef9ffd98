"""Single pictures, uint8 `[H, W, 3]`: stacked, scaled, turned upright."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def stacked(pictures: Iterator[np.ndarray], count: int) -> np.ndarray:
    """`count` pictures, uint8 `[H, W, 3]`, as one array; each is let go when the next one comes."""
    first = next(pictures)
    result = np.empty((count, *first.shape), dtype=np.uint8)
    result[0] = first
    for slot, picture in enumerate(pictures, start=1):
        result[slot] = picture
    return result


def scaled(frames: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Scale uint8 `[T, H, W, 3]` to (height, width), bilinear with the filter widened when shrinking."""
    if size is None or frames.shape[1:3] == tuple(size):
        return frames
    from PIL import Image

    to = (int(size[1]), int(size[0]))
    return np.stack([np.asarray(Image.fromarray(f).resize(to, Image.Resampling.BILINEAR)) for f in frames])


def display_turn(frame: Any) -> tuple[bool, bool, bool]:
    """Read the display matrix as (transpose, flip rows, flip columns), applied in this order; nearest right angle."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(side_data, dtype=np.int32)[:5])
    # A picture point (x, y) is shown at (a x + c y, b x + d y), up to a shift.
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def upright(picture: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    transpose, flip_rows, flip_columns = turn
    if transpose:
        picture = picture.transpose(1, 0, 2)
    return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
