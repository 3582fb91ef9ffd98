"""Windows and frames of a tower that attend in one call for each length: the same as one call each, fewer calls."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from attending import (
    CPU,
    ENCODERS,
    GRIDS,
    NUMERICS,
    assert_same,
    attentions,
    counted,
    odd,
    reads_of_marks,
    spans_by_rows,
    two_videos,
)
from patching import batch_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from towers import encoded
from toys import build, make_model

from holimerge import attention
from holimerge import spans as spans_module
from holimerge.encoder.tokens import match_tokens
from holimerge.registry import family_module
from holimerge.spans import Spans, by_length, spans_left

# ------------------------------------------------------------------------------------------------ the maths


def one_by_one(lengths: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The oracle: [S, heads, d], every row of every span and head by itself."""
    result = torch.empty_like(v)
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        for row in range(start, stop):
            for head in range(q.shape[1]):
                weights = torch.stack([(q[row, head] * k[other, head]).sum() for other in range(start, stop)]).exp()
                result[row, head] = (weights[:, None] * v[start:stop, head]).sum(0) / weights.sum()
    return result


def drawn_lengths(rng: random.Random) -> list[int]:
    few = [rng.randint(0, 7) for _ in range(rng.randint(1, 3))]
    return [rng.choice(few) for _ in range(rng.randint(1, 12))] + [rng.randint(1, 3)]


