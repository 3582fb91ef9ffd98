"""What a method is: options, and a function from a video's tokens to a merge record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ..tokens import MergeRecord, Target, VideoTokens

Reduce = Callable[[VideoTokens, Target, Any], MergeRecord]


@dataclass(frozen=True)
class Method:
    """A reduction method. Its file defines one, named METHOD.

    options: the pydantic class of its `outer` block (a subclass of `holimerge.config.OuterOptions`), or None for a
        method that keeps everything.
    reduce: (tokens, target, options) -> record. Pure: no model, no input or output, no global random state.
    needs_scores: whether it needs the attention received in the vision tower.
    """

    options: type[BaseModel] | None = None
    reduce: Reduce | None = None
    needs_scores: bool = False
