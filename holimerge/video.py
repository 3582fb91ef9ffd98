"""Read the frames of a video: `read_video` takes a file, a folder of images, or frames already in memory.

Sampling rules, all over the n frames of the source, or of the part from `start` to `end`:

* `uniform` (LLaVA-OneVision, HoliTom): frame numbers `np.linspace(0, n - 1, frames, dtype=int)`, that is rounded down,
  with the first and the last frame included (one frame alone: the first).
* `left` (LongVideoBench): frame numbers `int(n / frames) * i`, the first frame and whole steps from it.
* `midpoint` (VLMEvalKit): frame numbers `int(n / (frames + 1) * (i + 1))`, away from both ends.
* `fps` (Qwen2-VL, Qwen2.5-VL): m frames spread evenly over the duration D, the i-th being the one on screen at
  `i * D / m`; m is `D * fps` limited to `min_frames ... max_frames` and n, then made even (rounded down, at least 1)
  because these models join frames in pairs. At a constant frame rate this equals transformers' Qwen2VLVideoProcessor;
  at a variable one a frame that is on screen at several of these moments is taken once.

A source with fewer frames than asked gives every frame once: nothing is repeated.

A part holds the frames shown first at `start <= t < end` seconds; a part between two frames is the one on screen then.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .video_backends import OTHER_BACKENDS
from .video_pictures import scaled, stacked
from .video_pyav import FrameTable, TableMismatchError, VideoFile
from .video_write import synthetic_clip, write_video

__all__ = ["BACKENDS", "SAMPLINGS", "Taker", "Video", "read_video", "sample_indices", "synthetic_clip", "write_video"]

BACKENDS = ("auto", "pyav", "torchcodec", "decord")
SAMPLINGS = ("uniform", "left", "midpoint", "fps")
_IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
_DEFAULT_RATE = 2.0  # frames a second of fps sampling, as in Qwen's own utilities


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames and where they come from.

    Attributes:
        frames: uint8 `[T, H, W, 3]` RGB, upright.
        timestamps: float64 `[T]` seconds since the source's first frame; NaN where the source has no clock.
        fps: mean frames a second of the source (not of the sample), or None if unknown.
        duration: length of the source in seconds, or None if unknown.
        total_frames: n, frames in the source, or None if unknown.

            With `start` or `end`, these three are of the part; timestamps and indices stay those of the whole source.
        source: the path, or "array" or "images".
        indices: int64 `[T]` frame numbers within the source, or None if unknown.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    fps: float | None = None
    duration: float | None = None
    total_frames: int | None = None
    source: str = "array"
    indices: np.ndarray | None = None


class Taker:
    """What happens to frames while they are read; this one keeps them as they are."""

    def start(self, count: int) -> None:
        """A reading of `count` frames begins: once, and once more where a file's packets turn out not to be frames."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) to which frames of this size are scaled while decoding."""
        return height, width

    def fit(self, picture: np.ndarray) -> np.ndarray:
        """Change one frame, uint8 `[H, W, 3]`; called in the thread that decoded it, in any order."""
        return picture

    def take(self, pictures: Iterator[np.ndarray], count: int) -> np.ndarray:
        """Take all `count` frames in order, while later ones are being decoded; returns uint8 `[T, H, W, 3]`."""
        return stacked(pictures, count)


