"""What the last forward did: tokens by video, milliseconds by stage."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .encoder.tower import EncoderReport
from .placement import Placement
from .timing import StageClock
from .tokens import MergeRecord


@dataclass
class VideoReport:
    """One video of the last prompt.

    placement: its record, and where its tokens stand among the placeholders of the prompt.
    grid: rows and columns of a frame's tokens.
    inner_kept: [entering] bool, which of them the inner merge kept; None without one.
    """

    placement: Placement
    grid: tuple[int, int]
    inner_kept: Tensor | None = None

    @property
    def record(self) -> MergeRecord:
        """Where every original token went."""
        return self.placement.record

    @property
    def separators(self) -> int:
        """Newline tokens and the like that entered beside the video's tokens (not counted in `entering`)."""
        return self.placement.separators()

    @property
    def features(self) -> int:
        """Tokens the vision tower made of the video."""
        return self.record.total

    @property
    def entering(self) -> int:
        """Tokens that entered the LLM."""
        return self.record.kept

    @property
    def after_inner(self) -> int | None:
        """Tokens left after the inner merge's layer; None if there was no inner merge."""
        return None if self.inner_kept is None else int(self.inner_kept.sum())

    @property
    def segments(self) -> list[tuple[int, int]]:
        """First and last frame of each temporal segment (empty if the method has none)."""
        return list(self.record.segments)

    @property
    def kept_per_frame(self) -> list[int]:
        """Kept tokens standing in each frame."""
        return self.record.kept_per_frame()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "frames": self.record.frames,
            "grid": list(self.grid),
            "features": self.features,
            "entering": self.entering,
            "after_inner": self.after_inner,
            "separators": self.separators,
            "segments": [list(s) for s in self.segments],
            "kept_per_frame": self.kept_per_frame,
        }


@dataclass
class Report:
    """The last forward that started a prompt (decoding steps leave it as it is).

    videos: one entry per video, in the order they were given.
    inner_layer: decoder layer of the inner merge, or None.
    clock: the stages' clock; `milliseconds` reads it.
    encoders: per time the tower was asked for videos, what a reduction inside it left to do.
    ahead: whether the tower had encoded the video while it was read (`holimerge.reading`), so that `vision` is no more
        than joining what it gave.
    """

    videos: list[VideoReport] = field(default_factory=list)
    inner_layer: int | None = None
    clock: StageClock = field(default_factory=StageClock)
    encoders: list[EncoderReport] = field(default_factory=list)
    ahead: bool = False

    @property
    def milliseconds(self) -> dict[str, float]:
        """ms by stage: vision, reduce, project, splice, inner, prefill (which contains inner)."""
        return self.clock.milliseconds()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; `encoders` only where a reduction inside the tower is configured, `ahead` only
        where it is true."""
        plain: dict[str, Any] = {
            "videos": [v.to_dict() for v in self.videos],
            "inner_layer": self.inner_layer,
            "milliseconds": {k: round(v, 3) for k, v in self.milliseconds.items()},
        }
        if self.encoders:
            plain["encoders"] = [encoder.to_dict() for encoder in self.encoders]
        if self.ahead:
            plain["ahead"] = True
        return plain

    def to_json(self, indent: int | None = None) -> str:
        """The report as a JSON text."""
        return json.dumps(self.to_dict(), indent=indent)


@dataclass(frozen=True)
class Selection:
    """Every choice of one forward, so that another forward can make the same ones.

    outer: one record per video.
    inner: per row of the batch, [V] int64, the owner of each entering video token (see `holimerge.inner`); None
        without inner merge.
    """

    outer: list[MergeRecord]
    inner: list[Tensor] | None = None

    def of(self, videos: list[int], rows: list[int]) -> Selection:
        """The choices for some of the videos and rows."""
        inner = None if self.inner is None else [self.inner[r] for r in rows]
        return Selection([self.outer[v] for v in videos], inner)
