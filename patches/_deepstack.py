"""What Qwen3-VL and its mixture of experts share: features of several tower layers, timestamps between the frames."""

from __future__ import annotations

from typing import Any

from ._grids import GridFamily


class DeepstackFamily(GridFamily):
    """Each deepstack merger's tokens are reduced by the record of the main ones."""

    since = "5.18"  # before, deepstack features came in one tensor, not one by video
    framed = True

    def mergers(self, core: Any) -> list[Any]:
        return [core.visual.merger, *core.visual.deepstack_merger_list]

    def deepstack(self, core: Any) -> int:
        return len(core.visual.deepstack_merger_list)