def read_video(
    source: Any,
    *,
    frames: int = 32,
    sampling: str = "uniform",
    fps: float | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
    backend: str = "auto",
    size: tuple[int, int] | None = None,
    source_fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    threads: int | None = None,
    taker: Taker | None = None,
) -> Video:
    """Read sampled frames of a video file, a folder of images, an array, or a list of images.

    Args:
        source: path to a video file; path to a folder of images (natural order: 2.png before 10.png); uint8
            `[T, H, W, 3]` array or tensor; list of PIL images or of uint8 `[H, W, 3]` arrays.
        frames: how many frames every rule but "fps" takes; a shorter source gives all its frames, each once.
        sampling: "uniform", "left", "midpoint" or "fps", defined at the top of this module.
        fps: frames a second that `sampling="fps"` takes (default 2).
        min_frames, max_frames: limits of `sampling="fps"`.
        backend: who decodes a file. "auto" is "pyav". "torchcodec" and "decord" (decord2 is the maintained package) get
            the same frame numbers from PyAV's table of frames. Untested here: torchcodec never, decord2 3.4 by hand
            only (right with closed GOPs, wrong with open ones, which are therefore refused).
        size: (height, width) to which frames are scaled, while decoding where the back-end can; None keeps the size.
        source_fps: frame rate of a folder or of frames in memory, which have no clock of their own.
        start, end: seconds since the first frame; only the part between them is read. An end after the last frame is
            the last frame.
        threads: that decode a file ahead, each its own groups of pictures; 1 decodes in this thread, None is one a
            core, 8 at most. The frames are the same ones.
        taker: told of the frames as they come (see `holimerge.reading`); None keeps them as they are.

    Returns:
        the frames with their times.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: the back-end is not installed; the message has the pip command.
        ValueError: not a video, a truncated or damaged one (with the number of frames that are there), zero frames, no
            video stream, wrong shape or dtype, an argument outside its choices, or a start after the end.
        TypeError: a source of another kind.
    """
    _check_choices(frames, sampling, fps, min_frames, max_frames, backend, size, source_fps, threads)
    _check_part(start, end)
    rule = (frames, sampling, fps, min_frames, max_frames, start, end)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if "://" in path:
            raise ValueError(f"{path}: addresses are not read; download the video and give its path")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such video file or folder of images")
        if not os.path.isdir(path):
            if source_fps is not None:
                raise ValueError("source_fps is for folders and frames in memory; a video file has its own clock")
            return _read_file(path, rule, backend, size, threads, taker)
        return _read_images(_image_paths(path), rule, size, source_fps, path, taker)
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("the list of images is empty: zero frames")
        return _read_images(source, rule, size, source_fps, "images", taker)
    return _read_array(source, rule, size, source_fps, taker)


