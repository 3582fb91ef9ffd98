"""Qwen2.5-Omni's thinker: Qwen2.5-VL's tower, and audio, which may alternate with the video in chunks of time.

Video tokens are reduced; audio tokens stay, with the positions that align both in time. The talker is not supported.
"""

from __future__ import annotations

from ._grids import GridFamily


class Thinker(GridFamily):
    framed = True  # audio of the same time stands between chunks of frames
    no_contiguous = "positions align video and audio in time; use original ones"


FAMILY = Thinker()
