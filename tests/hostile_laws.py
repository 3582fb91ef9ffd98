"""What must hold for a hostile case: the laws of a right result."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from hostile import Case, inputs, padded, video_columns, videos_of
from hostile_calls import Outcome, call, close, finite, harmless, judge, model_of, run, same
from patching import answer_of, handle_of, recomputed
from torch import Tensor
from toys import TOYS

import holimerge
from holimerge.cost import inner_kept, llm_prefill_exact
from holimerge.placement import Placement
from holimerge.report import Report, Selection
from holimerge.shapes import TextShape, text_shape
from holimerge.tokens import MergeRecord


@contextmanager
def left_as_it_was(family: str, case: Case) -> Iterator[Any]:
    """(b): after the block the model looks and computes as before it, whatever happened inside."""
    model, before, said = model_of(family, case.dtype, case.attn)
    try:
        yield model
    finally:
        if left := "_holimerge_handle" in model.__dict__:  # the cases to come need a stock model
            holimerge.unpatch_model(model)
    assert not left, "the model stayed patched"
    assert fingerprint(model) == before
    assert same(harmless(model, family, case.dtype), said)


def check(family: str, case: Case) -> str:
    """All laws for one case; returns what came of it, in words."""
    x = inputs(family, case)
    with left_as_it_was(family, case) as model:
        stock = call(model, family, x, case)
        keep_all(model, family, case, x, stock)
        if refuses(model, case):
            return "the family refuses the configuration"
        with holimerge.merging(model, case.config):
            before = harmless(model, family, case.dtype)
            ours = call(model, family, x, case)
            report, selection = last(model) if ours.error is None else (None, None)
            # whatever happened, the next call is what it would have been
            assert same(harmless(model, family, case.dtype), before)
            if report is not None:
                assert stock.error is None, f"a result where the stock model raises {stock.error!r}"
                keeps = right(model, family, case, x, stock, ours, report, selection)
        if ours.error is None:
            if keeps is not None:
                output(model, family, case, ours, keeps)
            return "right"
        with pytest.raises(type(ours.error)), holimerge.merging(model, case.config):  # (f): it leaves the block
            run(model, x, case)
        return judge(ours.error, model, case, x, stock)


def refuses(model: Any, case: Case) -> bool:
    """Whether the family refuses the configuration, by the name of a key of it."""
    try:
        holimerge.patch_model(model, case.config)
    except holimerge.ConfigError as error:
        if re.match(r"[a-z_]+(\.[a-z_]+)?: ", str(error)) is None:
            raise
        return True
    holimerge.unpatch_model(model)
    return False


def last(model: Any) -> tuple[Report, Selection | None]:
    """What the last call did."""
    report = holimerge.last_report(model)
    return report, handle_of(model).selection if report.videos else None


def keep_all(model: Any, family: str, case: Case, x: dict[str, Tensor], stock: Outcome) -> None:
    """(a)"""
    with holimerge.merging(model, {"method": "keep_all", **TOYS[family].extra}):
        kept = call(model, family, x, case)
    if kept.error is not None:
        judge(kept.error, model, case, x, stock)
    else:
        assert stock.error is None, f"a result where the stock model raises {stock.error!r}"
        assert same(kept, stock)


def right(
    model: Any,
    family: str,
    case: Case,
    x: dict[str, Tensor],
    stock: Outcome,
    ours: Outcome,
    report: Report,
    selection: Selection | None,
) -> list[Tensor] | None:
    """The laws of a result, inside the patch; returns each row's kept columns where `output` can check the rest."""
    handle = handle_of(model)
    json.loads(report.to_json())
    assert ours.graded.keys() == stock.graded.keys()
    assert all(ours.graded[name] or not stock.graded[name] for name in ours.graded)
    expected = sum(videos_of(family, parts) for parts in case.rows)
    if not report.videos:
        assert case.fault is not None or expected == 0
        assert same(ours, stock)
        return None
    assert handle.config.outer is None or not case.poisoned, "a video that is not finite was reduced"
    if not finite(stock):
        return None
    assert all(step.isfinite().all() for step in ours.logits)
    assert selection is not None
    counts(family, case, x, handle.config, report)
    if case.fault is not None:
        shortened = handle.inner is not None or any(video.entering < video.features for video in report.videos)
        assert case.fault != "moved" or not shortened, "a video that stands in two rows was reduced"
        return None
    assert len(report.videos) == expected
    row_counts(model, family, case, x, handle.config, report)
    keeps = splice(handle, family, case, x, stock, ours, [video.placement for video in report.videos])
    if handle.config.budget is not None and handle.config.budget.flops is not None:
        # longer or shorter prompts have other budgets; the choices are replayed all the same
        budget = {"retain": 1.0, "exact": handle.config.budget.exact}
        holimerge.patch_model(model, {**case.config, "budget": budget})
    if case.call == "generate" and not (case.side == "right" and padded(family, case)):
        masked = inputs(family, replace(case, mask="int"))
        fresh = recomputed(model, family, masked, answer_of(ours.output, x), selection)
        # Where a prompt ends in a video, stock generation goes on from its last position on every axis, a recomputation
        # from the largest: the answers differ unpatched too.
        last = report.videos[-1]  # a whole video keeps its positions
        as_stock = TOYS[family].mrope and (not handle.contiguous or last.entering == last.features)
        alike = 1 if case.bare and as_stock else len(fresh)
        asked = real_columns(family, case, x).any(1)  # a row of padding alone has no right answer
        for mine, theirs in list(zip(ours.logits, fresh, strict=True))[:alike]:  # (c)
            close(mine[asked], theirs[asked], case)
    if len(case.rows) > 1:
        rows_alone(model, family, case, x, ours, selection)
    return keeps if handle.inner is None and case.call == "forward" else None


