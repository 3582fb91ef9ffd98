"""The `encoder` block of one patched model: what a family asks for when it runs its tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..section import ConfigError
from ..tokens import upload
from .frame_run import FrameRun
from .gate import Places, encoded_frames, gate_sources, place_sources
from .options import Encoder
from .patch_run import Patches, PatchRun
from .token_run import TokenRun
from .tower import EncoderReport, Run, Tower


class EncoderStage:
    """One prompt's reduction inside the tower, which may be called several times."""

    def __init__(self, options: Encoder, patches: Patches | None = None) -> None:
        """patches: of a gate whose unit is the patch, once it was asked."""
        self.options, self.patches = options, patches
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
        if self.patches is not None:
            return PatchRun(tower, self.report, self.patches)
        return None

    def of_call(self) -> EncoderStage:
        """The same for a single call, with a report of its own."""
        return EncoderStage(self.options, self.patches)

    @torch.no_grad()
    def gate(self, videos: list[tuple[Tensor, Places]]) -> Gated:
        """Which frames are encoded.

        Args:
            videos: pixel values of each video's frames [T, ...], and what makes patches (or places) [N, V] of one.
        """
        gate = self.options.gate
        assert gate is not None
        if gate.unit == "frame":
            return Gated([gate_sources(x, places, gate.threshold, gate.most).tolist() for x, places in videos])
        found = [place_sources(x, places, gate.threshold, gate.most) for x, places in videos]
        host = torch.cat([source.flatten() for source in found]).cpu().split([source.numel() for source in found])
        each = [encoded_frames(x.view(source.shape)) for x, source in zip(host, found, strict=True)]
        return Gated([source for source, _ in each], [places for _, places in each])

    def count(self, tower: Tower, gated: Gated) -> None:
        """Note what a gate left of the videos; where its unit is the patch, the blocks' rows come from their calls."""
        encoded = [len(set(source)) for source in gated.sources]
        if gated.places:
            self.report.add(tower.rows, [0] * len(tower.blocks), encoded)
            return
        rows = sum(t * p for t, (_, p) in zip(encoded, tower.videos, strict=True))
        self.report.add(tower.rows, [rows] * len(tower.blocks), encoded)


@dataclass(frozen=True)
class Gated:
    """What a gate decided.

    sources: per video, the frame each frame takes its features from.
    places: where the unit is the patch, per video, the frame each place takes its features from [T', N], of the frames
        that are encoded, numbered among these.
    """

    sources: list[list[int]]
    places: Sequence[Tensor] = ()

    @property
    def all(self) -> bool:
        """Whether every frame is encoded."""
        return all(source == list(range(len(source))) for source in self.sources)

    def _of_all(self) -> list[int]:
        starts = accumulate((len(source) for source in self.sources), initial=0)
        return [start + frame for start, source in zip(starts, self.sources, strict=False) for frame in source]

    def encoded(self, device: torch.device) -> Tensor:
        """The frames that are encoded, numbered through all videos."""
        return upload(sorted(set(self._of_all())), device)

    def index(self, device: torch.device) -> Tensor:
        """Of every frame of all videos, its source's place among those that are encoded."""
        sources = upload(self._of_all(), device)
        return torch.searchsorted(self.encoded(device), sources)


def check(options: Encoder, refused: str, depth: Callable[[], int]) -> None:
    """Refuse a configuration that a tower of this many blocks cannot follow; `refused` says why its family cannot."""
    if refused:
        raise ConfigError(f"encoder.{options.kind}: {refused}")
    layered = options.frames or options.tokens
    if layered is not None:
        layered.resolve(options.kind, depth())
