"""Other decoders of video files, behind one call: `OTHER_BACKENDS[name](path)(frame numbers, total, size)`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .video_pictures import scaled


def _torchcodec(path: str) -> Any:
    """torchcodec behind the same call. Untested: its wheels do not load beside the CPU build of torch used here."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"backend='torchcodec' cannot be loaded ({str(error).splitlines()[0]}): pip install torchcodec "
            "(its version must match torch, and FFmpeg's libraries must be installed), or use backend='pyav'"
        ) from error

    def decode(indices: np.ndarray, total: int, size: tuple[int, int] | None) -> np.ndarray:
        decoder = VideoDecoder(path, seek_mode="exact", dimension_order="NHWC")
        _same_count(path, "torchcodec", len(decoder), total)
        return scaled(decoder.get_frames_at(indices=indices.tolist()).data.cpu().numpy(), size)

    return decode


def _decord(path: str) -> Any:
    """decord or decord2 (both import as `decord`) behind the same call."""
    try:
        import decord
    except (ImportError, OSError) as error:
        raise ImportError("backend='decord' is not installed: pip install decord2, or use backend='pyav'") from error

    def decode(indices: np.ndarray, total: int, size: tuple[int, int] | None) -> np.ndarray:
        reader = decord.VideoReader(path)  # its own resizing fails for some widths (decord2 3.4)
        _same_count(path, "decord", len(reader), total)
        return scaled(reader.get_batch(indices.tolist()).asnumpy(), size)

    return decode


OTHER_BACKENDS = {"torchcodec": _torchcodec, "decord": _decord}


def _same_count(path: str, backend: str, found: int, total: int) -> None:
    if found != total:
        raise ValueError(f"{path}: {backend} sees {found} frames where there are {total}; use backend='pyav'")
