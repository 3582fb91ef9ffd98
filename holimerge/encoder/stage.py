"""The `encoder` block of one patched model: what a family asks for when it runs its tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..section import ConfigError
from .frame_run import FrameRun
from .gate import gate_sources
from .options import Encoder
from .token_run import TokenRun
from .tower import EncoderReport, Run, Tower


class EncoderStage:
    """One prompt's reduction inside the tower, which may be called several times."""

    def __init__(self, options: Encoder) -> None:
        self.options = options
        self.report = EncoderReport(options.kind)

    def run(self, tower: Tower) -> Run | None:
        """For a call of the tower; None where its blocks are left alone.

        Raises:
            ConfigError: the tower lacks one of the configured layers.
        """
        frames, tokens = self.options.frames, self.options.tokens
        depth = len(tower.blocks)
        if frames is not None:
            return FrameRun(tower, frames.resolve("frames", depth), self.report, frames)
        if tokens is not None:
            return TokenRun(tower, tokens.resolve("tokens", depth), self.report, tokens)
        return None

    @torch.no_grad()
    def gate(self, videos: list[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> Gated:
        """Which frames are encoded.

        Args:
            videos: pixel values of each video's frames [T, ...], and what makes means per patch of their differences.
        """
        gate = self.options.gate
        assert gate is not None
        found = [gate_sources(x, per_patch, gate.threshold, gate.changed) for x, per_patch in videos]
        return Gated([source.tolist() for source in found])

    def count(self, tower: Tower, gated: Gated) -> None:
        """Note what a gate left of the videos."""
        encoded = [len(set(source)) for source in gated.sources]
        rows = sum(t * p for t, (_, p) in zip(encoded, tower.videos, strict=True))
        self.report.add(tower.rows, [rows] * len(tower.blocks), encoded)


@dataclass(frozen=True)
class Gated:
    """sources: per video, the frame each frame takes its features from."""

    sources: list[list[int]]

    @property
    def all(self) -> bool:
        """Whether every frame is encoded."""
        return all(source == list(range(len(source))) for source in self.sources)

    def _of_all(self) -> list[int]:
        starts = accumulate((len(source) for source in self.sources), initial=0)
        return [start + frame for start, source in zip(starts, self.sources, strict=False) for frame in source]

    def encoded(self, device: torch.device) -> Tensor:
        """The frames that are encoded, numbered through all videos."""
        return torch.tensor(sorted(set(self._of_all())), device=device)

    def index(self, device: torch.device) -> Tensor:
        """Of every frame of all videos, its source's place among those that are encoded."""
        sources = torch.tensor(self._of_all(), device=device)
        return torch.searchsorted(self.encoded(device), sources)


def check(options: Encoder, refused: str, depth: Callable[[], int]) -> None:
    """Refuse a configuration that a tower of this many blocks cannot follow; `refused` says why its family cannot."""
    if refused:
        raise ConfigError(f"encoder.{options.kind}: {refused}")
    layered = options.frames or options.tokens
    if layered is not None:
        layered.resolve(options.kind, depth())
