"""Qwen2.5-Omni's thinker: Qwen2.5-VL's tower, and audio, which may alternate with the video in chunks of time.

Video tokens are reduced; audio tokens stay, with the positions that align both in time. The talker is not supported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from holimerge.encoder.tower import Tower

from ._grids import GridFamily


class Thinker(GridFamily):
    since = "5.21"  # before, one module was the thinker's core and its head
    framed = True  # audio of the same time stands between chunks of frames

    def encoder_tower(self, core: Any, arguments: dict[str, Any], frames: list[int]) -> Tower:
        return replace(super().encoder_tower(core, arguments, frames), names=("norm2", "mlp", "attn", "k"))

    def check(self, arguments: dict[str, Any], *, contiguous: bool) -> None:
        if contiguous and arguments.get("input_features") is not None:
            raise ValueError(
                "outer.positions: contiguous: the positions of this prompt align its audio and video in time; "
                "use original (or auto)"
            )


FAMILY = Thinker()
