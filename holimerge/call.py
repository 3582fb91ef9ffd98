"""The state of one forward, and how the hooks of one thread find it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from .placement import FrameImages, Placement
from .report import Report

if TYPE_CHECKING:
    from .handle import Handle
    from .inner_stage import InnerRun
    from .splice import Continuation, Packing


_SIGNATURES: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()  # of methods, by their function


def signature(method: Callable[..., Any]) -> inspect.Signature:
    """`inspect.signature` of a bound method, worked out once: it takes longer than launching a kernel."""
    function = getattr(method, "__func__", None)
    if function is None:
        return inspect.signature(method)
    if function not in _SIGNATURES:
        _SIGNATURES[function] = inspect.signature(method)
    return _SIGNATURES[function]


class Wrapped:
    """An instance attribute that stands in for a bound method; a class of its own so that it can be deep-copied."""

    def __init__(self, original: Callable[..., Any], run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # takes over its attributes, which may be these
        self.original, self.run = original, run
        self.__signature__ = inspect.signature(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.original, *args, **kwargs)


@dataclass
class Source:
    """The videos of one forward that one kind of placeholder stands for.

    mask: [B, L] bool, their placeholders, separators included.
    placements: one per video, in the order of the placeholders; None in a chunk of a prompt, whose videos only their
        features still tell.
    rows: which videos each row holds, once that is known.
    """

    mask: Tensor
    placements: list[Placement] | None
    rows: list[list[int]] | None = None

    def by_row(self) -> list[list[int]]:
        """Which videos each row holds, from the number of its placeholders (asks the device, once)."""
        return self.rows_of(self.mask.sum(1).tolist()) if self.rows is None else self.rows

    def rows_of(self, held: list[int]) -> list[list[int]]:
        """The same, from the numbers of placeholders themselves."""
        assert self.placements is not None
        self.rows = videos_by_row(held, [p.placeholders for p in self.placements])
        return self.rows

    def columns(self) -> list[tuple[int, Tensor]]:
        """Each video's row and the columns of its placeholders (asks the device)."""
        assert self.placements is not None
        found = []
        for row, videos in enumerate(self.by_row()):
            here = self.mask[row].nonzero().squeeze(1)
            lengths = [self.placements[v].placeholders for v in videos]
            found += [(row, part) for part in here.split(lengths)]
        return found


def videos_by_row(held: list[int], lengths: list[int]) -> list[list[int]]:
    """Which of the videos of `lengths` placeholders each row holds, by the number of placeholders in each row.

    Raises:
        ValueError: a row ends inside a video.
    """
    rows, video = [], 0
    for number, count in enumerate(held):
        row: list[int] = []
        wanted = count
        while wanted > 0 and video < len(lengths):
            wanted -= lengths[video]
            row.append(video)
            video += 1
        if wanted:
            here, *everywhere = (", ".join(map(str, x)) for x in ([lengths[v] for v in row], held, lengths))
            raise ValueError(
                f"row {number} of the prompt has {count} video placeholders, its videos make {here or 'no'} tokens "
                f"(placeholders of all rows: {everywhere[0]}; tokens of all videos: {everywhere[1]})"
            )
        rows.append(row)
    return rows


@dataclass
class Call:
    """One forward of one patched model, from its first hook to its last.

    opener: the module whose hook opened it and will close it.
    sources: where the prompt's videos stand, by kind of placeholder ("video", "image").
    dropping: whether some token of the prompt's videos was dropped or merged away.
    reached: how far it came, "core" or "language model". A second arrival there means that the call was broken off by
        something torch's hooks do not see (Ctrl-C) and was never closed.
    """

    handle: Handle
    opener: nn.Module
    token: Token[Call | None] | None = None
    labels: Tensor | None = None
    has_video: bool = False
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    cache: Cache | None = None
    sources: dict[str, Source] = field(default_factory=dict)
    report: Report | None = None
    dropping: bool = False
    reached: str = ""
    packing: Packing | None = None
    continuation: Continuation | None = None
    inner: InnerRun | None = None

    @property
    def video_mask(self) -> Tensor:
        """[B, L] bool: the placeholders of all videos."""
        masks = [source.mask for source in self.sources.values()]
        return masks[0] if len(masks) == 1 else torch.stack(masks).any(0)

    @property
    def placements(self) -> list[Placement] | None:
        """One per video, of one source after the other; None in a chunk of a prompt."""
        parts = [source.placements for source in self.sources.values()]
        return None if None in parts else [p for part in parts if part is not None for p in part]

    @property
    def prompt(self) -> Prompt | None:
        """Of the running `generate` of this model, if it is one."""
        prompt = PROMPT.get()
        return prompt if prompt is not None and prompt.handle is self.handle else None

    @property
    def roomy(self) -> bool:
        """Whether its static cache may be made as small as the prompt gets."""
        prompt = self.prompt
        steps = STEPS.get()
        recorded = steps is not None and steps.model is self.handle.model
        return prompt is not None and prompt.made_here and (prompt.uncompiled or recorded)

    @property
    def decoding(self) -> bool:
        """Whether this is a step of a running `generate` after its first forward."""
        prompt = self.prompt
        return prompt is not None and self.cache is not None and prompt.cache is self.cache

    @property
    def seen(self) -> int:
        """Tokens the caller counts in the cache. With a static cache the device is asked, so ask when needed only."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())


@dataclass
class Placed:
    """Videos that were encoded for a prompt.

    count: entries of the container that holds their features.
    frames: which images they are made of, if they are.
    """

    placements: list[Placement]
    count: int
    frames: FrameImages | None = None


@dataclass
class Prompt:
    """The arguments of a running `generate`, for videos that are encoded before the first forward.

    chunked: whether the prompt will be prefilled in chunks.
    report: of the videos that were encoded for it; placed: the same by kind of placeholder. They are kept here and
        not on the features, which accelerate builds anew when it moves a module's arguments.
    dropping: whether some token of its videos was dropped or merged away.
    made_here: whether `generate` makes the cache; uncompiled: whether it never compiles a step for the cache's size.
    cache: what its first forward wrote to. What comes after it are `generate`'s own tokens, none of them padding.
    """

    handle: Handle
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    seen: int
    chunked: bool = False
    made_here: bool = False
    uncompiled: bool = False
    cache: Cache | None = None
    dropping: bool = False
    report: Report | None = None
    placed: dict[str, Placed] = field(default_factory=dict)

    @property
    def unseen(self) -> int:
        """Its tokens that are not in the cache: `generate` takes them alone, or with those before them."""
        given = self.input_ids if self.input_ids is not None else self.inputs_embeds
        assert given is not None
        mask = self.attention_mask
        whole = self.input_ids is None or mask is None or mask.shape[1] == given.shape[1]
        return given.shape[1] - self.seen if whole and given.shape[1] > self.seen else given.shape[1]

    @property
    def placements(self) -> list[Placement]:
        """One per video, of one kind after the other."""
        return [placement for placed in self.placed.values() for placement in placed.placements]


CALL: ContextVar[Call | None] = ContextVar("holimerge_call", default=None)
PROMPT: ContextVar[Prompt | None] = ContextVar("holimerge_prompt", default=None)
STEPS: ContextVar[Any] = ContextVar("holimerge_steps", default=None)  # of a running `generate` that records its steps


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name."""
    if not args:
        return kwargs
    names = list(signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