def sample_indices(
    table: FrameTable | int,
    *,
    frames: int = 32,
    sampling: str = "uniform",
    fps: float | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> np.ndarray:
    """Choose frame numbers by one of the rules at the top of this module.

    Args:
        table: the source's frames, or only their number n (then `sampling="fps"` is an error: no clock).
        frames, sampling, fps, min_frames, max_frames: as in `read_video`.

    Returns:
        int64 `[T]` frame numbers, strictly increasing.

    Raises:
        ValueError: fps sampling of a source without a clock.
    """
    total = table if isinstance(table, int) else len(table.pts)
    if sampling == "uniform":
        return np.linspace(0, total - 1, min(frames, total), dtype=int).astype(np.int64)
    if sampling == "left":
        count = min(frames, total)
        return np.arange(count, dtype=np.int64) * (total // count)
    if sampling == "midpoint":
        steps = np.arange(1, min(frames, total) + 1, dtype=np.int64)
        return steps * total // (frames + 1) if frames < total else steps - 1
    if isinstance(table, int) or table.duration is None or table.fps is None:
        raise ValueError("sampling='fps' needs the source's frame rate: give source_fps, or use sampling='uniform'")
    wanted = min(max(total / table.fps * (fps or _DEFAULT_RATE), min_frames), max_frames, total)
    count = max(1, math.floor(wanted / 2) * 2)
    steady = np.abs(table.seconds - np.arange(total) / table.fps).max() < 0.5 / table.fps
    if steady:
        return np.arange(count) * total // count
    moments = np.arange(count) * table.duration / count
    return np.unique(np.searchsorted(table.seconds, moments, side="right") - 1)


def _check_choices(
    frames: int,
    sampling: str,
    fps: float | None,
    min_frames: int,
    max_frames: int,
    backend: str,
    size: tuple[int, int] | None,
    source_fps: float | None,
    threads: int | None,
) -> None:
    if sampling not in SAMPLINGS:
        raise ValueError(f"unknown sampling {sampling!r}; choose one of {', '.join(SAMPLINGS)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    numbers = [("frames", frames), ("min_frames", min_frames), ("max_frames", max_frames)]
    for name, number in numbers if threads is None else [*numbers, ("threads", threads)]:
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
    if min_frames > max_frames:
        raise ValueError(f"min_frames ({min_frames}) is above max_frames ({max_frames})")
    if fps is not None and sampling != "fps":
        raise ValueError("fps is only used with sampling='fps'; for a number of frames give frames=")
    for name, rate in (("fps", fps), ("source_fps", source_fps)):
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"{name} must be a positive number of frames a second, got {rate!r}")
    sides = size if isinstance(size, tuple | list) else ()
    if size is not None and not (len(sides) == 2 and all(isinstance(s, int | np.integer) and s > 0 for s in sides)):
        raise ValueError(f"size must be (height, width) in whole positive pixels, got {size!r}")


def _check_part(start: float | None, end: float | None) -> None:
    for name, moment in (("start", start), ("end", end)):
        if moment is not None and not (math.isfinite(moment) and moment >= 0):
            raise ValueError(f"{name} must be seconds from 0 on, got {moment!r}")
    if end is not None and end <= (start or 0):
        raise ValueError(f"end ({end} s) must be after start ({start or 0} s)")


def _part(table: FrameTable | int, start: float | None, end: float | None) -> tuple[int, FrameTable | int]:
    """The frames from `start` to `end`: the number of the first, and a table of them on a clock that starts there."""
    if start is None and end is None:
        return 0, table
    if isinstance(table, int):
        raise ValueError("start and end need the source's frame rate: give source_fps")
    total, slack = len(table.pts), 1e-6  # stored times are rounded
    first = int(np.searchsorted(table.seconds, (start or 0.0) - slack))
    stop = total if end is None else int(np.searchsorted(table.seconds, end - slack))
    if first >= stop:  # between two frames, or after the last
        length = table.duration if table.duration is not None else float(table.seconds[-1])
        if start is not None and start > length:
            raise ValueError(f"start ({start} s) is after the end of the video ({length:.3f} s)")
        first = max(0, first - 1)
        stop = first + 1
    seconds = table.seconds[first:stop] - table.seconds[first]
    until = table.duration if stop == total else float(table.seconds[stop])
    duration = None if until is None else until - float(table.seconds[first])
    fps = (stop - first) / duration if duration else table.fps
    return first, replace(table, pts=table.pts[first:stop], seconds=seconds, duration=duration, fps=fps)


def _choose(table: FrameTable | int, rule: tuple[Any, ...]) -> tuple[np.ndarray, FrameTable | int]:
    """Frame numbers within the whole source, and the table of the part they were chosen from."""
    frames, sampling, fps, min_frames, max_frames, start, end = rule
    first, part = _part(table, start, end)
    chosen = sample_indices(
        part, frames=frames, sampling=sampling, fps=fps, min_frames=min_frames, max_frames=max_frames
    )
    return first + chosen, part


def _read_file(
    path: str,
    rule: tuple[Any, ...],
    backend: str,
    size: tuple[int, int] | None,
    threads: int | None,
    taker: Taker | None,
) -> Video:
    other = None if backend in ("auto", "pyav") else OTHER_BACKENDS[backend](path)
    with VideoFile(path) as file:
        table = file.table()
        indices, part = _choose(table, rule)
        if other is not None:
            if file.turned(table):
                raise ValueError(f"{path}: the picture is stored rotated; read it with backend='pyav'")
            if backend == "decord" and not table.closed:  # seen with decord2 3.4: H.264, HEVC, MPEG-4, MPEG-TS
                raise ValueError(
                    f"{path}: decord gives wrong frames of open GOPs and old containers; read it with backend='pyav'"
                )
            pictures = _taken(other(indices, len(table.pts), size), taker)
        else:
            try:
                pictures = _decoded(file, table, indices, size, threads, taker)
            except TableMismatchError:  # the packets are not the frames: count them
                table = file.count()
                indices, part = _choose(table, rule)
                pictures = _decoded(file, table, indices, size, threads, taker)
    assert not isinstance(part, int)
    return Video(pictures, table.seconds[indices], part.fps, part.duration, len(part.pts), path, indices)


def _decoded(
    file: VideoFile,
    table: FrameTable,
    indices: np.ndarray,
    size: tuple[int, int] | None,
    threads: int | None,
    taker: Taker | None,
) -> np.ndarray:
    taker = taker or Taker()
    taker.start(len(indices))
    found = file.pictures(table, indices, size or taker.size, threads=threads, fit=taker.fit)
    with contextlib.closing(found):  # an error must not leave threads behind
        return taker.take(found, len(indices))


def _taken(pictures: np.ndarray, taker: Taker | None) -> np.ndarray:
    """Frames that are all there already."""
    if taker is None:
        return pictures
    taker.start(len(pictures))
    wanted = taker.size(*pictures.shape[1:3])
    return taker.take((taker.fit(picture) for picture in scaled(pictures, wanted)), len(pictures))


def _image_paths(folder: str) -> list[Path]:
    """Images of a folder in natural order (numbers by value), other files and hidden ones ignored."""
    paths = [p for p in Path(folder).iterdir() if p.suffix.lower() in _IMAGE_ENDINGS and not p.name.startswith(".")]
    if not paths:
        raise ValueError(f"{folder}: zero frames: no images ({', '.join(sorted(_IMAGE_ENDINGS))}) in this folder")
    return sorted(paths, key=lambda p: [(not t.isdecimal(), int(t) if t.isdecimal() else 0, t) for t in _parts(p.name)])


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name.lower()) if part]


