"""What tests of a tower's spans share: models and prompts, and what a tower asks of attention and of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import FAMILIES, build, make_video

from holimerge.patches._grids import GridFamily
from holimerge.registry import family_module

GRIDS = [name for name in FAMILIES if isinstance(family_module(name).FAMILY, GridFamily)]
NUMERICS = [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("eager", torch.float32), ("eager", torch.bfloat16)]
ENCODERS: dict[str, dict[str, Any]] = {
    "frames": {"frames": {"layers": [1], "similarity": 0.1, "longest": 6, "merge": -1.0}},
    "tokens": {"tokens": {"r": 2}},
    "gate": {"gate": {"threshold": 0.02, "changed": 0.6}},
}
CPU = torch.device("cpu")


def config(**changes: Any) -> dict[str, Any]:
    return {"base": "holimerge-25", "inner": None, "tower_attention": "batched", **changes}


def attentions(model: Any) -> list[Any]:
    family = family_module(model.config.model_type).FAMILY
    return list(family.encoder_tower(model.model, {}, []).attentions)


def two_videos(family: str) -> dict[str, Tensor]:
    """Long enough for frames to merge."""
    wide = make_video(family, frames=20, seed=1, side=(16, 56))
    return build(family, [[5, make_video(family, frames=16), 6, wide, 7]])


def odd(family: str, **kwargs: Any) -> dict[str, Tensor]:
    """Two videos of unequal sizes, whose frames are no multiple of a window."""
    row = [5, make_video(family, seed=4, side=(40, 56), frames=6), 7, make_video(family, seed=5), 8]
    return build(family, [row], **kwargs)


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a.levels, b.levels, strict=True):
            torch.testing.assert_close(mine.tokens, other.tokens, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(a.tokens.scores, b.tokens.scores, atol=tolerance, rtol=0)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, model: Any) -> Iterator[list[list[tuple[int, int]]]]:
    """(spans, rows) of every call of sdpa, for each attention of the tower."""
    calls: list[list[tuple[int, int]]] = []
    real = torch.nn.functional.scaled_dot_product_attention
    inside: list[bool] = []

    def count(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if inside:
            calls[-1].append((query.shape[0], query.shape[2]))
        return real(query, *args, **kwargs)

    def enter(*_: Any) -> None:
        calls.append([])
        inside.append(True)

    hooks = [layer.register_forward_pre_hook(enter) for layer in attentions(model)]
    hooks += [layer.register_forward_hook(lambda *_: inside.clear()) for layer in attentions(model)]
    with monkeypatch.context() as m:
        m.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
        yield calls
    for hook in hooks:
        hook.remove()


def spans_by_rows(calls: list[tuple[int, int]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for spans, rows in calls:
        found[rows] = found.get(rows, 0) + spans
    return found


@contextmanager
def reads_of_marks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lengths of the int32 vectors (marks of spans, and their differences) that the host asked for, entry by entry."""
    seen: list[int] = []
    tolist, item = torch.Tensor.tolist, torch.Tensor.item

    def noting(real: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def read(x: Tensor) -> Any:
            if x.dtype == torch.int32:
                seen.append(x.numel())
            return real(x)

        return read

    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "tolist", noting(tolist))
        m.setattr(torch.Tensor, "item", noting(item))
        yield seen
