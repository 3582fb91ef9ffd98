"""One video is encoded once for all its questions.

No outer reduction here looks at the question: what enters the LLM is a function of the pixels and of the budget. So
inside `reusing(model)` the vision tower's output (unpatched), or the reduced tokens (patched), are kept for the
videos seen last and returned for equal pixels. Equal means every value, compared; nothing is guessed from names. A
budget on the prompt (`flops`, `ttft_ms`) depends on its length, so its count is part of what must be equal. The inner
merge does look at the question and is done each time. Videos of a batch are encoded one by one, so that every path
computes the same bits.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from holimerge.api import _handle, _inner_model
from holimerge.capture import first_argument
from holimerge.handle import Handle
from holimerge.outer_stage import ReducedVideo
from holimerge.placement import Placement
from holimerge.registry import family_module
from holimerge.report import Report
from holimerge.tokens import Target


@dataclass
class Reuse:
    """What is kept: at most `size` videos, the last ones used.

    paid, reused: videos that went through the vision tower, and that did not, since `reset`.
    """

    size: int = 1
    paid: int = 0
    reused: int = 0
    kept: OrderedDict[int, tuple[tuple[Any, ...], Tensor, Any]] = field(default_factory=OrderedDict)
    serial: int = 0

    def reset(self) -> None:
        """Count anew; what is kept stays."""
        self.paid = self.reused = 0

    def find(self, told: tuple[Any, ...], pixels: Tensor, make: Callable[[], Any]) -> Any:
        """The result kept for these pixels (and whatever else decides), or `make()`, which is kept from now on."""
        for number, (other, seen, result) in self.kept.items():
            same = other == told and seen.shape == pixels.shape and seen.dtype == pixels.dtype
            if same and seen.device == pixels.device and torch.equal(seen, pixels):
                self.kept.move_to_end(number)
                self.reused += 1
                return result
        result = make()
        self.paid += 1
        self.serial += 1
        self.kept[self.serial] = (told, pixels.detach().clone(), result)
        while len(self.kept) > self.size:
            self.kept.popitem(last=False)
        return result


@contextmanager
def reusing(model: Any, size: int = 1) -> Iterator[Reuse]:
    """Keep what the vision tower gave for the last `size` videos, while the model stays patched as it is now.

    Enter it inside `merging` or `patched`; afterwards the model is as before. Not for training.
    """
    reuse = Reuse(size)
    handle = _handle(model)
    if handle is None:
        inner = _inner_model(model)
        family = family_module(inner.config.model_type).FAMILY
        owner, name = family.core(inner), "get_video_features"
        run = _stock(owner.get_video_features, family, owner, reuse)
    else:
        owner, name = handle.outer, "run"
        run = _handled(handle, handle.outer.run, reuse)
    own = owner.__dict__.get(name)
    owner.__dict__[name] = run
    try:
        yield reuse
    finally:
        owner.__dict__.pop(name, None)
        if own is not None:
            owner.__dict__[name] = own
        reuse.kept.clear()


def _stock(stock: Callable[..., Any], family: Any, core: Any, reuse: Reuse) -> Callable[..., Any]:
    """Around the stock `get_video_features`."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def features(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
        arguments.update(arguments.pop("kwargs", {}))
        arguments["return_dict"] = True
        parts = []
        for one, told in _videos(arguments, family.grids(core, arguments)):
            parts.append(reuse.find(told, one[_pixels(one)], functools.partial(_pooled, stock, one)))
        return BaseModelOutputWithPooling(pooler_output=_joined(parts))

    return features


def _pooled(stock: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return stock(**arguments).pooler_output


def _handled(handle: Handle, run: Callable[..., Any], reuse: Reuse) -> Callable[..., Any]:
    """Around `OuterStage.run`."""

    def features(
        original: Callable[..., Any],
        arguments: dict[str, Any],
        grids: list[Any],
        targets: list[Target] | None,
        report: Report,
        videos: list[list[int]],
        earlier: int,
    ) -> tuple[ReducedVideo, list[Placement]]:
        if handle.replay is not None:  # choices are given for the whole prompt
            return run(original, arguments, grids, targets, report, videos, earlier)
        outputs, placements = [], []
        for i, (one, told) in enumerate(_videos(arguments, grids)):
            target = None if targets is None else [targets[i]]
            make = functools.partial(run, original, one, [grids[i]], target, report, [[0]], 0)
            output, (placement,) = reuse.find((*told, *(target or ())), one[_pixels(one)], make)
            outputs.append(output)
            # reports know a video by its record, also two rows of one video
            placements.append(replace(placement, record=copy.copy(placement.record)))
        deep = [output.deepstack_features for output in outputs]
        return (
            ReducedVideo(
                pooler_output=_joined([output.pooler_output for output in outputs]),
                deepstack_features=None if None in deep else [_joined(list(x)) for x in zip(*deep, strict=True)],
                kept=None if targets is None else [kept for output in outputs for kept in output.kept],
            ),
            placements,
        )

    return features


def _pixels(arguments: dict[str, Any]) -> str:
    return first_argument(arguments, "pixel_values_videos", "pixel_values")


def _videos(arguments: dict[str, Any], grids: list[Any]) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """The arguments of each video alone, and what besides its pixels decides the result."""
    name = _pixels(arguments)
    pixels, thw = arguments[name], arguments.get("video_grid_thw")
    start = 0
    for i in range(len(grids)):
        if thw is None:
            one = {**arguments, name: pixels[i : i + 1]}
        else:
            stop = start + int(thw[i].prod())
            one = {**arguments, name: pixels[start:stop], "video_grid_thw": thw[i : i + 1]}
            start = stop
        yield one, (grids[i],)


def _joined(parts: list[Any]) -> Any:
    """Pooled features of several videos: [1, L, D] tensors one below the other, or tuples one after the other."""
    if isinstance(parts[0], Tensor):
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return tuple(video for part in parts for video in part)
