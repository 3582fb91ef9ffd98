"""The maths of reductions inside the vision tower against slow versions of the formulas."""

from __future__ import annotations

import numpy as np
import oracle_encoder as oracle
import pytest
import torch

from holimerge.encoder.frames import frame_similarity, plan_frames
from holimerge.encoder.gate import encoded_frames, gate_sources, place_sources, row_sources
from holimerge.encoder.patch_run import _packed
from holimerge.encoder.tokens import match_tokens


def drifting(seed: int, frames: int = 14, tokens: int = 5, width: int = 6) -> torch.Tensor:
    """[T, N, C]: scenes that drift, so that neighbouring frames are alike by different amounts."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(frames, tokens, width, generator=g) * torch.rand(frames, 1, 1, generator=g)
    scene = torch.randn(3, tokens, width, generator=g)[torch.arange(frames) * 3 // max(frames, 1)]
    return scene * 2 + steps.cumsum(0) * 0.5


@pytest.mark.parametrize("merge", [None, -1.0, 0.5])
@pytest.mark.parametrize("longest", [1, 3, 8])
def test_frames_merge_as_the_formulas_say(longest: int, merge: float | None) -> None:
    merged_any = 0
    for seed in range(12):
        x = drifting(seed, frames=seed + 1 if seed < 5 else 14)
        similarity = frame_similarity(x, max(1, min(longest, len(x)) - 1)).tolist()
        plan = plan_frames(similarity, 0.5, longest, merge)
        expected = oracle.merged_frames(x.double().numpy(), 0.5, longest, merge)
        owner = [place for place, (members, _) in enumerate(expected) for _ in members]
        assert plan.owner == owner
        torch.testing.assert_close(
            plan.merged(x), torch.from_numpy(np.stack([y for _, y in expected])).float(), atol=1e-5, rtol=1e-5
        )
        assert plan.nothing == (len(expected) == len(x))
        merged_any += len(x) - len(expected)
    assert (merged_any > 10) == (longest > 3)


def test_a_kept_frame_keeps_its_bits_and_a_still_video_is_merged() -> None:
    still = torch.randn(1, 4, 6).expand(8, -1, -1).bfloat16()
    plan = plan_frames(frame_similarity(still, 7).tolist(), 0.9, 8, None)
    assert plan.pairs[0] == (0, 0, 1.0)
    assert len(plan.pairs) == 5  # the ends, and six frames between them in three pairs
    assert torch.equal(plan.merged(still), still[:5])
    x = drifting(3).bfloat16()
    plan = plan_frames(frame_similarity(x, 7).tolist(), 0.3, 8, -1.0)
    kept = [place for place, (i, j, _) in enumerate(plan.pairs) if i == j]
    assert 0 < len(kept) < len(plan.pairs)
    for place in kept:
        assert torch.equal(plan.merged(x)[place], x[plan.pairs[place][0]])


@pytest.mark.parametrize(
    ("tokens", "r", "fixed"), [(9, 3, 1), (8, 4, 0), (8, 99, 0), (12, 2, 0), (2, 1, 0), (11, 5, 1)]
)
def test_tokens_merge_as_the_formulas_say(tokens: int, r: int, fixed: int) -> None:
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        metric, x = torch.randn(3, tokens, 4, generator=g), torch.randn(3, tokens, 5, generator=g)
        size = torch.randint(1, 6, (3, tokens), generator=g).float()
        merge = match_tokens(metric, r, fixed)
        y, sizes = merge.merged(x, size), merge.sizes(size)
        for f in range(3):
            groups = oracle.merged_tokens(metric[f].double().numpy(), r, fixed)
            assert merge.kept[f].tolist() == [group[0] for group in groups]
            for place, group in enumerate(groups):
                assert merge.owner[f][group].tolist() == [place] * len(group)
                assert sizes[f, place] == size[f][group].sum()
                mean = (x[f][group].double() * size[f][group, None]).sum(0) / size[f][group].sum()
                torch.testing.assert_close(y[f, place], mean.float())
        assert torch.equal(merge.spread(y).gather(1, merge.kept[..., None].expand_as(y)), y)
        assert sizes.sum() == size.sum()  # nothing is lost


def test_equal_tokens_merge_at_the_lower_index_and_nothing_merges_with_r_zero() -> None:
    merge = match_tokens(torch.ones(1, 6, 3), 2)
    assert merge.kept.tolist() == [[1, 3, 4, 5]]  # 0 and 2 go to 1
    assert merge.owner.tolist() == [[0, 0, 0, 1, 2, 3]]
    nothing = match_tokens(torch.randn(2, 7, 3), 0)
    assert nothing.nothing
    x = torch.randn(2, 7, 4).bfloat16()
    assert torch.equal(nothing.merged(x, torch.ones(2, 7)), x)
    assert match_tokens(torch.randn(2, 1, 3), 5).nothing


def test_frames_are_gated_as_the_rule_says() -> None:
    kinds = set()
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        # patches change by turns, by steps that add up
        steps = torch.randn(9, 6, 4, generator=g) * (torch.rand(9, 6, 1, generator=g) < 0.3)
        x = steps.cumsum(0)
        for threshold, changed in [(0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.5, 0.2)]:
            found = gate_sources(x, lambda frame: frame, threshold, changed).tolist()
            assert found == oracle.sources(x.double().numpy(), threshold, changed)
            kinds.add(len(set(found)))
    assert len(kinds) > 4


def test_slow_drift_is_measured_from_the_last_encoded_frame_and_nan_is_a_change() -> None:
    x = torch.arange(6.0)[:, None, None].expand(6, 2, 3)  # each step is under the threshold, two together are not
    assert gate_sources(x, lambda frame: frame, 1.5, 0.0).tolist() == [0, 0, 2, 2, 4, 4]
    still = torch.zeros(3, 2, 3)
    assert gate_sources(still, lambda frame: frame, 0.0, 0.0).tolist() == [0, 0, 0]
    still[1, 0, 0] = torch.nan
    assert gate_sources(still, lambda frame: frame, 0.0, 0.0).tolist() == [0, 1, 2]


def test_places_are_gated_as_the_rule_says() -> None:
    kinds = set()
    for seed in range(24):
        g = torch.Generator().manual_seed(seed)
        steps = torch.randn(9, 6, 4, generator=g) * (torch.rand(9, 6, 1, generator=g) < 0.3)
        x = steps.cumsum(0)
        if seed % 3 == 0:
            x[torch.rand(x.shape, generator=g) < 0.02] = torch.nan
        for threshold, changed in [(0.0, 0.0), (0.3, 0.5), (0.0, 0.5), (0.5, 0.9), (1.5, 0.2)]:
            found = place_sources(x, lambda frame: frame, threshold, changed)
            assert found.tolist() == oracle.place_sources(x.double().numpy(), threshold, changed)
            kinds.add(len(found.unique()))
            frames, left = encoded_frames(found)
            encoded = [t for t in range(9) if t in found[t]]
            assert frames == [max(e for e in encoded if e <= t) for t in range(9)]
            assert [[encoded[s] for s in places] for places in left.tolist()] == found[encoded].tolist()
    assert len(kinds) > 5


def test_rows_of_a_place_go_together_in_the_towers_own_order() -> None:
    sources = torch.tensor([[0, 0, 0], [0, 1, 0], [2, 1, 0]])
    assert row_sources(sources).tolist() == [0, 1, 2, 0, 4, 2, 6, 4, 2]
    assert row_sources(sources, 2).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 8, 9, 4, 5, 12, 13, 8, 9, 4, 5]
    assert row_sources(sources, fixed=1).tolist() == [0, 1, 2, 3, 4, 1, 6, 3, 8, 9, 6, 3]
    assert row_sources(sources, order=torch.tensor([2, 0, 1])).tolist() == [0, 1, 2, 0, 1, 5, 0, 7, 5]


def test_what_is_left_of_frames_shares_lots_and_every_row_is_there_once() -> None:
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, 10, (7,), generator=g).tolist()
        own = torch.stack([torch.randperm(9, generator=g) < n for n in counts]).flatten()
        rows = own.nonzero().flatten()
        place, filled, groups = _packed(counts, rows, 9)
        assert filled[place].tolist() == rows.tolist()
        assert groups.flatten()[place].tolist() == (rows // 9).tolist()
        assert (groups >= 0).sum() == len(rows) == len(place.unique())
        assert len(groups) <= max(sum(n > 4 for n in counts), -(-sum(counts) * 2 // 9))
