"""Frames to model inputs without torchvision, by the model's own preprocessor settings.

transformers' video processors need torchvision. Their arithmetic is small: resize on uint8 (antialiased), rescale and
normalise in one step, and for the Qwen family cut into patches. `tests/test_preprocess.py` compares the results with
the real `LlavaOnevisionVideoProcessor` and `Qwen2VLVideoProcessor`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

MODEL_TYPES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "llava_video")
LLAVA = ("llava_onevision", "llava_video")  # every frame of one size
_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's resampling numbers
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Settings:
    """What a checkpoint's preprocessor file says about videos; change one with `dataclasses.replace`.

    The defaults are those of transformers' `LlavaOnevisionVideoProcessor` and `Qwen2VLVideoProcessor`.

    Attributes:
        model_type: one of `MODEL_TYPES`.
        resample: PIL's number: 2 bilinear, 3 bicubic.
        mean, std: per RGB channel, on the 0-1 scale.
        rescale: factor that brings 0-255 to 0-1.
        size: (height, width) of every frame; LLaVA-OneVision and LLaVA-Video only.
        min_pixels, max_pixels: bounds of a resized frame's height x width; the rest is Qwen only.
        patch_size, temporal_patch_size, merge_size: pixels, frames, and patches joined by the merger (per side).
        cap_pixels_per_frame: bound the whole video as qwen-vl-utils does (a frame's share of 90 % of
            `max_video_tokens`); transformers 5.23 leaves it off and warns that this will change.
        max_video_tokens: tokens assumed for that bound.
        source: the file that was read, or "defaults".
    """

    model_type: str
    resample: int = 3
    mean: tuple[float, float, float] = _CLIP_MEAN
    std: tuple[float, float, float] = _CLIP_STD
    rescale: float = 1 / 255
    size: tuple[int, int] = (384, 384)
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128_000
    source: str = "defaults"

    def __post_init__(self) -> None:
        where = f"preprocessor settings from {self.source}"
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"no preprocessing for model_type {self.model_type!r}; known: {', '.join(MODEL_TYPES)}")
        if self.resample not in _MODES:
            known = ", ".join(f"{k} ({v})" for k, v in _MODES.items())
            raise ValueError(f"{where}: resample {self.resample!r} is not supported; known: {known}")
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std or not self.rescale > 0:
            raise ValueError(f"{where}: mean {self.mean} and std {self.std} must be three numbers, rescale positive")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"{where}: max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")
        whole = (*self.size, self.min_pixels, self.max_pixels, self.patch_size, self.temporal_patch_size)
        if len(self.size) != 2 or any(not isinstance(n, int) or n < 1 for n in (*whole, self.merge_size)):
            raise ValueError(f"{where}: sizes must be whole numbers of at least 1: {self}")

    def _bounds(self) -> dict[str, Any]:
        """What decides the size of a Qwen-VL frame, as keyword arguments."""
        return {
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "max_video_tokens": self.max_video_tokens if self.cap_pixels_per_frame else None,
        }

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which every frame of a video of so many frames is resized."""
        if self.model_type in LLAVA:
            return self.size
        return _qwen_size(
            frames,
            height,
            width,
            **self._bounds(),
        )

    def fit(self, picture: np.ndarray, frames: int) -> np.ndarray:
        """Resize one frame uint8 `[H, W, 3]` of a video of so many, so that `pixels` has nothing left to resize.

        Its pixels are those that `pixels` makes of the full frames. A frame whose size would be changed once more by
        `pixels` (bounds that exclude each other) stays as it is.
        """
        size = self.frame_size(frames, *picture.shape[:2])
        if self.frame_size(frames, *size) != size:
            return picture
        planes = torch.from_numpy(np.ascontiguousarray(picture)[None]).permute(0, 3, 1, 2)
        return _resized(planes.contiguous(), size, self.resample)[0].permute(1, 2, 0).contiguous().numpy()

    def pixels(self, frames: np.ndarray | Tensor, *, total: int | None = None) -> dict[str, Tensor]:
        """Preprocess one video, uint8 `[T, H, W, 3]`, to the tensors its model takes (batch of one).

        total: the video's frames where these are a part of it.
        """
        common: dict[str, Any] = {
            "resample": self.resample,
            "mean": self.mean,
            "std": self.std,
            "rescale": self.rescale,
        }
        if self.model_type in LLAVA:
            return {"pixel_values_videos": llava_onevision_pixels(frames, size=self.size, **common)}
        values, grid = qwen2_vl_pixels(
            frames,
            **self._bounds(),
            total=total,
            **common,
        )
        return {"pixel_values_videos": values, "video_grid_thw": grid}


