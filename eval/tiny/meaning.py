"""The code that tower and LLM share: one direction for each meaning; a video token is the sum of what it shows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .architecture import WIDTH
from .language import MEANINGS
from .world import COLORS, COLUMNS, GRID, NUMBERS, PLACES, ROWS, SHAPES, Facts

SIZES = {"shape": len(SHAPES), "color": len(COLORS), "place": len(PLACES), "number": len(NUMBERS)}


class Labels(NamedTuple):
    """What each cell shows, int64 `[T, GRID^2]`; -1 where there is no object."""

    shape: Tensor
    color: Tensor
    direction: Tensor
    place: Tensor
    number: Tensor
    scene: Tensor


def labels(facts: Facts, *, seen: bool = False) -> Labels:
    """Facts as tensors. `seen`: count the objects of each frame instead of those of its scene."""
    frames = facts.shape.shape[0]
    shape, color, direction = (
        torch.from_numpy(part).reshape(frames, -1) for part in (facts.shape, facts.color, facts.direction)
    )
    place, number, scene = (
        torch.from_numpy(part)[:, None].expand(frames, GRID * GRID) for part in (facts.place, facts.count, facts.scene)
    )
    if seen:
        number = ((shape >= 0) & (shape < len(SHAPES) - 1)).sum(1, keepdim=True).expand_as(number)
    return Labels(shape, color, direction, place, number, scene)


class Code:
    """Orthonormal directions `[meanings, WIDTH]`, the same for every run."""

    def __init__(self, device: Any = "cpu") -> None:
        generator = torch.Generator().manual_seed(20260731)
        noise = torch.randn(WIDTH, len(MEANINGS), generator=generator, dtype=torch.float64)
        self.table = torch.linalg.qr(noise).Q.T.float().contiguous().to(device)
        self.index = {name: i for i, name in enumerate(MEANINGS)}
        cells = torch.arange(GRID, device=device)
        rows, columns = cells.repeat_interleave(GRID), cells.repeat(GRID)
        axis = (cells - (GRID - 1) / 2) / GRID
        third = GRID // 3
        self.position = (
            self.of("video")
            + torch.stack([self.of(f"row:{word}") for word in ROWS])[rows // third]
            + torch.stack([self.of(f"column:{word}") for word in COLUMNS])[columns // third]
            + 4 * axis[columns, None] * self.of("x")
            + 4 * axis[rows, None] * self.of("y")
        )

    def of(self, name: str) -> Tensor:
        """The direction of a meaning, `[WIDTH]`."""
        return self.table[self.index[name]]

    def kind(self, kind: str) -> Tensor:
        """All directions of a kind, `[choices, WIDTH]`."""
        begin = next(i for name, i in self.index.items() if name.startswith(f"{kind}:"))
        return self.table[begin : begin + SIZES[kind]]

    def tokens(self, found: Labels) -> Tensor:
        """What the tower should say, float32 `[..., GRID^2, WIDTH]`."""
        there = (found.shape >= 0)[..., None]
        thing = self.kind("shape")[found.shape.clamp_min(0)] + self.kind("color")[found.color.clamp_min(0)]
        thing = thing + self.of("object")
        scene = self.kind("place")[found.place] + self.kind("number")[found.number]
        return self.position + scene + thing * there

    def word(self, word: str) -> Tensor | None:
        """The direction of a word that means something visible; None for the others."""
        if "-" in word:
            row, column = word.split("-")
            return self.of(f"row:{row}") + self.of(f"column:{column}")
        for kind in SIZES:
            if (name := f"{kind}:{word}") in self.index:
                return self.of(name)
        return None
