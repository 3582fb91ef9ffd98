"""Budgets on real models: counts known before any feature, and FLOPs that fit."""

from __future__ import annotations

import pytest
import torch
from toys import build, make_model, make_video, prompt

import holimerge
from holimerge.cost import exact_cost, largest_budget, llm_prefill_exact
from holimerge.eval.flop_counter import count_flops
from holimerge.shapes import shape_of


def run(model, x, cfg):
    holimerge.patch_model(model, cfg)
    with torch.no_grad():
        model(**x)
    return holimerge.last_report(model)


@pytest.mark.parametrize("budget", [{"retain": 0.25}, {"tokens": 7}, {"tokens": 10**6}, {"retain": 1e-6}])
def test_the_count_is_exact_per_video(family, budget):
    model = make_model(family)
    x = build(family, [[5, make_video(family), 6], [7, make_video(family, seed=1), make_video(family, seed=2), 8]])
    for video in run(model, x, {"method": "holitom", "budget": budget}).videos:
        n = video.features
        expected = min(n, budget["tokens"]) if "tokens" in budget else min(n, max(1, int(budget["retain"] * n + 0.5)))
        assert video.entering == expected


@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("inner", [None, {"layer": 2, "retain": 0.5}])
def test_a_flops_budget_is_the_largest_that_fits(family, share, inner):
    model = make_model(family)
    text = shape_of(model.config).text
    x = prompt(family)
    report = run(model, x, {"method": "holitom", "budget": {"flops": share}, "inner": inner})
    video = report.videos[0]
    words = x["input_ids"].shape[1] - video.features
    full = llm_prefill_exact(text, words + video.features)

    def cost(k):
        return (
            llm_prefill_exact(text, words + k, words + max(1, round(k * 0.5)), 2)
            if inner
            else llm_prefill_exact(text, words + k)
        )

    assert cost(video.entering) <= share * full
    assert video.entering == video.features or cost(video.entering + 1) > share * full


def test_a_flops_budget_works_in_generate_and_for_rows_of_their_own(family):
    model = make_model(family)
    rows = [[5, make_video(family), 6, 7, 8], [9, make_video(family, seed=1), 10, make_video(family, seed=2), 11]]
    holimerge.patch_model(model, {"method": "holitom", "budget": {"flops": 0.5}})
    with torch.no_grad():
        model.generate(**build(family, rows), max_new_tokens=2)
        together = [v.entering for v in holimerge.last_report(model).videos]
        alone = []
        for row in rows:
            model.generate(**build(family, [row]), max_new_tokens=2)
            alone += [v.entering for v in holimerge.last_report(model).videos]
    assert together == alone


def test_a_flops_budget_below_one_token_states_the_minimum(family):
    model = make_model(family)
    with pytest.raises(holimerge.ConfigError, match=r"budget\.flops: .*0\.\d+"):
        run(model, prompt(family), {"method": "holitom", "budget": {"flops": 1e-4}})
    # the least that it names is enough
    with pytest.raises(ValueError, match="share") as error:
        largest_budget(shape_of(model.config).text, share=1e-4, total_tokens=36, text_tokens=8)
    assert error


@pytest.mark.parametrize("at", ["projector_input", "projector_output"])
@pytest.mark.parametrize("preset", ["keep-all", "holimerge-25", "holitom-25"])
def test_exact_flops_agree_with_the_counter_on_patched_models(family, attn, preset, at):
    model = make_model(family, attn=attn)
    x = build(family, [[5, 6, 7, make_video(family, frames=12, side=(32, 48)), 11, 12, 13]])
    cfg = preset if preset == "keep-all" else {"base": preset, "outer": {"at": at}, "inner": {"layer": 2}}
    holimerge.patch_model(model, cfg)
    with torch.no_grad():
        model(**x)
        counted = count_flops(lambda: model(**x))
    report = holimerge.last_report(model)
    video = report.videos[0]
    reduced = preset != "keep-all"
    frames = video.record.frames * (1 if family == "llava_onevision" else 2)
    grid = None if family == "llava_onevision" else tuple(x["video_grid_thw"][0, 1:].tolist())
    cost = exact_cost(
        shape_of(model.config),
        frames=frames,
        grid=grid,
        text_tokens=x["input_ids"].shape[1] - video.features - video.separators,
        entering=video.entering,
        separators=video.separators,
        after_inner=video.after_inner,
        inner_layer=report.inner_layer,
        at=at if reduced else "projector_output",
        static_sets=video.record.clustered,
        scored=reduced,
        logits="all",
    )
    assert cost.total == pytest.approx(counted, rel=0.01)


def test_a_count_beside_a_share_binds_under_the_authors_rounding_too(family):
    model, x, kept = make_model(family), prompt(family), []
    for budget in ({"retain": 0.9}, {"retain": 0.9, "tokens": 4}, {"tokens": 4}):
        report = run(model, x, {"method": "holitom", "budget": {**budget, "exact": False}})
        kept.append(report.videos[0].entering)
    assert kept[0] > kept[1] == kept[2]