@pytest.mark.parametrize("seed", range(40))
def test_batched_spans_attend_as_each_by_itself(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    lengths = drawn_lengths(rng)
    most = rng.choice([1, 2, 100])
    q, k, v = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64)
    calls: list[tuple[int, int]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q.shape[2], q.shape[0]))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)

    batches = by_length(lengths, CPU)
    expected = one_by_one(lengths, q, k, v)
    torch.testing.assert_close(batches.attend(attend, (q, k, v), lambda _: most), expected)
    there = {n: lengths.count(n) for n in lengths if n}
    assert {n: sum(c for length, c in calls if length == n) for n in there} == there
    assert len(calls) == sum(-(-count // most) for count in there.values())
    assert batches.longest == max(lengths)
    calls.clear()
    torch.testing.assert_close(batches.in_turn().attend(attend, (q, k, v), lambda _: most), expected)
    assert calls == [(n, 1) for n in lengths if n]


def test_spans_that_lie_by_length_are_not_moved() -> None:
    assert by_length([4, 4, 2, 2, 3], CPU).order is None
    assert by_length([4, 2, 4], CPU).order is not None


@pytest.mark.parametrize("seed", range(20))
def test_spans_of_what_is_left_are_those_that_rows_tell(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    frames, lengths, kept = [], [], []
    for _ in range(rng.randint(1, 6)):
        windows = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
        rows = sum(windows)
        left = rng.choice([0, rows, rng.randint(1, rows) if len(windows) == 1 else rows])
        start = sum(r for r, _ in frames)
        kept += sorted(rng.sample(range(start, start + rows), left))
        frames.append((rows, left))
        lengths += windows
    # the oracle: count what is left before each mark
    marks = list(accumulate(lengths, initial=0))
    left_before = sorted({sum(row < mark for row in kept) for mark in marks})
    assert spans_left(lengths, frames) == [b - a for a, b in pairwise(left_before)]


def test_marks_are_read_once_and_those_made_here_never(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or real(x))
    spans, ends = Spans(), torch.tensor([0, 4, 6, 10], dtype=torch.int32)
    assert spans.lengths(ends) == spans.lengths(ends) == [4, 2, 4]
    assert spans.batches(ends, CPU) is spans.batches(ends, CPU)
    made = spans.marked([3, 1], ends)
    assert made.dtype == ends.dtype
    assert spans.lengths(made) == [3, 1]
    assert len(reads) == 1
    assert real(made) == [0, 3, 4]


def test_marks_of_spans_that_are_expected_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = Spans([[6, 6], [4, 2, 4, 2]])
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("read"))
    assert spans.lengths(torch.empty(3, dtype=torch.int32, device="meta")) == [6, 6]
    assert spans.lengths(torch.empty(5, dtype=torch.int32, device="meta")) == [4, 2, 4, 2]


def test_copied_marks_of_shorter_spans_are_read() -> None:
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    spans = Spans([[6, 6]])
    assert spans.stock(ends) == spans.lengths(ends.clone()) == [6, 6]
    shorter = spans.marked([4, 3], ends)
    assert spans.lengths(shorter.clone()) == [4, 3]  # as accelerate copies them to a block's device
    assert spans.stock(ends.clone()) == [6, 6]


# ------------------------------------------------------------------------------------------------ real towers


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("kind", [None, "frames", "tokens", "gate"])
@pytest.mark.parametrize("mode", ["stock", "batched"])
def test_blocks_whose_marks_are_copied_give_the_same(family: str, kind: str | None, mode: str) -> None:
    model, x = make_model(family), two_videos(family)
    options = None if kind is None else ENCODERS[kind]
    expected, _ = encoded(model, x, options, attention=mode)
    for block in model.model.visual.blocks:  # as when a tower is split over several devices
        forward = block.forward

        def moved(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return forward(*args, **{**kwargs, "cu_seqlens": kwargs["cu_seqlens"].clone()})

        block.forward = moved
    ours, _ = encoded(model, x, options, attention=mode)
    assert_same(ours, expected, 0.0)


@pytest.mark.parametrize("family", GRIDS)
@pytest.mark.parametrize("kind", [None, "frames", "tokens", "patches"])
def test_what_is_expected_of_a_towers_spans_is_what_marks_them(
    monkeypatch: pytest.MonkeyPatch, family: str, kind: str | None
) -> None:
    real, seen = Spans._known, set[int]()

    def known(self: Spans, ends: torch.Tensor, expected: dict[int, list[int]]) -> list[int]:
        found = real(self, ends, expected)
        assert found == [b - a for a, b in pairwise(ends.tolist())]
        seen.add(len(found))
        return found

    monkeypatch.setattr(Spans, "_known", known)
    model, x = make_model(family), two_videos(family)
    if kind == "tokens" and family_module(family).FAMILY.no_encoder(model.model, kind):
        pytest.skip("refused: see tests/test_encoder.py")
    options = {**ENCODERS, "patches": {"gate": {"unit": "patch", "threshold": 0.05, "changed": 0.5}}}
    read: list[int] = []
    monkeypatch.setattr(spans_module, "pairwise", lambda x: read.append(1) or pairwise(x))
    for request in ({}, {"chunk": 3}):
        encoded(model, x, None if kind is None else options[kind], attention="batched", **request)
    assert seen
    if kind is None:
        assert not read  # nothing was asked of the device


@pytest.mark.parametrize("family", GRIDS)
def test_batched_towers_give_what_stock_ones_give(family: str) -> None:
    for i in range(2):  # half of the numerics each: what could differ is shared code
        attn, dtype = NUMERICS[2 * i + (GRIDS.index(family) + i) % 2]
        model = make_model(family, attn=attn, dtype=dtype)
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        for x in (odd(family, dtype=dtype), build(family, batch_rows(family)[2], dtype=dtype)):
            expected, _ = encoded(model, x, None, attention="stock")
            for chunk in (None, 1):
                ours, _ = encoded(model, x, None, attention="batched", chunk=chunk)
                assert_same(ours, expected, tolerance)


@pytest.mark.parametrize("family", GRIDS)
def test_reductions_inside_the_tower_give_the_same_batched(family: str) -> None:
    attn = "sdpa" if GRIDS.index(family) % 2 else "eager"
    model, x = make_model(family, attn=attn), odd(family)
    core = model.model
    for kind, options in ENCODERS.items():
        if family_module(family).FAMILY.no_encoder(core, kind):
            continue
        expected, report = encoded(model, x, options, attention="stock")
        ours, batched = encoded(model, x, options, attention="batched")
        assert_same(ours, expected, 5e-6)
        assert batched.to_dict() == report.to_dict()


@pytest.mark.parametrize("family", GRIDS)
def test_attention_is_called_once_for_each_length_and_marks_are_read_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make_model(family), odd(family)
    with counted(monkeypatch, model) as one_each, reads_of_marks(monkeypatch) as stock_reads:
        encoded(model, x, None, attention="stock")
    with counted(monkeypatch, model) as calls, reads_of_marks(monkeypatch) as reads:
        encoded(model, x, None, attention="batched")
    layers = len(attentions(model))
    assert len(calls) == len(one_each) == layers
    for ours, theirs in zip(calls, one_each, strict=True):
        assert spans_by_rows(ours) == spans_by_rows(theirs)
        assert len(ours) == len(spans_by_rows(theirs)) < len(theirs)
    kinds = len({tuple(ours) for ours in calls})
    assert kinds == (2 if hasattr(family_module(family).FAMILY.tower(model.model), "fullatt_block_indexes") else 1)
    assert reads == []
    assert len(stock_reads) >= 3 * layers


def test_merged_tokens_and_frames_ask_for_no_marks_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_model("qwen2_vl"), two_videos("qwen2_vl")
    for kind in ("tokens", "frames"):
        with reads_of_marks(monkeypatch) as reads, counted(monkeypatch, model) as calls:
            _, report = encoded(model, x, ENCODERS[kind], attention="batched")
        assert report.share < 1
        assert reads == []
        assert [len(ours) for ours in calls] == [2] * len(attentions(model))


class Asking(TorchDispatchMode):
    """Notes operations whose result has a size or value that only the device knows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        masks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if masks or name.startswith(("_local_scalar", "nonzero", "unique", "_unique", "masked_select")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_merging_tokens_asks_the_device_nothing() -> None:
    with Asking() as asking:
        merge = match_tokens(torch.randn(3, 9, 4), 3, 1)
    assert merge.kept.shape == (3, 6)
    assert not asking.found
    model, x = make_model("qwen2_vl"), odd("qwen2_vl")
    with Asking() as plain:
        encoded(model, x, None)
    with Asking() as asking:
        encoded(model, x, ENCODERS["tokens"])
    assert asking.found == plain.found
    with Asking() as caught:
        x["pixel_values_videos"][torch.ones(len(x["pixel_values_videos"]), dtype=torch.bool)].sum().item()
    assert caught.found == ["index", "_local_scalar_dense"]


def test_eager_attention_holds_few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = torch.nn.functional.softmax

    def softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(x.numel() * 4)
        return real(x, *args, **kwargs)

    model, x = make_model("qwen2_vl", attn="eager"), odd("qwen2_vl")
    expected, _ = encoded(model, x, None, attention="stock")
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)
    encoded(model, x, None, attention="stock")
    one, most = max(sizes), len(sizes)
    monkeypatch.setitem(attention._CHUNK_BYTES, "cpu", 2 * one)
    sizes.clear()
    ours, _ = encoded(model, x, None, attention="batched")
    assert_same(ours, expected, 2e-6)
    assert max(sizes) <= 2 * one
    assert len(sizes) <= most // 2 + 3
