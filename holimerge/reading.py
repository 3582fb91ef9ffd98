"""A video's frames to a model's pixels, read and preprocessed at once.

`read_pixels` gives, bit for bit, what `settings.pixels(read_video(source).frames)` gives. Threads decode ahead and
resize each frame as soon as it is there, so that no full-size frames are kept; meanwhile this thread normalises the
finished ones in chunks. With a CUDA device the uint8 values of each chunk cross over from pinned memory without
waiting, and the device normalises and rounds them.

transformers' models take all pixels of a video as one tensor, so that by itself the vision tower starts when the last
frame is there. Given a patched model, `read_pixels` runs its tower on the frames as they come.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .preprocess import LLAVA, Settings
from .video import Taker, Video, read_video

if TYPE_CHECKING:
    from .encode_ahead import Ahead

RESIZES = ("exact", "decoder")


def read_pixels(
    source: Any,
    settings: Settings,
    *,
    resize: str = "exact",
    chunk: int = 8,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    model: Any = None,
    threads: int | None = None,
    **rule: Any,
) -> tuple[Video, dict[str, Tensor]]:
    """Read a video and preprocess it, both at once.

    Args:
        source: as in `read_video`.
        settings: from `preprocess.load_preprocessor`.
        resize: "exact" resizes full frames as the checkpoint's own processor does. "decoder" lets the decoder's colour
            conversion do it: other pixels (`python -m holimerge.eval.bench_reading` says by how much), less work.
        chunk: frames normalised (and encoded) at a time; the pixels do not depend on it.
        device: where the pixels are wanted, by default on the CPU. dtype: of them, by default float32; rounded from it
            where they are.
        model: a patched model (`holimerge.patch_model`), whose device and dtype the pixels then have, and whose tower
            encodes them `chunk` frames at a time (as with `chunk_frames`, which counts temporal steps: two frames in
            Qwen's towers), while later ones are being decoded. A prompt of it that holds this very tensor (no copy, and
            no other video) finds that done, as often as it is asked: what the tower gave stays as long as the tensor
            and the patch (`merging` sets another one, and sets the old one anew). Only without gradients: in `generate`
            and under `torch.no_grad()`. Switch adapters before reading. Configurations that compare frames inside the
            tower (`encoder.frames`, `encoder.gate`) encode when the prompt is there.
        threads, **rule: as in `read_video` (frames, sampling, fps, start, ...; not size, which `settings` decide).

    Returns:
        the video, whose frames have the model's size already (`settings.pixels` leaves them so), and the pixels as
        `Settings.pixels` gives them, on `device`; video_grid_thw stays on the host.

    Raises:
        ValueError: a wrong resize, chunk, device or dtype; a model that is not patched, or of another family than the
            settings; and everything that `read_video` raises.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize: {resize!r}; valid: {', '.join(RESIZES)}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: {chunk!r}; at least 1 frame is needed")
    if "size" in rule or "taker" in rule:
        raise ValueError("size: the preprocessor settings decide it here; read_video takes a size of your own")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype}; pixels are floating-point numbers, for instance torch.bfloat16")
    ahead = None
    if model is not None:
        ahead, device, dtype = _tower(model, settings, device, dtype)
    made = _Pixels(settings, resize == "decoder", chunk, torch.device(device or "cpu"), dtype or torch.float32, ahead)
    video = read_video(source, threads=threads, taker=made, **rule)
    return video, made.inputs()


