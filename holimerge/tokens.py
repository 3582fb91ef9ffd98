"""What goes into a reduction and what comes out: a video's tokens and the merge record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_COPY_BYTES = 2**28  # of a float32 copy held at once


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on a device, without waiting for what the device is doing."""
    tensor = torch.as_tensor(values, dtype=dtype, device="cpu")  # whatever the user's default device is
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def sum_of_rows(x: Tensor, rows: Tensor, starts: Tensor, *, weights: Tensor | None = None, mode: str = "sum") -> Tensor:
    """Sums or means of groups of rows, formed in float32 (float64 for float64) and deterministic.

    Args:
        x: [M, C] of any float dtype; it is read once, and no float32 copy of all of it is held.
        rows: [R] int64, rows of x, those of a group side by side.
        starts: [G] int64, where each group begins in `rows`; a group may be empty and is zero then.
        weights: [R] or None, for mode "sum".
        mode: "sum" or "mean".

    Returns:
        [G, C] float32 (float64 for float64).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if weights is not None:
        weights = weights.to(dtype)

    def bags(index: Tensor, values: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(index, values, starts, mode=mode, per_sample_weights=weights)

    if x.dtype == dtype:
        return bags(rows, x)
    index = torch.arange(rows.shape[0], device=x.device)
    columns = max(64, _COPY_BYTES // (4 * max(1, rows.shape[0])))
    parts = [bags(index, part[rows].to(dtype)) for part in x.split(columns, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True)
class VideoTokens:
    """One video's tokens as the decision sees them.

    features: [T, N, D], any float dtype; N tokens per frame in raster order.
    scores: [T, N] float32, attention each token received in the vision tower; None where a method needs none.
    """

    features: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """The budget for one video of `total` = T N tokens.

    tokens: K, the count to keep.
    share: the same as a share of the total (the authors' rule works from the share).
    exact: K exactly, or the authors' rounding of the share.
    """

    tokens: int
    share: float
    exact: bool = True


@dataclass(frozen=True)
class MergeRecord:
    """Which original token went where, and with what weight.

    Original tokens are numbered in raster order, frame by frame: token (t, n) is t N + n. The K kept tokens are
    numbered in the order in which they enter the LLM.

    frames, per_frame: T and N.
    assignment: [T N] int64, the kept token that holds each original token, -1 if none does.
    weight: [T N] float32 (float64 for float64 features), its weight there; the weights of one kept token sum to one.
    anchor: [K] int64, the original token in whose place (frame and position) each kept token stands.
    members: how many original tokens are held by some kept token.
    segments: first and last frame of each temporal segment.
    temporal: R, the tokens that temporal merging alone removed.
    clustered: sizes of the static sets that density-peak clustering worked on, in time order.
    raster: whether the kept tokens enter in the order of their anchors.
    """

    frames: int
    per_frame: int
    assignment: Tensor
    weight: Tensor
    anchor: Tensor
    members: int
    segments: tuple[tuple[int, int], ...] = ()
    temporal: int = 0
    clustered: tuple[int, ...] = ()
    raster: bool = True

    @property
    def kept(self) -> int:
        """K, the number of kept tokens."""
        return self.anchor.shape[0]

    @property
    def total(self) -> int:
        """T N, the number of original tokens."""
        return self.frames * self.per_frame

    @cached_property
    def slots(self) -> Tensor:
        """[K] int64, ascending: the placeholders the kept tokens take, in sequence order.

        Equal to `anchor` in raster order. In segment order the k-th token of the sequence takes the k-th place.
        """
        return self.anchor.sort().values

    @cached_property
    def sizes(self) -> Tensor:
        """[K] int64: how many original tokens each kept token holds."""
        held = self._grouped[0]
        counts = torch.zeros(self.kept, dtype=torch.long, device=self.anchor.device)
        return counts.scatter_add_(0, self.assignment[held], torch.ones_like(held))

    @cached_property
    def _grouped(self) -> tuple[Tensor, Tensor]:
        # held tokens grouped by the kept token that holds them; the stable sort keeps time order inside a group
        order = self.assignment.argsort(stable=True)
        held = order[self.total - self.members :]
        return held, self.weight[held]

    def merge(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Merge any per-token tensor exactly as the tokens were merged.

        Args:
            x: [T N, ...] float, one row per original token (or any rows, if `rows` names them).
            rows: [T N] int64, the row of `x` that belongs to each original token; [R, T N] for R merges at once.

        Returns:
            [K, ...] in x's dtype, [R, K, ...] for R merges; sums are formed in float32 (float64 for float64).
            Deterministic: the rows of a group are added in time order.
        """
        held, weight = self._grouped
        source = held if rows is None else rows[..., held]
        starts = self.sizes.cumsum(0) - self.sizes
        many = source.shape[:-1]
        if many:
            first = torch.arange(many[0], device=starts.device)[:, None] * self.members
            starts, weight = (starts + first).flatten(), weight.repeat(many[0])
        merged = sum_of_rows(x.reshape(x.shape[0], -1), source.flatten(), starts, weights=weight)
        return merged.to(x.dtype).reshape(*many, self.kept, *x.shape[1:])

    def kept_per_frame(self) -> list[int]:
        """Kept tokens that stand in each frame, T numbers that sum to K."""
        frame = self.anchor // self.per_frame
        return torch.bincount(frame, minlength=self.frames).tolist()

    def by_frame(self) -> MergeRecord:
        """The same choices in an order in which every kept token stands among those of its anchor's frame.

        For prompts with text between the frames, where a token must not leave its timestamp.
        """
        if self.raster:
            return self
        order = (self.anchor // self.per_frame).argsort(stable=True)
        place = torch.cat([order.argsort(), order.new_full((1,), -1)])  # the last entry is found by -1
        return replace(self, anchor=self.anchor[order], assignment=place[self.assignment])

    def to(self, device: torch.device | str) -> MergeRecord:
        """The same record on another device."""
        if self.anchor.device == torch.device(device):
            return self
        return replace(
            self,
            assignment=self.assignment.to(device),
            weight=self.weight.to(device),
            anchor=self.anchor.to(device),
        )


def keep_everything(frames: int, per_frame: int, device: torch.device | str = "cpu") -> MergeRecord:
    """The record that changes nothing: every token kept, by itself, in raster order."""
    total = frames * per_frame
    index = torch.arange(total, device=device)
    return MergeRecord(frames, per_frame, index, torch.ones(total, device=device), index, total)
