"""Cases that a careful reviewer broke once: each compares with recomputation, or a row with itself alone."""

from __future__ import annotations

import copy
import threading
from itertools import product
from typing import Any

import pytest
import torch
from patching import (
    answer_of,
    assert_steps_close,
    check_cached,
    check_rows,
    generate,
    handle_of,
    logits,
    needs,
    needs_chunked_prefill,
    patch,
    preset,
    recomputed,
)
from toys import FAMILIES, TOYS, VIDEO, build, cases, make_model, make_video, prompt
from transformers import StaticCache

import holimerge
from holimerge.splice import _deepstack, right_aligned

INNER = [False, True]
PROMPT = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def check_batch(model: Any, family: str, rows: list[list[Any]]) -> None:
    """A batch equals its recomputation, and every row of it the row alone."""
    check_rows(model, family, rows, *check_cached(model, family, build(family, rows)))


BESIDE = [(False, "contiguous", "text"), (True, "original", "text"), (True, "contiguous", "image")]
BESIDE += [(False, "original", "image"), (True, "contiguous", "text")]


@pytest.mark.parametrize(("family", "inner", "positions", "long"), cases(BESIDE, [BESIDE[3], BESIDE[4]]))
def test_a_short_video_beside_a_row_that_loses_nothing_and_is_longer(family, inner, positions, long):
    needs(family, inner=inner, positions=positions, mode="image and video" if long == "image" else None)
    model = make_model(family)
    patch(model, preset("holimerge-25", inner, positions=positions))
    image = ("image", make_video(family, frames=2, side=(24, 24), seed=5)[0])
    other = [20, image, *range(21, 60)] if long == "image" else list(range(5, 85)) * 2
    check_batch(model, family, [[5, make_video(family, frames=4), 6, 7], other])


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_a_video_that_fits_whole_beside_one_that_does_not(family, positions):
    needs(family, positions=positions)
    model = make_model(family)
    patch(
        model, {"method": "holitom", "budget": {"tokens": 24}, "outer": {"positions": positions}, "inner": {"layer": 2}}
    )
    big = make_video(family, frames=8, side=(32, 48))
    small = make_video(family, frames=8 if TOYS[family].equal_frames else 2, seed=2)
    check_batch(model, family, [[5, big, 6, 7], [8, 9, small, 10, 11]])


@pytest.mark.parametrize("name", ["holimerge-25", "holitom-25"])
def test_image_and_video_in_one_prompt(family, name):
    needs(family, mode="image and video")
    model = make_model(family)
    patch(model, preset(name))
    image = ("image", make_video(family, frames=2, side=(24, 24), seed=5)[0])
    check_batch(model, family, [[5, image, 6, make_video(family), 7], [8, make_video(family, seed=1), image, 9, 10]])


# without an inner merge, with one; each rule of positions, order and end with each
EDGES = [(False, "contiguous", "raster", 0), (False, "original", "segment", 0)]
EDGES += [(False, "contiguous", "segment", 2), (False, "original", "raster", 2)]
EDGES += [(True, "contiguous", "segment", 0), (True, "original", "raster", 0)]
EDGES += [(True, "contiguous", "raster", 2), (True, "original", "segment", 2)]


@pytest.mark.parametrize(("family", "inner", "positions", "order", "after"), cases(EDGES, EDGES[:1] + EDGES[5::2]))
def test_a_prompt_that_begins_or_ends_with_its_video(family, inner, positions, order, after):
    rest = [7, 8][:after]
    needs(family, inner=inner, positions=positions, order=order, mode=None if rest else "video at the end")
    toy = TOYS[family]
    model = make_model(family)
    patch(model, preset("holimerge-25", inner, positions=positions, order=order))
    x = build(family, [[make_video(family), *rest]])
    if not rest:  # the prompt's last token is a video token
        x = toy.only_placeholders_at_the_end(x)
        assert x["input_ids"][0, -1] == toy.placeholder
    if toy.mrope and not rest and positions == "original":
        # Stock generation goes on from the video's last position on every axis, a recomputation from the largest; the
        # answers differ unpatched too. The prompt's own logits must agree.
        out = generate(model, x, 1)
        fresh = recomputed(model, family, x, out.sequences[:, -1:], handle_of(model).selection)
        assert_steps_close(out.logits, fresh)
    else:
        out, _ = check_cached(model, family, x)
    assert out.logits[0].abs().max() > 0


