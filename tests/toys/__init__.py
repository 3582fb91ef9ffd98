"""Tiny random models of the real Hugging Face classes, and prompts for them: one file a family, as in `patches/`."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable
from typing import Any

import torch
from packaging.version import Version

from holimerge import list_families
from holimerge.registry import family_module

from .base import AUDIO, HERE, IMAGE, MODES, PAD, TEXT, VIDEO, VISION_END, VISION_START, Toy

MISSING: dict[str, str] = {  # why a family has no toy in this transformers
    name: f"{name} needs transformers {family_module(name).FAMILY.since}, this is {HERE}"
    for name in list_families()
    if HERE.release < Version(family_module(name).FAMILY.since).release
}
TOYS: dict[str, Toy] = {
    m.name: importlib.import_module(f"{__name__}.{m.name}").TOY
    for m in pkgutil.iter_modules(__path__)
    if m.name != "base" and m.name in list_families() and m.name not in MISSING
}
FAMILIES = sorted(TOYS)
# One for each way in which families differ, for tests that take long; all of them at night.
SOME = [name for name in ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl") if name in TOYS]
if os.environ.get("HOLIMERGE_ALL_FAMILIES"):
    SOME += [name for name in FAMILIES if name not in SOME]
elif os.environ.get("HOLIMERGE_SOME_FAMILIES"):  # on a second transformers
    FAMILIES = SOME
__all__ = [
    "AUDIO",
    "FAMILIES",
    "HERE",
    "IMAGE",
    "MISSING",
    "MODES",
    "PAD",
    "SOME",
    "TEXT",
    "TOYS",
    "VIDEO",
    "VISION_END",
    "VISION_START",
    "Toy",
    "cases",
]


def cases(every: Iterable[tuple[Any, ...]], few: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """(family, *case) for `parametrize`: every case on SOME families, a few on the others."""
    every, few = list(every), list(few)
    assert set(few) <= set(every)
    return [(family, *case) for family in FAMILIES for case in (every if family in SOME else few)]


def make_model(
    family: str,
    *,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gain: float = 1.0,
    **text: Any,
) -> Any:
    """A tiny model of a family with random weights, large enough for scores to differ."""
    torch.manual_seed(seed)
    toy = TOYS[family]
    model = toy.model(attn, **text)
    decoder = toy.language_model(model)
    of_decoder = {id(p) for p in decoder.parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 or "newline" in name:
                # wider layers get smaller weights, so that activations keep their size
                p.copy_(torch.randn(p.shape) * 0.12 * (32 / max(32, p.shape[-1])) ** 0.5)
                if id(p) in of_decoder:
                    p.mul_(gain)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    # a random model would otherwise write placeholders, which no forward without a cache can read back
    model.generation_config.suppress_tokens = [VIDEO, IMAGE, VISION_START, VISION_END, AUDIO, *toy.markers]
    return model.to(dtype).eval()


def make_pixels(frames: int, height: int, width: int, seed: int) -> torch.Tensor:
    """[T, 3, H, W]: two still scenes with a moving square and little noise, so that some tokens are static."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, 3, height, width, generator=g)
    video = scenes[(torch.arange(frames) * 2) // max(frames, 1)].clone()
    for t in range(frames):
        x = (3 * t) % max(1, width - 8)
        video[t, :, 4:12, x : x + 8] = torch.randn(3, 8, 8, generator=g)
    return video + 0.01 * torch.randn(video.shape, generator=g)


def make_video(family: str, *, frames: int = 6, side: tuple[int, int] = (24, 32), seed: int = 0) -> torch.Tensor:
    height, width = TOYS[family].frame_size or side
    return make_pixels(frames, height, width, seed)


def build(
    family: str,
    rows: list[list[Any]],
    *,
    dtype: torch.dtype = torch.float32,
    side: str = "left",
) -> dict[str, torch.Tensor]:
    """A batch. Each row lists ints (text tokens), videos [T, 3, H, W] and ("image", [3, H, W])."""
    toy = TOYS[family]
    sequences, videos, images = [], [], []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids.append(part)
            elif isinstance(part, tuple):
                images.append(part[1])
                ids += toy.image_ids(part[1])
            else:
                videos.append(part)
                ids += toy.video_ids(part)
        sequences.append(ids)
    width = max(map(len, sequences))

    def padded(ids: list[int], fill: int) -> list[int]:
        rest = [fill] * (width - len(ids))
        return rest + ids if side == "left" else ids + rest

    input_ids = torch.tensor([padded(s, PAD) for s in sequences])
    mask = torch.tensor([padded([1] * len(s), 0) for s in sequences])
    return {"input_ids": input_ids, "attention_mask": mask, **toy.tensors(input_ids, videos, images, dtype)}


def prompt(family: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    """One row: text, a video, text."""
    dtype = kwargs.pop("dtype", torch.float32)
    return build(family, [[5, 6, 7, make_video(family, **kwargs), 11, 12, 13]], dtype=dtype)
