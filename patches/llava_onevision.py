"""LLaVA-OneVision: SigLIP, a projector on every patch, bilinear pooling (27 x 27 to 14 x 14), one newline token."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from holimerge.encoding import Encoded, Grid, Level
from holimerge.tokens import MergeRecord, VideoTokens

from ._frames import spans
from ._llava import LlavaFamily


def bilinear_taps(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each pooled token comes from when a square map of `size` is halved bilinearly (no aligned corners).

    Returns:
        index [M * M, 4] int64 into the size * size patches and weight [M * M, 4] float32, with M = ceil(size / 2).
    """
    pooled = math.ceil(size / 2)
    at = ((torch.arange(pooled, device=device) + 0.5) * (size / pooled) - 0.5).clamp_min(0)
    low = at.floor().long()
    high = (low + 1).clamp_max(size - 1)
    fraction = at - low
    line = torch.stack([low, high], 1)  # [M, 2]
    share = torch.stack([1 - fraction, fraction], 1)
    index = line[:, None, :, None] * size + line[None, :, None, :]
    weight = share[:, None, :, None] * share[None, :, None, :]
    return index.reshape(-1, 4), weight.reshape(-1, 4)


# Values of a float32 copy held at once: on a CPU they should stay in its cache, on a GPU launches should stay few.
_POOLED_AT_ONCE = {"cpu": 2**20, "cuda": 2**27}


def pool(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What the stock pooling gives, but for rounding: several times faster on a CPU, hundreds of times on a GPU, whose
    bilinear kernel goes through frames and channels one after another.

    Args:
        x: [T, P, C], patches.
        index, weight: [N, 4] int64 and float32, the patches that each token is pooled of.

    Returns:
        [T, N, C] in x's dtype; sums are formed in float32 (float64 for float64).
    """
    step = max(1, _POOLED_AT_ONCE.get(x.device.type, 2**27) // (len(index) * x.shape[-1]))
    parts = []
    for frames in x.split(step):
        together = frames[:, index[:, 0]] * weight[:, 0, None]
        for corner in range(1, 4):  # one after the other: four of them would be several times the features
            together += frames[:, index[:, corner]] * weight[:, corner, None]
        parts.append(together.to(x.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class Pooled(Level):
    """Patches [T, P, C], pooled after the projector. taps: as in `merge_then_project`."""

    taps: tuple[Tensor, Tensor]

    def merged(self, record: MergeRecord) -> Tensor:
        return merge_then_project(self.tokens, record, self.project, *self.taps)


@cache
def _appends_newline() -> bool:
    return "mm_encoder_outputs" in inspect.signature(LlavaOnevisionModel.forward).parameters


class LlavaOnevision(LlavaFamily):
    @property
    def appends_newline(self) -> bool:
        """Whether `get_video_features` ends each video with its newline (from transformers 5.18 on)."""
        return _appends_newline()

    def side(self, core: Any) -> int:
        """Tokens per side of a frame."""
        return math.ceil(self.patches(core) / 2)

    def taps(self, core: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """The patches [N, 4] that a pooled token is made of, and their weights [N, 4]."""
        return bilinear_taps(self.patches(core), device)

    def layout(self, core: Any, grid: Grid) -> Tensor:
        return torch.cat([torch.arange(grid.total, device="cpu"), torch.tensor([-1], device="cpu")])

    def separator(self, core: Any) -> Tensor | None:
        return core.image_newline if self.appends_newline else None

    def pooled_scores(self, core: Any, arguments: dict[str, Any], received: Tensor) -> Tensor:
        return core.apply_pooling(self.without_class(core, arguments, received)[..., None])[..., 0]

    def encoded(self, core: Any, hidden: Tensor, grids: list[Grid], scores: Tensor | None, at: str) -> list[Encoded]:
        project: Callable[[Tensor], Tensor] = core.multi_modal_projector
        late, taps = at == "projector_output", self.taps(core, hidden.device)
        weak = weakref.ref(core)  # what is encoded ahead of its prompt keeps no model alive

        @cache
        def after() -> Tensor:
            # the same operators on the same tensors as the stock code, for all videos at once
            pooled: Tensor = weak().apply_pooling(project(hidden))  # type: ignore[union-attr]
            return pooled

        shown = pool(project(hidden) if late else hidden.detach(), *taps)

        def one(span: slice) -> Encoded:
            tokens = VideoTokens(shown[span].detach(), None if scores is None else scores[span].detach())

            def whole() -> Tensor:
                return after()[span].flatten(0, 1)

            if late:
                return Encoded(tokens, [Level(shown[span].flatten(0, 1), lambda x: x, whole)])
            return Encoded(tokens, [Pooled(hidden[span], project, whole, taps)])

        return [one(span) for span in spans(grids)]


def merge_then_project(
    patches: Tensor, record: MergeRecord, project: Callable[[Tensor], Tensor], index: Tensor, weight: Tensor
) -> Tensor:
    """Merge a video's patches, project only the merged ones, pool them with the anchors' weights.

    A pooled token is a weighted sum of four projected patches. The tokens that one kept token holds have their patches
    merged corner by corner with the record's weights; the four merged patches are projected and summed with the
    weights of the anchor. For a token that holds only itself this is what the stock code computes.

    Args:
        patches: [T, P, C], the projector's input.
        record: of T frames of N tokens.
        project: the projector.
        index, weight: [N, 4] int64 and float32, the patches that each token is pooled of.

    Returns:
        [K, D].
    """
    frames, count, width = patches.shape
    frame = torch.arange(frames, device=patches.device)[:, None] * count
    flat = patches.reshape(frames * count, width)
    corners = record.merge(flat, torch.stack([(frame + index[:, c]).flatten() for c in range(4)]))
    projected = project(corners.flatten(0, 1)[None])[0].unflatten(0, (4, record.kept))
    share = weight[record.anchor % record.per_frame].to(torch.promote_types(projected.dtype, torch.float32))
    return torch.einsum("ckd,kc->kd", projected.to(share.dtype), share).to(projected.dtype)


FAMILY = LlavaOnevision()