def test_the_answer_right_after_a_video_is_predicted_by_its_last_kept_token(family):
    model = make_model(family)
    patch(model, preset("holimerge-25", inner=False))
    x = build(family, [[5, make_video(family), 40, 41]])
    end = int((x["input_ids"][0] == TOYS[family].placeholder).nonzero()[-1])
    with torch.no_grad():
        full = logits(model, x)[0]
    assert (full[end] != 0).any()
    labels = torch.full_like(x["input_ids"], -100)
    labels[0, end + 1] = x["input_ids"][0, end + 1]
    with torch.no_grad():
        loss = model(**x, labels=labels).loss
    assert float(loss) == pytest.approx(-float(full[end].log_softmax(-1)[x["input_ids"][0, end + 1]]), abs=1e-5)


@pytest.mark.parametrize(("family", "chunk"), cases([(1,), (2,), (7,), (16,)], [(7,)]))
def test_chunks_of_any_size_prefill_alike(family, chunk):
    model = make_model(family)
    needs_chunked_prefill(family, model)
    patch(model, preset("holimerge-25", inner=False))
    x = build(family, [[5, make_video(family), 6, 7], [8, make_video(family, seed=1), 9, 10, 11]])
    chunked = generate(model, x, 3, prefill_chunk_size=chunk)
    assert len(holimerge.last_report(model).videos) == 2
    assert_steps_close(chunked.logits, generate(model, x, 3).logits)


def test_chunks_of_segment_order_and_original_positions_are_refused(family):
    needs(family, positions="original", order="segment")
    model = make_model(family)
    patch(model, preset("holimerge-25", inner=False, order="segment", positions="original"))
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, prompt(family), prefill_chunk_size=8)


@pytest.mark.parametrize("family", [name for name in FAMILIES if TOYS[name].mrope])
def test_chunks_of_contiguous_positions_of_several_axes_are_refused(family):
    needs(family, positions="contiguous")
    model = make_model(family)
    patch(model, preset("holitom-25", inner=False))
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, prompt(family), prefill_chunk_size=8)


@pytest.mark.parametrize("family", [name for name in FAMILIES if TOYS[name].recurrent])
def test_layers_that_keep_a_state_cannot_skip_padding_in_the_middle(family):
    model = make_model(family)
    patch(model, preset("holimerge-25", inner=False))
    with pytest.raises(ValueError, match=r"prefill_chunk_size: .*linear layers"):
        generate(model, prompt(family), prefill_chunk_size=8)
    x = build(family, [[5, 6, 7], [8, 9, 10]])
    cache = generate(model, x, 2).past_key_values
    y = build(family, [[20, make_video(family), 21], [22, make_video(family, frames=10, seed=1), 23]])
    ids = torch.cat([x["input_ids"], torch.tensor([[14, 14], [14, 14]]), y["input_ids"]], 1)
    kinds = torch.cat([torch.zeros(2, 5).int(), y["mm_token_type_ids"]], 1)
    mask = torch.cat([torch.ones(2, 5).long(), y["attention_mask"]], 1)
    with pytest.raises(ValueError, match="one by one"):
        generate(
            model, {**y, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}, past_key_values=cache
        )


def conversation(
    model: Any, family: str, first: list[Any], second: list[Any], cache: Any
) -> tuple[Any, Any, list[Any]]:
    """Two turns over one cache, a video in the second; the second's outputs, its inputs, and the turns' selections."""
    x = build(family, [first])
    out = generate(model, x, 3, past_key_values=cache)
    selections = [handle_of(model).selection] if any(isinstance(p, torch.Tensor) for p in first) else []
    y = build(family, [second])
    ids = torch.cat([out.sequences, y["input_ids"]], 1)
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    both = build(family, [[p for p in (*first, *second) if isinstance(p, torch.Tensor)]])
    if "mm_token_type_ids" in x:
        gap = torch.zeros(1, ids.shape[1] - x["input_ids"].shape[1] - y["input_ids"].shape[1]).int()
        full["mm_token_type_ids"] = torch.cat([x["mm_token_type_ids"], gap, y["mm_token_type_ids"]], 1)
    if TOYS[family].mrope:
        full["position_ids"] = model._prepare_position_ids_for_generation(ids, {**both, **full})
    again = {**full, **{k: v for k, v in y.items() if k not in PROMPT}}
    result = generate(model, again, 3, past_key_values=out.past_key_values)
    selections.append(handle_of(model).selection)
    fresh = {**both, **{k: v for k, v in full.items() if k != "position_ids"}}
    return result, fresh, selections