def default_settings(model_type: str, config: Any = None) -> Settings:
    """The settings of a model without a preprocessor file.

    Args:
        model_type: one of `MODEL_TYPES`.
        config: the model's config, whose vision tower then says the frame size and patch sizes (toy models).

    Returns:
        transformers' defaults, with the sizes of `config`; for LLaVA-Video, which has no processor there, SigLIP's mean
        and standard deviation, which all its checkpoints were trained with.

    Raises:
        ValueError: an unknown model_type.
    """
    found: dict[str, Any] = {}
    vision = getattr(config, "vision_config", None)
    if vision is not None and model_type in LLAVA:
        found = {"size": (vision.image_size, vision.image_size)}
    elif vision is not None:
        found = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
    if model_type == "llava_video":
        found |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Settings(model_type, **found)


def load_preprocessor(
    folder_or_id: str | os.PathLike[str], model_type: str, config: Any = None, **hub: Any
) -> Settings:
    """Read a checkpoint's video settings from where transformers looks for them, in its order.

    These are `video_processor` inside processor_config.json, video_preprocessor_config.json, and
    preprocessor_config.json. Keys that a file does not have keep transformers' defaults. For a local folder without
    any of the three files (a toy model) the answer is `default_settings(model_type, config)`, with a warning.

    Args:
        folder_or_id: a local folder, or a hub id such as "Qwen/Qwen2.5-VL-7B-Instruct".
        model_type: one of `MODEL_TYPES`.
        config: the model's config; only used where there is no file.
        **hub: revision, cache_dir, token, local_files_only for the hub.

    Returns:
        the settings; `.source` names the file.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the hub cannot be reached, has no such model, or has none of the files for it.
        ValueError: an unknown model_type, a file that is no JSON, or a step that this path does not do.
    """
    default = default_settings(model_type, config)
    for name in ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"):
        path = model_file(folder_or_id, name, **hub)
        if path is None:
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is not valid JSON ({error})") from error
        if name == "processor_config.json":
            values = values.get("video_processor")
        if values is not None:
            return _from_file(values, model_type, str(path))
    if not Path(folder_or_id).expanduser().is_dir():
        raise OSError(
            f"{folder_or_id}: no preprocessor file was found, neither on the hub (is it reachable?) nor in its cache: "
            "download the model first, or give the folder that holds it"
        )
    warnings.warn(
        f"{folder_or_id} has no preprocessor file; frames are preprocessed with the defaults of {model_type}",
        stacklevel=2,
    )
    return default


def model_file(folder_or_id: str | os.PathLike[str], name: str, **hub: Any) -> Path | None:
    """Find a file of a checkpoint: in a local folder, else on the hub (or its cache); None if it has no such file."""
    folder = Path(folder_or_id).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    text = os.fspath(folder_or_id)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{text}: no such folder with a model")
    from transformers.utils.hub import cached_file

    found = cached_file(text, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def _from_file(values: dict[str, Any], model_type: str, source: str) -> Settings:
    """Turn the keys of a preprocessor file into settings, refusing steps that are not done here."""
    for step, usual in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("do_center_crop", False)):
        if values.get(step) is not None and values[step] is not usual:
            raise ValueError(f"{source}: {step}={values[step]} is not supported here; use transformers' own processor")
    found: dict[str, Any] = {"source": source}
    names = {"resample": "resample", "rescale_factor": "rescale", "image_mean": "mean", "image_std": "std"}
    for name, field in names.items():
        if values.get(name) is not None:
            found[field] = tuple(values[name]) if field in ("mean", "std") else values[name]
    size = values.get("size") or {}
    if model_type in LLAVA:
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if size and not {"height", "width"} <= size.keys():
            raise ValueError(f"{source}: size {size} is not supported here: frames need a fixed height and width")
        return Settings(model_type, **found | ({"size": (size["height"], size["width"])} if size else {}))
    bounds = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    for name in ("min_pixels", "max_pixels"):  # the older spelling wins, as in transformers
        found[name] = values.get(name) or bounds[name]
    for name in ("patch_size", "temporal_patch_size", "merge_size", "cap_pixels_per_frame", "max_video_tokens"):
        found[name] = values.get(name)
    return Settings(model_type, **{name: value for name, value in found.items() if value is not None})


def llava_onevision_pixels(
    frames: np.ndarray | Tensor,
    *,
    size: tuple[int, int] = (384, 384),
    resample: int = 3,
    mean: Sequence[float] = _CLIP_MEAN,
    std: Sequence[float] = _CLIP_STD,
    rescale: float = 1 / 255,
) -> Tensor:
    """Resize every frame to `size` (no crop, the aspect ratio is not kept) and normalise.

    Args:
        frames: uint8 `[T, H, W, 3]` RGB.
        size: (height, width) in pixels.
        resample, mean, std, rescale: as in `Settings`.

    Returns:
        float32 `[1, T, 3, height, width]`.

    Raises:
        ValueError: frames of another shape or dtype, or none.
    """
    return _normalised(_resized(_planes(frames), size, resample), mean, std, rescale)[None]