def _tower(
    model: Any, settings: Settings, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[Ahead | None, torch.device, torch.dtype]:
    """What encodes for a patched model (None: it needs all frames at once), and its pixels' device and dtype."""
    from .api import _handle, _inner_model  # only here: they bring transformers' classes

    handle, inner = _handle(model), _inner_model(model)
    if handle is None:
        raise ValueError("model: it is not patched; patch it first (holimerge.patch_model), or read without a model")
    if settings.model_type != inner.config.model_type:
        raise ValueError(f"model: {inner.config.model_type}, but the settings are for {settings.model_type}")
    own = inner.device
    if own.type == "meta":  # accelerate keeps the weights elsewhere
        own = torch.device(getattr(getattr(inner, "_hf_hook", None), "execution_device", None) or "cpu")
        own = torch.empty(0, device=own).device
    there = own if device is None else torch.empty(0, device=device).device  # "cuda" has a number then
    for name, given, is_own in (("device", there, own), ("dtype", dtype or inner.dtype, inner.dtype)):
        if given != is_own:
            raise ValueError(f"{name}: {given}, but the model's is {is_own}; leave it out where a model is given")
    return handle.outer.ahead(own), own, inner.dtype


class _Pixels(Taker):
    """Preprocesses frames as they come, and has them encoded."""

    def __init__(
        self,
        settings: Settings,
        by_decoder: bool,
        chunk: int,
        device: torch.device,
        dtype: torch.dtype,
        ahead: Ahead | None,
    ) -> None:
        self._settings, self._by_decoder, self._device, self._dtype = settings, by_decoder, device, dtype
        self._ahead = ahead
        step = 1 if settings.model_type in LLAVA else settings.temporal_patch_size
        self._chunk = -(-chunk // step) * step  # frames of one patch stay together

    def start(self, count: int) -> None:
        self._count, self._at = count, 0
        if self._ahead is not None:
            self._ahead.start()
        self._values: Tensor | None = None
        self._grid: Tensor | None = None

    def size(self, height: int, width: int) -> tuple[int, int]:
        return self._settings.frame_size(self._count, height, width) if self._by_decoder else (height, width)

    def fit(self, picture: np.ndarray) -> np.ndarray:
        return self._settings.fit(picture, self._count)

    def take(self, pictures: Iterator[np.ndarray], count: int) -> np.ndarray:
        held: Tensor | None = None
        for begin in range(0, count, self._chunk):
            for slot, picture in enumerate(itertools.islice(pictures, self._chunk), start=begin):
                if held is None:
                    held = torch.empty((count, *picture.shape), dtype=torch.uint8, device="cpu")
                    frames = held.numpy()
                frames[slot] = picture
            assert held is not None
            self._add(held[begin : begin + self._chunk])
        return frames

    def _add(self, frames: Tensor) -> None:
        """Normalise the next frames, on the device where nothing is left to resize there."""
        height, width = frames.shape[1:3]
        fitted = self._settings.frame_size(self._count, height, width) == (height, width)
        if fitted and self._device.type == "cuda":  # torch keeps the pinned copy until the device has read it
            frames = frames.pin_memory()
        values = frames.to(self._device, non_blocking=True) if fitted else frames
        made = self._settings.pixels(values, total=self._count)
        part, grid = made["pixel_values_videos"], made.get("video_grid_thw")
        across = 1 if grid is None else 0  # frames lie along this dimension
        if self._values is None:
            shape = list(part.shape)
            shape[across] = shape[across] // len(frames) * self._count if grid is None else self._rows(grid)
            with torch.inference_mode(False):  # a tensor that counts how often it is written to
                self._values = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._grid = None if grid is None else torch.zeros_like(grid)
        piece = {"pixel_values_videos": self._values.narrow(across, self._at, part.shape[across])}
        piece["pixel_values_videos"].copy_(part)
        self._at += part.shape[across]
        if self._ahead is not None:
            if grid is not None:
                piece["video_grid_thw"] = grid.to(self._device)
            self._ahead.add(piece)
        if grid is not None and self._grid is not None:
            self._grid[0, 0] += grid[0, 0]
            self._grid[0, 1:] = grid[0, 1:]

    def _rows(self, grid: Tensor) -> int:
        steps = -(-self._count // self._settings.temporal_patch_size)
        return steps * int(grid[0, 1] * grid[0, 2])

    def inputs(self) -> dict[str, Tensor]:
        """The pixels, as `Settings.pixels` gives them."""
        assert self._values is not None
        if self._ahead is not None:
            self._ahead.keep(self._values)
        found = {"pixel_values_videos": self._values}
        if self._grid is not None:
            found["video_grid_thw"] = self._grid
        return found