PRESETS = [("holimerge-25", False), ("holitom-25", True), ("holimerge-10", False), ("holimerge-10", True)]
TURNS = [(inner, *how, "text") for inner, how in product(INNER, PRESETS)]
TURNS += [(False, *how, "video") for how in PRESETS] + [(True, *PRESETS[1], "video")]
TURNS_FEW = [(False, *PRESETS[0], "video"), (True, *PRESETS[1], "text"), (True, *PRESETS[2], "text")]


@pytest.mark.parametrize(("family", "inner", "name", "static", "first"), cases(TURNS, TURNS_FEW))
def test_a_second_turn_with_a_video(family, inner, name, static, first):
    needs(family, inner=inner, mode="static cache" if static else None)
    toy = TOYS[family]
    model = make_model(family)
    patch(model, preset(name, inner))
    # the second video is so short that at 10 % the inner merge has nothing left to merge in it
    two = make_video(family, frames=6 if toy.equal_frames else 2, seed=3)
    cache = StaticCache(config=model.config, max_cache_len=400) if static else None
    opening = [5, make_video(family), 6, 7] if first == "video" else [5, 6, 7, 8, 9]
    out, fresh, selections = conversation(model, family, opening, [8, two, 9, 10], cache)
    records = [r for s in selections for r in s.outer]
    if (inner or toy.one_video_a_row) and first == "video":
        # recomputation merges both turns at once; only the second turn's own choice can be replayed row by row
        assert all(torch.isfinite(step).all() for step in out.logits)
        return
    selection = type(selections[0])(records, selections[-1].inner)
    assert_steps_close(out.logits, recomputed(model, family, fresh, answer_of(out, fresh), selection))


@pytest.mark.parametrize("inner", INNER)
def test_static_and_dynamic_caches_agree_over_two_turns_of_padded_rows(family, inner):
    needs(family, inner=inner, mode="static cache")
    model = make_model(family)
    patch(model, preset("holimerge-25", inner))
    results = []
    for static in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=400) if static else None
        x = build(family, [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]])
        out = generate(model, x, 3, past_key_values=cache)
        y = build(family, [[20, make_video(family), 21], [22, make_video(family, seed=1), 23]])
        ids = torch.cat([out.sequences, y["input_ids"]], 1)
        mask = torch.cat([x["attention_mask"], torch.ones(2, ids.shape[1] - x["input_ids"].shape[1]).long()], 1)
        z = {**y, "input_ids": ids, "attention_mask": mask}
        if "mm_token_type_ids" in y:
            kinds = torch.zeros(2, ids.shape[1] - y["input_ids"].shape[1]).int()
            z["mm_token_type_ids"] = torch.cat([kinds, y["mm_token_type_ids"]], 1)
        results.append(generate(model, z, 3, past_key_values=out.past_key_values).logits)
    assert_steps_close(*results)


def test_a_flops_budget_in_a_forward_over_a_filled_cache(family):
    model = make_model(family)
    patch(model, {"method": "holitom", "budget": {"flops": 0.6}})
    with torch.no_grad():
        first = model(**build(family, [[5, 6, 7, 8]]), use_cache=True)
        y = build(family, [[9, make_video(family), 10]])
        mask = torch.ones(1, 4 + y["input_ids"].shape[1]).long()
        if TOYS[family].mrope:
            y["position_ids"] = torch.arange(4, mask.shape[1]).expand(3, 1, -1)
        if TOYS[family].recurrent or "moe" in family:  # no cost model for their decoders
            with pytest.raises(TypeError, match=r"no FLOPs model.*retain or tokens"):
                model(**{**y, "attention_mask": mask}, past_key_values=first.past_key_values)
            return
        model(**{**y, "attention_mask": mask}, past_key_values=first.past_key_values)
    video = holimerge.last_report(model).videos[0]
    assert 0 < video.entering < video.features