def qwen2_vl_pixels(
    frames: np.ndarray | Tensor,
    *,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    min_pixels: int = 128 * 28 * 28,
    max_pixels: int = 768 * 28 * 28,
    resample: int = 3,
    mean: Sequence[float] = _CLIP_MEAN,
    std: Sequence[float] = _CLIP_STD,
    rescale: float = 1 / 255,
    max_video_tokens: int | None = None,
    total: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Resize to whole merge windows (`smart_resize`), normalise, and cut into space-time patches.

    The last frame is repeated until their number is a multiple of `temporal_patch_size`. Patches run over time, then
    over merge windows row by row, then inside the window row by row, so that `merge_size**2` rows in a
    row become one token.

    Args:
        frames: uint8 `[T, H, W, 3]` RGB.
        patch_size, temporal_patch_size, merge_size, min_pixels, max_pixels, resample, mean, std, rescale: as in
            `Settings`.
        max_video_tokens: None, or the token number of `Settings.cap_pixels_per_frame`.
        total: the video's frames where these are a part of it.

    Returns:
        pixel_values_videos float32 `[t h w, 3 temporal_patch_size patch_size^2]`, and video_grid_thw int64 `[1, 3]`
        with (t, h, w) in patches.

    Raises:
        ValueError: frames of another shape or dtype, or none; an aspect ratio above 200.
    """
    planes = _planes(frames)
    T, _, height, width = planes.shape
    height, width = _qwen_size(
        total or T,
        height,
        width,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_video_tokens=max_video_tokens,
    )
    planes = _normalised(_resized(planes, (height, width), resample), mean, std, rescale)
    if missing := -T % temporal_patch_size:
        planes = torch.cat((planes, planes[-1:].expand(missing, -1, -1, -1)))
    t, h, w = len(planes) // temporal_patch_size, height // patch_size, width // patch_size
    m, p = merge_size, patch_size
    #            0  1                    2  3       4  5  6       7  8  9
    cut = planes.reshape(t, temporal_patch_size, 3, h // m, m, p, w // m, m, p)
    #            time, window row, window column, row in it, column in it, colour, frame in patch, pixel row, column
    patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * temporal_patch_size * p * p)
    return patches, torch.tensor([[t, h, w]], dtype=torch.int64, device="cpu")


def _qwen_size(
    frames: int,
    height: int,
    width: int,
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    min_pixels: int,
    max_pixels: int,
    max_video_tokens: int | None,
) -> tuple[int, int]:
    """Height and width of a resized frame of a video of so many frames."""
    factor = patch_size * merge_size
    if max_video_tokens is not None:
        area = int(max_video_tokens * factor * factor * 0.9)
        max_pixels = max(min(max_pixels, area * temporal_patch_size // frames), int(min_pixels * 1.05))
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The Qwen2-VL frame size: multiples of `factor` near the aspect ratio, area within the two bounds.

    Args:
        height, width: pixels.
        factor: pixels per merge window (patch_size x merge_size).
        min_pixels, max_pixels: bounds of height x width.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: an aspect ratio above 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"the aspect ratio of a frame must not be above 200, got {height} x {width}")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def _planes(frames: np.ndarray | Tensor) -> Tensor:
    """Check uint8 `[T, H, W, 3]` and return it as contiguous `[T, 3, H, W]`."""
    planes = frames if isinstance(frames, Tensor) else torch.as_tensor(frames, device="cpu")
    if planes.ndim != 4 or planes.shape[-1] != 3 or 0 in planes.shape or planes.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {planes.dtype} {list(planes.shape)}")
    return planes.permute(0, 3, 1, 2).contiguous()


def _resized(planes: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """Resize uint8 `[T, 3, H, W]` as torchvision does: fixed-point on CPU where torch can, else rounded float."""
    if planes.shape[-2:] == tuple(size):
        return planes
    mode = _MODES[resample]
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
    if planes.device.type == "cpu" and (mode == "bicubic" or wide):
        return F.interpolate(planes, size, mode=mode, antialias=True, align_corners=False)
    exact = F.interpolate(planes.float(), size, mode=mode, antialias=True, align_corners=False)
    return exact.clamp_(0, 255).round_().to(torch.uint8)


def _normalised(planes: Tensor, mean: Sequence[float], std: Sequence[float], rescale: float) -> Tensor:
    """Rescale and normalise uint8 `[T, 3, H, W]` in one step: (x - mean / rescale) / (std / rescale), in float32."""
    shift, scale = _constants(tuple(mean), tuple(std), rescale, planes.device)
    return planes.to(torch.float32).sub_(shift).div_(scale)


@lru_cache(maxsize=16)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], rescale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What `_normalised` subtracts and divides by; kept, since a GPU waits for numbers from the host."""
    shift, scale = (torch.tensor(x, dtype=torch.float32, device="cpu") * (1.0 / rescale) for x in (mean, std))
    return shift[:, None, None].to(device), scale[:, None, None].to(device)