def counts(family: str, case: Case, x: dict[str, Tensor], config: Any, report: Report) -> None:
    """(e): what was promised for each video is what enters, and the report adds up."""
    placeholders = int(video_columns(family, case, x["input_ids"]).sum())
    if case.fault is None:
        assert sum(v.placement.placeholders for v in report.videos) == placeholders
    for video in report.videos:
        record_laws(video.record, config)
        assert video.entering == sum(video.kept_per_frame)
        budget, n = config.budget, video.features
        if budget is None:
            assert video.entering == n
        elif budget.exact and budget.tokens is not None:
            assert video.entering == min(budget.tokens, n)
        elif budget.exact and budget.retain is not None:
            assert video.entering == max(1, math.floor(Fraction(str(budget.retain)) * n + Fraction(1, 2)))
        else:
            assert 1 <= video.entering <= n


def row_counts(model: Any, family: str, case: Case, x: dict[str, Tensor], config: Any, report: Report) -> None:
    """(e): what is promised for a row, which is its inner merge and its FLOPs."""
    videos = iter(report.videos)
    inner = handle_of(model).inner
    layer = None if inner is None else inner.layer
    for row, parts in enumerate(case.rows):
        mine = [next(videos) for _ in range(videos_of(family, parts))]
        entering, features = sum(v.entering for v in mine), sum(v.features for v in mine)
        if layer is None:
            assert all(v.after_inner is None for v in mine)
        else:
            assert sum(v.after_inner or 0 for v in mine) == inner_kept(entering, config.inner.retain) * bool(mine)
        if mine and config.budget is not None and config.budget.flops is not None and config.budget.exact:
            if "attention_mask" not in x:
                continue
            text, words = text_shape(model.config), int(x["attention_mask"][row].sum()) - features

            def cost(kept: int, text: TextShape = text, words: int = words) -> int:
                after = None if layer is None else words + inner_kept(kept, config.inner.retain)
                return llm_prefill_exact(text, words + kept, after, layer)

            limit = Fraction(str(config.budget.flops)) * llm_prefill_exact(text, words + features)
            assert cost(entering) <= limit
            assert entering == features or cost(entering + 1) > limit
    assert next(videos, None) is None