@pytest.mark.parametrize("changed", ["inner", "positions"])
def test_a_cache_of_another_configuration_is_refused(family, changed):
    configs = {
        "inner": [preset("holimerge-25", inner) for inner in (True, False)],
        "positions": [preset("holimerge-25", positions=positions) for positions in ("contiguous", "original")],
    }
    if changed == "inner":
        needs(family, inner=True)
    else:
        needs(family, positions="contiguous")
        needs(family, positions="original")
    model = make_model(family)
    before, after = configs[changed]
    patch(model, before)
    out = generate(model, prompt(family))
    patch(model, after)
    ids = torch.cat([out.sequences, torch.tensor([[14]])], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(RuntimeError, match="another configuration"):
        generate(model, more, past_key_values=out.past_key_values)


@pytest.mark.parametrize("use_cache", [None, False])
def test_gradients_flow_and_checkpointing_with_an_inner_merge_is_refused(family, use_cache):
    model = make_model(family).train()
    x = prompt(family)
    labels = x["input_ids"].where(torch.arange(x["input_ids"].shape[1]) >= x["input_ids"].shape[1] - 2, -100)
    losses = []
    for checkpointing in (False, True):
        for inner in INNER if TOYS[family].inner_layers else [False]:
            model.zero_grad()
            patch(model, preset("holimerge-25", inner))
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if checkpointing and inner:
                with pytest.raises(ValueError, match="gradient checkpointing"):
                    model(**x, labels=labels, use_cache=use_cache)
                continue
            loss = model(**x, labels=labels, use_cache=use_cache).loss
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert grads
            assert all(torch.isfinite(g).all() for g in grads)
            losses.append((inner, float(loss.detach())))
    assert dict(losses[:1])[False] == pytest.approx(losses[-1][1], abs=1e-6)


def test_caches_can_be_copied(family):
    model = make_model(family)
    patch(model, preset("holimerge-25"))
    cache = generate(model, prompt(family)).past_key_values
    for twin in (copy.deepcopy(cache), copy.copy(cache)):
        assert type(twin) is type(cache)
        assert twin.get_seq_length() == cache.get_seq_length()
        assert torch.equal(twin._holimerge.mask, cache._holimerge.mask)


def test_a_thread_that_only_watches_sees_the_latest_report(family):
    model = make_model(family)
    patch(model, preset("holimerge-25"))
    worker = threading.Thread(target=generate, args=(model, prompt(family)))
    worker.start()
    worker.join()
    assert len(holimerge.last_report(model).videos) == 1


def test_autocast_does_not_touch_decisions(family):
    model = make_model(family)
    patch(model, preset("holimerge-25"))
    x = prompt(family)
    tokens = torch.randn(3, 20, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(logits(model, x)).all()
    from holimerge.segment import pair_cosines

    assert pair_cosines(tokens)[0].dtype == torch.float32


def test_a_selection_without_inner_choices_replays_the_outer_ones_and_chooses_the_rest(family):
    model = make_model(family)
    patch(model, preset("holimerge-25"))
    x = prompt(family)
    expected = logits(model, x)
    chosen = handle_of(model).selection
    with handle_of(model).replaying(type(chosen)(chosen.outer)):
        assert torch.equal(logits(model, x), expected)
    with pytest.raises(ValueError, match="0 videos, the prompt 1"), handle_of(model).replaying(type(chosen)([])):
        logits(model, x)


def test_an_inner_merge_needs_a_layer_above_it_that_keeps_tokens():
    layers = ["linear_attention", "full_attention", "linear_attention"]
    model = make_model("qwen3_5", num_hidden_layers=3, layer_types=layers)
    with pytest.raises(holimerge.ConfigError, match=r"inner.layer: 2 cannot be used: .* valid: none"):
        holimerge.patch_model(model, preset("holimerge-25", True))


@pytest.mark.parametrize("with_levels", [name for name in ("qwen3_vl", "qwen3_5", "qwen2_5_vl") if name in TOYS])
def test_a_mask_may_hide_placeholders_of_a_video(with_levels):
    """Features that are added to the first layers have no row for what is hidden."""
    model, x = make_model(with_levels), prompt(with_levels, frames=8)
    inside = (x["input_ids"][0] == VIDEO).nonzero().flatten()[2:6]
    x["attention_mask"] = x["attention_mask"].clone()
    x["attention_mask"][0, inside] = 0
    x["position_ids"] = torch.arange(x["input_ids"].shape[1])[None, None].expand(3, 1, -1)
    for inner in INNER:
        patch(model, preset("holimerge-25", inner))
        assert torch.isfinite(logits(model, x)).all()


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_added_features_are_those_that_masks_would_take(seed):
    torch.manual_seed(seed)
    where, keep = torch.rand(2, 3, 14) < torch.tensor([0.6, 0.7])[:, None, None]
    index = right_aligned(keep, int(keep.sum(1).max()))
    real = keep.gather(1, index)
    levels = [torch.randn(int(where.sum()), 4) for _ in range(2)]
    found = _deepstack(levels, where, keep, index, real, int((where & keep).sum()))
    assert torch.equal(found["visual_pos_masks"], where.gather(1, index) & real)
    for level, ours in zip(levels, found["deepstack_visual_embeds"], strict=True):
        assert torch.equal(ours, level[keep[where]])
