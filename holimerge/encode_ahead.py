"""Videos that a patched model's vision tower encodes while they are being read.

The tower runs on a few frames at a time, as with `chunk_frames`, and what it gives waits beside the pixels. A prompt
with that very tensor then begins with the reduction; any other tensor, a copy of it included, is encoded as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .encoding import Encoded, Grid

if TYPE_CHECKING:
    from .outer_stage import OuterStage

_PIXELS, _GRID = "pixel_values_videos", "video_grid_thw"
_KNOWN = WeakTensorKeyDictionary()  # pixels -> their Ahead


class Ahead:
    """One video on its way through the tower of `stage`'s model.

    request: how the tower runs; its report of a reduction inside the tower is about all that came so far.
    """

    def __init__(self, stage: OuterStage, device: torch.device) -> None:
        self._stage, self._device = weakref.ref(stage), device
        self._modes = _modes(stage, device)
        self._version = 0
        self.start()

    def start(self) -> None:
        """Nothing has come so far; what had is forgotten."""
        stage = self._stage()
        assert stage is not None
        self.request = stage.request()
        self._parts: list[Encoded] = []
        self._grid = Grid(0, 0, 0)

    def add(self, piece: dict[str, Tensor]) -> None:
        """Encode the next frames. piece: as `Settings.pixels` gives them, on the tower's device."""
        stage = self._patch
        if stage is None:
            raise RuntimeError("the model was unpatched, or patched anew, while a video was being read for it")
        family, core = stage.handle.family, stage.handle.core
        stock = core.__dict__[stage.functions()["video"]].original
        (grid,) = family.grids(core, piece)
        with torch.no_grad():
            self._parts += family.encode(core, stock, piece, self.request)
        self._grid = grid._replace(frames=self._grid.frames + grid.frames)

    def keep(self, pixels: Tensor) -> None:
        """That was all; `pixels` holds the frames that were encoded. Both go when nobody has the pixels any more."""
        self._version = pixels._version
        self.request = replace(self.request, graphs=None)  # they would outlive the patch
        _KNOWN[pixels] = self

    def fits(self, stage: OuterStage, arguments: Mapping[str, Any], grids: list[Grid]) -> bool:
        """Whether the tower would do with these arguments what it has done."""
        if self._stage() is not stage or torch.is_grad_enabled() or self._modes != _modes(stage, self._device):
            return False
        if grids != [self._grid] or self._version != arguments[_PIXELS]._version:
            return False
        config = stage.handle.core.config
        others = ((name, value) for name, value in arguments.items() if name not in (_PIXELS, _GRID, "return_dict"))
        return all(v is None or (not isinstance(v, Tensor) and v == getattr(config, name, None)) for name, v in others)

    @property
    def stale(self) -> bool:
        """Whether the patch that encoded is gone."""
        return self._patch is None

    @property
    def _patch(self) -> OuterStage | None:
        """The stage that encodes, as long as the model has its patch."""
        stage = self._stage()
        return stage if stage is not None and stage.attached else None

    def encoded(self) -> list[Encoded]:
        """What the tower gave, as of one video."""
        first, *others = self._parts
        return [first.joined(others)]


def encoded_ahead(stage: OuterStage, arguments: Mapping[str, Any], grids: list[Grid]) -> Ahead | None:
    """What waits beside the pixels among the arguments of the function that encodes videos; None: nothing that fits.

    What does not fit: other videos beside it in the prompt's call, another grid, features of other layers, pixels or
    weights that were written to, gradients, another training or autocast mode, another patch of the model.
    """
    pixels = arguments.get(_PIXELS)
    found: Ahead | None = _KNOWN.get(pixels) if isinstance(pixels, Tensor) and not pixels.is_inference() else None
    if found is not None and found.stale:
        del _KNOWN[pixels]
        return None
    return found if found is not None and found.fits(stage, arguments, grids) else None


def _modes(stage: OuterStage, device: torch.device) -> tuple[Any, ...]:
    core, kind = stage.handle.core, device.type
    chosen = ("vision_feature_layer", "vision_feature_select_strategy", "_attn_implementation")
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    own = [p for module in core.children() if module is not stage.handle.lm for p in module.parameters()]
    written = sum(p._version for p in own if not p.is_inference())
    kinds = {p.dtype for p in own}
    return core.training, cast, written, kinds, *(repr(getattr(core.config, name, None)) for name in chosen)