def record_laws(record: MergeRecord, config: Any) -> None:
    """Every kept token stands for its members with weights that sum to one; segments follow one another."""
    held = record.assignment >= 0
    assert record.assignment.shape == record.weight.shape == (record.total,)
    assert int(held.sum()) == record.members == int(record.sizes.sum())
    assert (record.sizes >= 1).all()
    sums = torch.zeros(record.kept, dtype=torch.float64)  # of a thousand members without an error of its own
    sums.index_add_(0, record.assignment[held], record.weight[held].double())
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    assert (record.weight >= 0).all()
    assert (record.weight[~held] == 0).all()
    assert torch.equal(record.assignment[record.anchor], torch.arange(record.kept))
    if config.outer is None or config.outer.order == "raster":
        assert torch.equal(record.anchor, record.slots)
    longest = getattr(config.outer, "max_segment", None) or record.frames
    ends = [-1, *(last for _, last in record.segments)]
    for (first, last), before in zip(record.segments, ends, strict=False):
        assert first == before + 1
        assert first <= last < first + longest
    assert ends[-1] in (record.frames - 1, -1)


def real_columns(family: str, case: Case, x: dict[str, Tensor]) -> Tensor:
    """[B, L] bool: what the model takes for tokens. Without a mask `generate` works it out, a forward takes all."""
    if "attention_mask" in x:
        return x["attention_mask"].bool()
    if case.call == "forward":
        return torch.ones_like(x["input_ids"]).bool()
    return inputs(family, replace(case, mask="bool"))["attention_mask"]


def splice(
    handle: Any,
    family: str,
    case: Case,
    x: dict[str, Tensor],
    stock: Outcome,
    ours: Outcome,
    placements: list[Placement],
) -> list[Tensor] | None:
    """What enters the language model: stock features merged as the record says, other tokens untouched, all at their
    positions. Returns the columns of each row that enter, None where all do."""
    given, got = stock.entered["inputs_embeds"], ours.entered["inputs_embeds"]
    eps = torch.finfo(given.dtype).eps
    rounding = {"atol": 64 * eps * max(1.0, float(given.detach().abs().max())), "rtol": 8 * eps}
    remaining = iter(placements)
    if all(placement.record.kept == placement.record.total for placement in placements):
        torch.testing.assert_close(got, given, **rounding)
        return None
    length = given.shape[1]
    positions, old = (_axes(entered.get("position_ids")) for entered in (ours.entered, stock.entered))
    old = torch.arange(length)[None] if old is None else old
    old = old.expand(*old.shape[:-2], len(case.rows), length)
    valid, of_video = real_columns(family, case, x), video_columns(family, case, x["input_ids"])
    values, checked, columns, places = [], [], [], []
    for row, parts in enumerate(case.rows):
        own = of_video[row].nonzero().flatten()
        value, exact, keep = given[row].float(), torch.ones(length, dtype=torch.bool), valid[row].clone()
        place = torch.arange(length)  # the column whose position an entry takes
        for placement in (next(remaining) for _ in range(videos_of(family, parts))):
            whole, own = own[: placement.placeholders], own[placement.placeholders :]
            record, mine = placement.record, token_columns(placement, whole)
            held, slots = record.assignment >= 0, mine[record.slots]
            share = record.weight[held, None].float() * value[mine[held]]
            merged = torch.zeros(record.kept, value.shape[1]).index_add_(0, record.assignment[held], share)
            keep[whole] = False
            value, keep[slots], place[slots] = value.index_copy(0, slots, merged), True, mine[record.anchor]
            keep[separators_that_stay(placement, whole, keep)] = True
            if handle.config.outer.at == "projector_input":  # a projector does not commute with merging
                exact[slots] = record.sizes == 1
        columns.append(keep)
        values.append(value[keep])
        checked.append(exact[keep])
        gone = (valid[row] & ~keep).long().cumsum(0)
        places.append(
            old[..., row, :][..., place[keep]] if not handle.contiguous else (old[..., row, :] - gone)[..., keep]
        )
    width = max(map(len, values))
    assert got.shape[1] == width
    mask = ours.entered.get("attention_mask")
    assert mask is None or mask[:, -width:].sum(1).tolist() == [len(value) for value in values]
    for row, (value, exact) in enumerate(zip(values, checked, strict=True)):
        entered = got[row, width - len(value) :]
        assert entered.isfinite().all()
        torch.testing.assert_close(entered[exact].float(), value[exact], **rounding)
        if old.ndim == 2 or not handle.contiguous:
            assert torch.equal(positions[..., row, width - len(value) :], places[row])
        assert mask is not None or len(value) == width
    return columns