def _read_images(
    images: Sequence[Any],
    rule: tuple[Any, ...],
    size: tuple[int, int] | None,
    source_fps: float | None,
    source: str,
    taker: Taker | None,
) -> Video:
    clock = _steady_clock(len(images), source_fps)
    indices, part = _choose(clock or len(images), rule)
    pictures = [_one_image(images[i], size) for i in indices]
    sizes = {p.shape for p in pictures}
    if len(sizes) > 1:
        raise ValueError(f"{source}: images of different sizes {sorted(s[:2] for s in sizes)}; give size=(h, w)")
    return _clocked(_taken(np.stack(pictures), taker), indices, clock, part, source)


def _one_image(image: Any, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 `[H, W, 3]` of a path, a PIL image or an array."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as opened:
                picture = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{image}: no such image") from None
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{image}: is no image, or a truncated one ({error})") from error
    elif isinstance(image, Image.Image):
        picture = np.array(image.convert("RGB"))
    else:
        picture = _uint8(image, 3)
    return scaled(picture[None], size)[0]


def _uint8(values: Any, dimensions: int) -> np.ndarray:
    """Check frames in memory: uint8, channels last, three of them."""
    if hasattr(values, "detach"):  # a torch tensor
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        kinds = "a path, a folder, a uint8 array or tensor [T, H, W, 3], or a list of images"
        raise TypeError(f"a video must be {kinds}; got {type(values).__name__}")
    shape = ("[T, H, W, 3]", "[H, W, 3]")[dimensions == 3]
    if values.ndim != dimensions or values.shape[-1] != 3:
        first = values.ndim == dimensions and values.shape[-3] == 3
        hint = "; channels come last: move them with .movedim(-3, -1) or np.moveaxis(x, -3, -1)" if first else ""
        raise ValueError(f"frames must have shape {shape}, got {list(values.shape)}{hint}")
    if values.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 (0-255), got {values.dtype}; scale and convert them first")
    return values


def _read_array(
    values: Any,
    rule: tuple[Any, ...],
    size: tuple[int, int] | None,
    source_fps: float | None,
    taker: Taker | None,
) -> Video:
    array = _uint8(values, 4)
    if not len(array):
        raise ValueError("the array holds zero frames")
    clock = _steady_clock(len(array), source_fps)
    indices, part = _choose(clock or len(array), rule)
    return _clocked(_taken(scaled(array[indices], size), taker), indices, clock, part, "array")


def _steady_clock(total: int, rate: float | None) -> FrameTable | None:
    if rate is None:
        return None
    numbers = np.arange(total, dtype=np.int64)
    return FrameTable(numbers, numbers, numbers / rate, total / rate, float(rate), counted=True)


def _clocked(
    frames: np.ndarray, indices: np.ndarray, clock: FrameTable | None, part: FrameTable | int, source: str
) -> Video:
    if clock is None or isinstance(part, int):
        total = part if isinstance(part, int) else len(part.pts)
        return Video(frames, np.full(len(indices), np.nan), None, None, total, source, indices)
    return Video(frames, clock.seconds[indices], part.fps, part.duration, len(part.pts), source, indices)
