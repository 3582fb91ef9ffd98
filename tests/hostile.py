"""Hostile cases: what one is made of, and its tensors.

A case is plain data, so that a failing one can be pasted from its printed form into a test.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from toys import PAD, TOYS, build

LOOKS = ("scene", "noise", "black", "constant", "identical", "flicker", "denormal", "large", "huge")
POISONS = ("nan", "inf", "-inf", "all nan")
FAULTS = (
    "too few",
    "too many",
    "none",
    "moved",
    "no pixels",
    "no sizes",
    "a video too many",
    "a video too few",
    "empty",
    "one empty",
)
CALLS = ("forward", "generate")
SIDES = ((16, 16), (8, 8), (8, 24), (24, 16), (24, 32))
IN_SEQUENCE = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids")


@dataclass(frozen=True)
class Clip:
    """A video: temporal steps (of as many frames as the family takes at once), look, size index, seed of its noise."""

    steps: int = 2
    look: str = "scene"
    side: int = 0
    seed: int = 0


PICTURE = "picture"
Part = int | str | Clip  # so many text tokens, an image, a video


@dataclass(frozen=True)
class Case:
    """One call of one patched model.

    rows: the batch; call: "forward" or "generate"; side: of the padding; mask: "int", "bool" or "missing".
    fault: what is wrong between prompt and videos (see FAULTS), None for nothing.
    bare: whether the last row, and so the only one, ends on a placeholder of its video, without a marker behind it.
    """

    config: dict[str, Any] = field(default_factory=dict)
    rows: tuple[tuple[Part, ...], ...] = ((2, Clip(), 2),)
    call: str = "forward"
    side: str = "left"
    mask: str = "int"
    dtype: str = "float32"
    attn: str = "sdpa"
    fault: str | None = None
    use_cache: bool | None = None
    grad: bool = False
    bare: bool = False

    @property
    def clips(self) -> list[Clip]:
        return [part for row in self.rows for part in row if isinstance(part, Clip)]

    @property
    def poisoned(self) -> bool:
        return any(clip.look in POISONS for clip in self.clips)

    @property
    def huge(self) -> bool:
        return any(clip.look == "huge" for clip in self.clips)


# ------------------------------------------------------------------------------------------ what the family sees in it


def frames_of(family: str, clip: Clip) -> int:
    return clip.steps * getattr(TOYS[family], "temporal", 1)


def videos_of(family: str, row: tuple[Part, ...]) -> int:
    """How many videos a row holds in the family's eyes: an image alone in its row is no video."""
    toy, clips = TOYS[family], [part for part in row if isinstance(part, Clip)]
    if not toy.one_video_a_row:
        return len(clips)
    pictures = 3 * sum(isinstance(part, str) for part in row) if toy.images_are_frames else 0
    return int(sum(frames_of(family, clip) for clip in clips) + pictures > 1)


def video_columns(family: str, case: Case, ids: Tensor) -> Tensor:
    """[B, L] bool: the placeholders of videos."""
    toy: Any = TOYS[family]
    mask = ids == toy.placeholder
    if not case.clips and not toy.images_are_frames:
        return torch.zeros_like(mask)
    if not toy.as_images:
        return mask
    for row, (line, parts) in enumerate(zip(ids.tolist(), case.rows, strict=True)):
        start = 0
        for is_picture, run in itertools.groupby(mask[row].tolist()):
            length = len(list(run))
            if is_picture and not toy.images_are_frames and toy.begins_an_image(line, start, length):
                mask[row, start : start + length] = False
            start += length
        mask[row] &= videos_of(family, parts) > 0
    return mask


# ------------------------------------------------------------------------------------------------------- tensors


