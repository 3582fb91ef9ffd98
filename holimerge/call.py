"""The state of one forward, and how the hooks of one thread find it."""

from __future__ import annotations

import inspect
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Cache

from .report import Report
from .tokens import MergeRecord

if TYPE_CHECKING:
    from .handle import Handle
    from .inner_stage import InnerRun
    from .splice import Continuation, Packing


@dataclass
class Call:
    """One forward of one patched model, from its first hook to its last.

    opener: the module whose hook opened it and will close it.
    reductions: one record per video, in the order of the placeholders; None in a chunk of a prompt.
    dropping: whether some token of the prompt's videos was dropped or merged away.
    reached: how far it came, "core" or "language model". A second arrival there means that the call was broken off by
        something torch's hooks do not see (Ctrl-C) and was never closed.
    """

    handle: Handle
    opener: nn.Module
    token: Token[Call | None] | None = None
    labels: Tensor | None = None
    has_video: bool = False
    video_mask: Tensor | None = None
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    cache: Cache | None = None
    reductions: list[MergeRecord] | None = None
    report: Report | None = None
    dropping: bool = False
    reached: str = ""
    packing: Packing | None = None
    continuation: Continuation | None = None
    inner: InnerRun | None = None

    @property
    def seen(self) -> int:
        """Tokens the caller counts in the cache. With a static cache the device is asked, so ask when needed only."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())


@dataclass
class Prompt:
    """The arguments of a running `generate`, for videos that are encoded before the first forward.

    chunked: whether the prompt will be prefilled in chunks.
    report: of the videos that were encoded for it.
    dropping: whether some token of its videos was dropped or merged away.
    """

    handle: Handle
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    seen: int
    chunked: bool = False
    dropping: bool = False
    report: Report | None = None


CALL: ContextVar[Call | None] = ContextVar("holimerge_call", default=None)
PROMPT: ContextVar[Prompt | None] = ContextVar("holimerge_prompt", default=None)


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
