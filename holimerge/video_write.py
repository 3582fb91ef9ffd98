"""Make videos: `write_video` encodes real files, `synthetic_clip` draws frames for demo, bench and tests."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

_CLOCK = 60_000  # ticks a second of the time stamps we write; MPEG-4 takes at most 65535


def write_video(
    path: str | os.PathLike[str],
    frames: Any,
    *,
    fps: float = 30.0,
    codec: str = "libx264",
    gop: int | None = None,
    b_frames: int | None = None,
    timestamps: Sequence[float] | None = None,
    rotation: int = 0,
    crf: int | None = None,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> str:
    """Encode frames into a video file; the container follows from the path's ending (mp4, mkv, mov, ...).

    Args:
        path: the file to write; its folder must exist, an existing file is replaced.
        frames: uint8 `[T, H, W, 3]` RGB (array or tensor), or any iterable of `[H, W, 3]` frames, so that a long clip
            need not be in memory at once. H and W must be even (4:2:0 colour).
        fps: frames a second; with `timestamps` only the encoder's nominal rate.
        codec: FFmpeg encoder name, for instance libx264, libx265, mpeg4.
        gop: frames from one key frame to the next (exactly); None leaves the encoder's default (250 for libx264).
        b_frames: consecutive B-frames; None leaves the encoder's default.
        timestamps: seconds `[T]`, strictly increasing: makes a variable-frame-rate file.
        rotation: degrees counter-clockwise by which a player turns the stored picture (written as metadata).
        crf: constant quality, lower is better; None leaves the encoder's default.
        options: further encoder options, for instance `{"preset": "ultrafast"}`.
        container_options: muxer options; an mp4 gets `movflags=faststart` (index first) unless given here.

    Returns:
        the path, as a string.

    Raises:
        ImportError: PyAV is not installed, or too old to write rotation.
        ValueError: no frames, wrong shape or dtype, odd size, bad fps or timestamps, unknown codec or container.
    """
    from .video_pyav import import_av

    av = import_av()
    target = os.fspath(path)
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps!r}")
    if timestamps is not None and any(b <= a for a, b in zip(timestamps, list(timestamps)[1:], strict=False)):
        raise ValueError("timestamps must be strictly increasing seconds")
    if codec not in av.codecs_available:
        raise ValueError(f"unknown codec {codec!r}; PyAV's FFmpeg here has for instance libx264, libx265, mpeg4")
    settings = dict(options or {})
    if gop is not None:
        settings |= {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
    if b_frames is not None:
        settings["bf"] = str(b_frames)
    if crf is not None:
        settings["crf"] = str(crf)
    if container_options is None:
        container_options = {"movflags": "faststart"} if target.endswith((".mp4", ".mov", ".m4v")) else {}

    rate = Fraction(fps).limit_denominator(1001)  # 29.97 becomes 30000/1001
    clock = 1 / rate if timestamps is None else Fraction(1, _CLOCK)
    count, first = 0, None
    try:
        container = av.open(target, "w", options=dict(container_options))
    except ValueError as error:
        raise ValueError(f"cannot write {target}: {error}; use an ending such as .mp4 or .mkv") from error
    with container:
        stream = None
        for count, image in enumerate(frames, start=1):
            picture = _picture(image, first)
            if stream is None:
                first = picture.shape
                stream = container.add_stream(codec, rate=rate, options=settings)
                stream.width, stream.height, stream.pix_fmt = first[1], first[0], "yuv420p"
                stream.codec_context.time_base = clock
                if rotation:
                    if not hasattr(stream, "set_display_rotation"):
                        raise ImportError('writing rotation needs a newer PyAV: pip install "av>=18"')
                    stream.set_display_rotation(rotation)
            if timestamps is not None and count > len(timestamps):
                raise ValueError(f"there are more frames than the {len(timestamps)} timestamps")
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = count - 1 if timestamps is None else round(timestamps[count - 1] * _CLOCK)
            frame.time_base = clock
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError(f"no frames to write into {target}")
        if timestamps is not None and count < len(timestamps):
            raise ValueError(f"there are {count} frames but {len(timestamps)} timestamps")
        container.mux(stream.encode())
    return target


def _picture(image: Any, first: tuple[int, ...] | None) -> np.ndarray:
    """Check one frame: uint8 `[H, W, 3]`, even sides, the same size as the first one."""
    picture = np.ascontiguousarray(np.asarray(image))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a frame must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    if picture.shape[0] % 2 or picture.shape[1] % 2:
        raise ValueError(f"height and width must be even for 4:2:0 colour, got {picture.shape[:2]}")
    if first is not None and picture.shape != first:
        raise ValueError(f"all frames must have one size, got {first[:2]} and {picture.shape[:2]}")
    return picture


def synthetic_clip(frames: int = 64, height: int = 240, width: int = 320, seed: int = 0) -> np.ndarray:
    """Draw a small clip: a still textured background, one object that moves over it, and one cut in the middle.

    The first `frames // 2` frames form the first scene (nothing but the object changes inside a scene), the others
    the second one. The same arguments always give the same bytes.

    Args:
        frames: T, at least 1.
        height, width: size in pixels, at least 16 each.
        seed: chooses textures, colours and paths.

    Returns:
        uint8 `[T, H, W, 3]` RGB.

    Raises:
        ValueError: frames below 1 or a side below 16.
    """
    if frames < 1 or height < 16 or width < 16:
        raise ValueError(f"need frames >= 1 and sides >= 16, got frames={frames}, height={height}, width={width}")
    rng = np.random.default_rng(seed)
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:height, 0:width]
    cut = frames // 2
    for start, stop in ((0, cut), (cut, frames)):
        background = _texture(rng, height, width)
        colour = rng.integers(0, 256, size=3)
        radius = max(3, min(height, width) // 8)
        path = rng.uniform(0.15, 0.85, size=(2, 2)) * (height, width)  # first and last centre, as (row, column)
        for index in range(start, stop):
            share = (index - start) / max(1, stop - start - 1)
            row, column = path[0] + share * (path[1] - path[0])
            inside = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
            stripes = (rows - int(row) + columns - int(column)) // 3 % 2 == 0
            clip[index] = background
            clip[index][inside] = colour
            clip[index][inside & stripes] = 255 - colour
    return clip


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A still background uint8 `[H, W, 3]`: coloured blocks, a slow gradient and fine grain."""
    block = max(8, min(height, width) // 10)
    cells = rng.integers(30, 220, size=(-(-height // block), -(-width // block), 3))
    blocks = cells.repeat(block, axis=0).repeat(block, axis=1)[:height, :width].astype(np.float64)
    gradient = np.linspace(-30, 30, width)[None, :, None]
    grain = rng.integers(-6, 7, size=(height, width, 1))
    return np.clip(blocks + gradient + grain, 0, 255).astype(np.uint8)