def pixels(family: str, clip: Clip) -> Tensor:
    """[T, 3, H, W] float32."""
    frames = frames_of(family, clip)
    height, width = TOYS[family].frame_size or SIDES[clip.side]
    g = torch.Generator().manual_seed(clip.seed)
    noise = torch.randn(frames, 3, height, width, generator=g)
    still = torch.randn(2, 3, height, width, generator=g)
    at = torch.arange(frames)
    if clip.look in ("black", "constant"):
        return torch.full_like(noise, 0.0 if clip.look == "black" else 0.7)
    if clip.look == "identical":
        return still[:1].repeat(frames, 1, 1, 1)
    if clip.look == "flicker":
        return still[at % 2]
    scale = {"noise": 1.0, "denormal": 1e-40, "large": 1e4, "huge": 1e30}.get(clip.look)
    if scale is not None:
        return noise * scale
    scene = still[(at * 2) // max(frames, 1)] + 0.01 * noise
    scene[:, :, :4, :4] = noise[:, :, :4, :4]  # something moves
    if clip.look == "all nan":
        scene[:] = torch.nan
    elif clip.look in POISONS:
        scene[frames // 2, 1, height // 2, width // 2] = float(clip.look)
    return scene


def inputs(family: str, case: Case) -> dict[str, Tensor]:
    """What the model is called with."""
    toy: Any = TOYS[family]
    x = _intact(family, case)
    if case.fault is not None:
        x = _with_fault(family, case, x)
    if case.bare:
        x = toy.only_placeholders_at_the_end(x)
    if case.call == "forward" and len(case.rows) > 1 and case.mask != "missing":
        x = toy.positioned(x)  # some stock models count padding too
    if case.mask == "missing":
        del x["attention_mask"]
    elif case.mask == "bool":
        x["attention_mask"] = x["attention_mask"].bool()
    return x


def _intact(family: str, case: Case, empty: tuple[Clip, ...] = ()) -> dict[str, Tensor]:
    """The prompt without its fault. empty: clips that have ids, but no frames."""
    toy = TOYS[family]
    rows = []
    for row in case.rows:
        parts: list[Any] = []
        for part in row:
            if isinstance(part, int):
                parts += [5 + 7 * (len(parts) + i) % 80 for i in range(part)]
            elif isinstance(part, str):
                g = torch.Generator().manual_seed(1)
                parts.append(("image", torch.randn(3, *(toy.frame_size or SIDES[0]), generator=g)))
            elif any(part is clip for clip in empty):
                parts += toy.video_ids(pixels(family, replace(part, steps=0)))
            else:
                parts.append(pixels(family, part))
        rows.append(parts)
    return build(family, rows, dtype=getattr(torch, case.dtype), side=case.side)


@functools.cache
def of_videos(family: str) -> frozenset[str]:
    """The names of the arguments that a prompt has because of its videos."""
    names = build(family, [[5, pixels(family, Clip()), pixels(family, Clip())]])
    return frozenset(names) - set(build(family, [[5]]))


@functools.cache
def sizes_of_videos(family: str) -> frozenset[str]:
    """Those of them that say how large the videos are, and what else is no pixels."""
    x = build(family, [[5, pixels(family, Clip()), pixels(family, Clip())]])
    return frozenset(name for name in of_videos(family) if not x[name].is_floating_point())


def _with_fault(family: str, case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    toy: Any = TOYS[family]
    fault, last, ids = case.fault, case.clips[-1], x["input_ids"].clone()
    where, words = (ids == toy.placeholder).nonzero(), ((ids >= 5) & (ids < 85)).nonzero()
    if fault in ("too few", "moved"):
        ids[tuple(where[-1])] = 5
    if fault == "too many":
        ids[tuple(words[-1])] = toy.placeholder
    elif fault == "moved":  # the total is right
        ids[tuple(words[words[:, 0] != where[-1, 0]][-1])] = toy.placeholder
    elif fault == "none":
        ids[ids == toy.placeholder] = 5
    elif fault == "no pixels":
        x = {k: v for k, v in x.items() if k not in of_videos(family)}
    elif fault == "no sizes":
        x = {k: v for k, v in x.items() if k not in sizes_of_videos(family)}
    elif fault in ("a video too many", "a video too few"):
        other = tuple(_with_one_more_or_less(row, last, fault == "a video too many") for row in case.rows)
        x = {**{k: v for k, v in _intact(family, replace(case, rows=other)).items() if k not in IN_SEQUENCE}, **_ids(x)}
    elif fault == "empty":
        whole, x = x, _intact(family, case, tuple(case.clips))
        ids = x["input_ids"]
        x |= {name: _emptied(name, whole[name]) for name in of_videos(family)}
    elif fault == "one empty":
        given, x = x, _intact(family, case, (last,))
        ids = x["input_ids"]
        for name in of_videos(family):  # what is told once a video is told of this one too
            if name.endswith("grid_thw"):
                none = torch.cat([torch.zeros_like(given[name][-1:, :1]), given[name][-1:, 1:]], 1)
                x[name] = torch.cat([x.get(name, none[:0]), none])
            elif name not in x:
                x[name] = _emptied(name, given[name])
            elif len(given[name]) == len(case.clips):
                x[name] = given[name]
    kinds = {"mm_token_type_ids": toy.token_types(ids)} if "mm_token_type_ids" in x else {}
    return {**x, **kinds, "input_ids": ids}


def _ids(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[name] for name in IN_SEQUENCE if name in x}


def _with_one_more_or_less(row: tuple[Part, ...], clip: Clip, more: bool) -> tuple[Part, ...]:
    parts: list[Part] = []
    for part in row:
        parts += ([part, part] if more else []) if part is clip else [part]
    return tuple(parts)


def _emptied(name: str, value: Tensor) -> Tensor:
    """An argument that is about videos, of videos without a frame."""
    if name.endswith("grid_thw"):
        return torch.cat([torch.zeros_like(value[:, :1]), value[:, 1:]], 1)
    if name.startswith("pixel_values"):  # [videos, frames, ...], or frames or patches first
        return value[:, :0] if value.ndim == 5 else value[:0]
    if name == "pixel_attention_mask":
        return value[:, :0]
    return value[:0] if name.endswith("mask") else value


def padded(family: str, case: Case) -> bool:
    """Whether some row is shorter than another."""
    return bool((inputs(family, replace(case, mask="int"))["input_ids"] == PAD).any())
