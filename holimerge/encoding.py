"""What passes between a model family and the outer stage: how a tower is to be run, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .encoder.stage import EncoderStage
from .tokens import MergeRecord, VideoTokens
from .tower_graphs import Graphs


class Grid(NamedTuple):
    """Tokens of a video (or image, or tile) as the LLM would see them."""

    frames: int
    rows: int
    columns: int

    @property
    def total(self) -> int:
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class Request:
    """How a tower is to be run.

    at: "projector_input" or "projector_output", what the reduction works on.
    scored: whether received attention is needed.
    chunk: frames per call of the tower; None for one stock call.
    encoder: the reduction inside the tower; None for none.
    graphs: that replay the tower's calls; None for eager ones.
    attention: how spans attend, as `holimerge.config.Config.tower_attention`.
    """

    at: str
    scored: bool
    chunk: int | None
    encoder: EncoderStage | None = None
    graphs: Graphs | None = None
    attention: str = "auto"


@dataclass
class Level:
    """Features of a video that the record merges: what the LLM reads, or what is added to one of its first layers.

    tokens: [T N, C], before or after the projector.
    project: [K, C] -> [K, D].
    whole: () -> [T N, D], all tokens by the stock projector on the stock tensor.
    """

    tokens: Tensor
    project: Callable[[Tensor], Tensor]
    whole: Callable[[], Tensor]

    def merged(self, record: MergeRecord) -> Tensor:
        """[K, D]: the kept tokens, projected."""
        return self.project(record.merge(self.tokens))


@dataclass
class Encoded:
    """One video after the vision tower.

    tokens: what the reduction decides on.
    levels: what the LLM reads, then what is added to its first layers (deepstack).
    """

    tokens: VideoTokens
    levels: list[Level]

    def joined(self, others: Sequence[Encoded]) -> Encoded:
        """This one and others of its grid as the frames of one video."""
        if not others:
            return self
        parts = [self, *others]
        scores = [p.tokens.scores for p in parts if p.tokens.scores is not None]
        tokens = VideoTokens(torch.cat([p.tokens.features for p in parts]), torch.cat(scores) if scores else None)

        def join(levels: tuple[Level, ...]) -> Level:
            together = torch.cat([level.tokens for level in levels])
            return replace(levels[0], tokens=together, whole=lambda: torch.cat([level.whole() for level in levels]))

        return Encoded(tokens, [join(levels) for levels in zip(*(p.levels for p in parts), strict=True)])