def token_columns(placement: Placement, whole: Tensor) -> Tensor:
    """[T N]: the column of each of a video's tokens. whole: [M], the columns of its placeholders."""
    if placement.layout is None:
        return whole
    tokens = placement.layout >= 0
    return torch.empty(placement.record.total, dtype=torch.long).index_copy(0, placement.layout[tokens], whole[tokens])


def separators_that_stay(placement: Placement, whole: Tensor, keep: Tensor) -> list[int]:
    """The columns of those separators that end at least one token that stays, since the separator before."""
    staying, found = False, []
    for column, token in zip(
        whole.tolist(), [] if placement.layout is None else placement.layout.tolist(), strict=False
    ):
        if token >= 0:
            staying |= bool(keep[column])
        elif staying:
            found.append(column)
            staying = False
    return found


def _axes(positions: Tensor | None) -> Tensor | None:
    """Without the text row of four, which only tells packed sequences apart."""
    return positions[-3:] if positions is not None and positions.ndim == 3 else positions


def output(model: Any, family: str, case: Case, ours: Outcome, keeps: list[Tensor]) -> None:
    """What comes out, without an inner merge: the stock language model's answer to what entered, at its columns."""
    entered = {k: v for k, v in ours.entered.items() if k not in ("past_key_values", "use_cache")}
    if entered.get("attention_mask") is None:  # without a cache, positions with gaps are taken for packed sequences
        entered["attention_mask"] = torch.ones(entered["inputs_embeds"].shape[:2], dtype=torch.long)
    with torch.no_grad():
        hidden = TOYS[family].language_model(model)(**entered, use_cache=False).last_hidden_state
        expected = model.get_output_embeddings()(hidden)
    for row, keep in enumerate(keeps):
        close(ours.logits[0][row, keep], expected[row, expected.shape[1] - int(keep.sum()) :], case)


def rows_alone(model: Any, family: str, case: Case, x: dict[str, Tensor], ours: Outcome, selection: Selection) -> None:
    """(d)"""
    video, valid = 0, real_columns(family, case, x)
    for row, parts in enumerate(case.rows):
        count = videos_of(family, parts)
        mine = selection.of(list(range(video, video + count)), [row])
        video += count
        alone_case = replace(case, rows=(parts,), side="left", grad=False)
        single = inputs(family, alone_case)
        if int(valid[row].sum()) != single["input_ids"].shape[1] or not parts:
            continue  # padding taken for text, or nothing but padding
        with handle_of(model).replaying(mine):
            alone = call(model, family, single, alone_case)
        assert alone.error is None, alone.error
        if case.call == "generate" and case.side == "left":
            for a, b in zip(ours.logits, alone.logits, strict=True):
                close(a[row], b[0], case)
                if a[row].argmax() != b[0].argmax():  # a tie but for rounding: from here on the answers differ
                    break
        elif case.call == "forward":
            close(ours.logits[0][row, valid[row]], alone.logits[0][0], case)
