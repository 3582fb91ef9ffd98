"""The laws of a patched model, on real Hugging Face classes at toy size."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from patching import (
    answer_of,
    assert_steps_close,
    batch_rows,
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
    suited,
)
from toys import FAMILIES, SOME, TOYS, build, cases, make_model, make_video, prompt

import holimerge
from holimerge.call import Source


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family there is; other test files look at two."""
    return request.param


# each value with each of the others once; all three at a time would tell no more
NUMERICS = [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("eager", torch.float32), ("eager", torch.bfloat16)]
WITH_NUMERICS = ("family", "attn", "dtype")
INNER = [False, True]


def and_alternating(values: list[Any]) -> list[tuple[Any, ...]]:
    """NUMERICS with two values, so that each goes with each implementation and each precision."""
    return [(*numerics, values[i in (1, 2)]) for i, numerics in enumerate(NUMERICS)]


# ---------------------------------------------------------------------------------------------- (a) keep-all


EVERY = and_alternating([False, True])


@pytest.mark.parametrize((*WITH_NUMERICS, "forced"), cases(EVERY, [EVERY[2], EVERY[3]]))
def test_keep_all_is_bit_identical(family, attn, dtype, forced):
    model = make_model(family, attn=attn, dtype=dtype)
    batches = [prompt(family, dtype=dtype)]
    batches += [build(family, rows, dtype=dtype) for rows in batch_rows(family)]
    expected = [(logits(model, x), generate(model, x, 3)) for x in batches]
    patch(model, "keep-all")
    handle_of(model).force_packing = forced
    for x, (plain, generated) in zip(batches, expected, strict=True):
        assert torch.equal(logits(model, x), plain)
        ours = generate(model, x, 3)
        assert torch.equal(ours.sequences, generated.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, generated.logits, strict=True))


EVERY = and_alternating(["projector_input", "projector_output"])


@pytest.mark.parametrize((*WITH_NUMERICS, "at"), cases(EVERY, [EVERY[0], EVERY[2]]))
def test_a_budget_of_everything_runs_the_stock_projector_on_the_stock_tensor(family, attn, dtype, at):
    model = make_model(family, attn=attn, dtype=dtype)
    x = prompt(family, dtype=dtype)
    plain, generated = logits(model, x), generate(model, x)
    cfg = {"method": "holitom", "budget": {"retain": 1.0}, "outer": {"at": at}}
    patch(model, cfg)
    assert torch.equal(logits(model, x), plain)
    assert torch.equal(generate(model, x).sequences, generated.sequences)
    video = holimerge.last_report(model).videos[0]
    assert video.entering == video.features


def test_right_padding_and_images_are_untouched_by_keep_all(family):
    model = make_model(family)
    image = ("image", make_video(family, frames=2, side=(24, 24), seed=5)[0])
    video = make_video(family)
    prompts = [
        build(family, [[5, video, 6, 7], [8, video, 9, 10, 11, 12]], side="right"),
        build(family, [[5, image, 6, 7]]),
        build(family, [[5, 6, 7]]),
    ]
    if "image and video" not in TOYS[family].stock_fails:
        prompts.append(build(family, [[5, image, 6, video, 7]]))
    for x in prompts:
        plain = logits(model, x)
        with holimerge.merging(model, suited(model, "keep-all")):
            assert torch.equal(logits(model, x), plain)


@pytest.mark.parametrize("row", ["image", "text"])
def test_what_has_no_video_is_untouched_by_any_preset(family, row):
    if row == "image" and TOYS[family].images_are_frames:
        pytest.skip(f"{family} cannot tell an image from a frame, and so reduces it")
    model = make_model(family)
    parts = [5, ("image", make_video(family, frames=2, side=(24, 24))[0]), 6] if row == "image" else [5, 6, 7, 8]
    x = build(family, [parts])
    plain, generated = logits(model, x), generate(model, x)
    patch(model, preset("holimerge-10"))
    assert torch.equal(logits(model, x), plain)
    assert torch.equal(generate(model, x).sequences, generated.sequences)
    assert holimerge.last_report(model).videos == []


# ------------------------------------------------------------------------------------------- (b) undone exactly


@pytest.mark.parametrize(WITH_NUMERICS, cases(NUMERICS, [NUMERICS[0], NUMERICS[3]]))
def test_unpatching_restores_every_bit(family, attn, dtype):
    model = make_model(family, attn=attn, dtype=dtype)
    x = prompt(family, dtype=dtype)
    plain, generated = logits(model, x), generate(model, x)
    patch(model, preset("holimerge-10"))
    assert not torch.equal(logits(model, x), plain)
    holimerge.unpatch_model(model)
    assert torch.equal(logits(model, x), plain)
    assert torch.equal(generate(model, x).sequences, generated.sequences)


PLACES = [("vision",), ("projector",), ("layer0",), ("layer2",), ("lm_head",)]


@pytest.mark.parametrize(("family", "where"), cases(PLACES, [("projector",), ("layer2",)]))
def test_an_exception_in_the_middle_leaves_nothing_behind(family, where):
    model = make_model(family)
    x = prompt(family)
    plain = logits(model, x)
    layers = TOYS[family].language_model(model).layers
    module = {
        **TOYS[family].modules(model),
        "layer0": layers[0],
        "layer2": layers[2],
        "lm_head": model.get_output_embeddings(),
    }[where]
    patch(model, preset("holimerge-25"))
    reduced = logits(model, x)

    def explode(*_: Any) -> None:
        raise KeyError("in the middle")

    hook = module.register_forward_hook(explode)
    with pytest.raises(KeyError, match="in the middle"):
        logits(model, x)
    with pytest.raises(KeyError, match="in the middle"):
        generate(model, x)
    hook.remove()
    # nothing of the failed call is left: the user's own call gets stock features
    assert all(torch.isfinite(features).all() for features in TOYS[family].features(model, x))
    # the next call of the patched model is right, and so is the model when unpatched
    assert torch.equal(logits(model, x), reduced)
    text = build(family, [[5, 6, 7]])
    assert logits(model, text).shape[1] == 3
    holimerge.unpatch_model(model)
    assert torch.equal(logits(model, x), plain)


# ------------------------------------------------------- (c) the cache equals recomputation from scratch


CACHED = [
    *product(["sdpa"], ["holimerge-10", "holimerge-25", "holitom-10", "holitom-25"], INNER),
    *product(["eager"], ["holimerge-25", "holitom-10"], INNER),
]
CACHED_FEW = [("sdpa", "holimerge-25", False), ("sdpa", "holimerge-10", True), ("eager", "holitom-10", True)]


@pytest.mark.parametrize(("family", "attn", "name", "inner"), cases(CACHED, CACHED_FEW))
def test_cached_generation_equals_recomputation(family, attn, name, inner):
    needs(family, inner=inner)
    model = make_model(family, attn=attn)
    patch(model, preset(name, inner))
    for x in [prompt(family), *(build(family, rows) for rows in batch_rows(family))]:
        out = generate(model, x)
        steps = recomputed(model, family, x, answer_of(out, x), handle_of(model).selection)
        assert_steps_close(out.logits, steps)
        assert all(
            torch.equal(ours.argmax(-1), fresh.argmax(-1)) for ours, fresh in zip(out.logits, steps, strict=True)
        )


RULES = list(product(["contiguous", "original"], ["raster", "segment"]))


@pytest.mark.parametrize(("family", "positions", "order"), cases(RULES, [RULES[0], RULES[3]]))
def test_both_position_rules_decode_as_they_prefill(family, positions, order):
    needs(family, positions=positions, order=order)
    model = make_model(family)
    patch(model, preset("holimerge-25", positions=positions, order=order))
    for rows in [[[5, make_video(family), 6, 7]], *batch_rows(family)]:
        check_cached(model, family, build(family, rows), 5)


MERGES = list(product(["mean", "pairwise", "drop"], [1, 2, 3, 0.5]))
MERGES_FEW = [("pairwise", 1), ("drop", 2), ("mean", 3), ("mean", 0.5)]


@pytest.mark.parametrize(("family", "merge", "layer"), cases(MERGES, MERGES_FEW))
def test_every_layer_and_merge_decodes_right(family, merge, layer):
    k = 2 if layer == 0.5 else layer
    needs(family, layer=k)
    model = make_model(family)
    patch(model, {"base": "holimerge-25", "inner": {"layer": layer, "merge": merge, "retain": 0.4}})
    out, _ = check_cached(model, family, build(family, batch_rows(family)[0]), 5)
    # layers of linear attention hold no tokens
    lengths = [x.keys.shape[2] if hasattr(x, "keys") else None for x in out.past_key_values.layers]
    (below,), (above,) = ({n for n in part if n is not None} for part in (lengths[:k], lengths[k:]))
    assert above < below < out.sequences.shape[1]


def stock_difference(model: Any, lm: Any, x: dict[str, torch.Tensor], answer: torch.Tensor) -> float:
    """How far the stock language model's cached logits are from its uncached ones, on the same reduced input."""
    seen: dict[str, Any] = {}

    def look(_m: Any, _a: Any, kwargs: Any) -> None:
        if not seen:
            seen.update(kwargs)

    hook = lm.register_forward_pre_hook(look, with_kwargs=True)
    logits(model, x)
    hook.remove()
    embeds, positions, mask = seen["inputs_embeds"], seen["position_ids"], seen["attention_mask"]
    visual, levels = seen.get("visual_pos_masks"), seen.get("deepstack_visual_embeds")

    def deepstack(length: int) -> dict[str, Any]:
        """What the first layers add to the prompt's video, for a call of the prompt and some text."""
        if levels is None:
            return {}
        text = visual.new_zeros(visual.shape[0], length - visual.shape[1])
        return {"visual_pos_masks": torch.cat([visual, text], 1), "deepstack_visual_embeds": levels}

    holimerge.unpatch_model(model)
    worst = 0.0
    with torch.no_grad():
        table = lm.get_input_embeddings()
        mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
        cache = None
        for t in range(answer.shape[1]):
            more = torch.arange(1, t + 1)
            full = torch.cat([embeds, table(answer[:, :t])], 1)
            where = torch.cat([positions, positions[..., -1:] + more], -1)
            valid = torch.cat([mask, mask.new_ones(mask.shape[0], t)], 1)
            fresh = lm(
                inputs_embeds=full,
                position_ids=where,
                attention_mask=valid,
                use_cache=False,
                **deepstack(full.shape[1]),
            )
            new = slice(0 if cache is None else -1, None)
            step = lm(
                inputs_embeds=full[:, new],
                position_ids=where[..., new],
                attention_mask=valid,
                past_key_values=cache,
                use_cache=True,
                **(deepstack(full.shape[1]) if cache is None else {}),
            )
            cache = step.past_key_values
            head = model.get_output_embeddings()
            gap = head(step.last_hidden_state[:, -1]) - head(fresh.last_hidden_state[:, -1])
            worst = max(worst, gap.float().abs().max().item())
    return worst


@pytest.mark.parametrize(("family", "inner"), [(SOME[0], False), *((family, True) for family in SOME)])
def test_in_bf16_the_cache_is_as_exact_as_the_stock_model_s(family, inner):
    needs(family, inner=inner)
    # Wide enough that kernels for one token and for many round differently; in eager attention they often do not, so
    # both implementations share one bound.
    wide = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 512}
    ours, stock, largest = 0.0, 0.0, 0.0
    for seed, attn in enumerate(["sdpa", "sdpa", "eager", "eager"]):
        model = make_model(family, attn=attn, dtype=torch.bfloat16, seed=seed, gain=3, **wide)
        patch(model, preset("holimerge-25", inner))
        x = prompt(family, dtype=torch.bfloat16, seed=seed)
        out = generate(model, x, 8)
        answer = answer_of(out, x)
        chosen = handle_of(model).selection
        # a forward for each step, as in `stock_difference`: longer ones round differently
        steps = [recomputed(model, family, x, answer[:, : t + 1], chosen)[-1] for t in range(answer.shape[1])]
        gaps = [(a.float() - b.float()).abs().max().item() for a, b in zip(out.logits, steps, strict=True)]
        ours, largest = max(ours, *gaps), max(largest, *(a.float().abs().max().item() for a in out.logits))
        stock = max(stock, stock_difference(model, TOYS[family].language_model(model), x, answer))
    # On some CPUs one token and many round alike in the stock model; one rounding of the largest logit is left to us.
    assert ours <= max(2 * stock, torch.finfo(torch.bfloat16).eps * largest)


# ------------------------------------------------------------------------------ (d) a row depends on nothing else


BATCHED = list(product([("sdpa", "holimerge-25"), ("eager", "holitom-25")], INNER))


@pytest.mark.parametrize(("family", "how", "inner"), cases(BATCHED, [BATCHED[1], BATCHED[2]]))
def test_a_row_does_not_depend_on_the_rest_of_its_batch(family, how, inner):
    needs(family, inner=inner)
    attn, name = how
    model = make_model(family, attn=attn)
    patch(model, preset(name, inner))
    for rows in batch_rows(family):
        out = generate(model, build(family, rows))
        check_rows(model, family, rows, out, handle_of(model).selection)


def test_logits_and_loss_line_up_with_the_prompt(family):
    model = make_model(family)
    rows = [[5, make_video(family), 6, 7, 8, 9], [10, 11, make_video(family, seed=4), 12, 13]]
    x = build(family, rows)
    labels = torch.full_like(x["input_ids"], -100)
    labels[:, -2:] = x["input_ids"][:, -2:]
    patch(model, preset("holimerge-25"))
    with torch.no_grad():
        out = model(**x, labels=labels)
    assert out.logits.shape[:2] == x["input_ids"].shape
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, -3:-1].flatten(0, 1), x["input_ids"][:, -2:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
    selection = handle_of(model).selection
    for i, row in enumerate(rows):
        one = build(family, [row])
        answer = torch.full_like(one["input_ids"], -100)
        answer[:, -2:] = one["input_ids"][:, -2:]
        with handle_of(model).replaying(selection.of([i], [i])), torch.no_grad():
            alone = model(**one, labels=answer)
        torch.testing.assert_close(out.logits[i, -3:], alone.logits[0, -3:], atol=5e-4, rtol=0)


def test_right_padded_rows_get_the_same_answer_as_left_padded_ones(family):
    model = make_model(family)
    rows = [[5, make_video(family), 6, 7], [8, 9, 10, make_video(family, seed=2), 11, 12, 13]]
    patch(model, preset("holimerge-25"))
    left, right = (TOYS[family].positioned(build(family, rows, side=side)) for side in ("left", "right"))
    at_left = logits(model, left)
    with handle_of(model).replaying(handle_of(model).selection):
        at_right = logits(model, right)
    for i in range(2):
        n = int(left["attention_mask"][i].sum())
        torch.testing.assert_close(at_left[i, -3:], at_right[i, n - 3 : n], atol=5e-4, rtol=0)


def test_changing_the_answer_changes_no_selection(family):
    needs(family, inner=True)
    model = make_model(family)
    patch(model, preset("holimerge-25"))
    video = make_video(family)
    owners = []
    for answer in ([20, 21], [70, 30], [44]):
        x = build(family, [[5, video, 6, 7, *answer]])
        labels = torch.full_like(x["input_ids"], -100)
        labels[:, -len(answer) :] = x["input_ids"][:, -len(answer) :]
        with torch.no_grad():
            model(**x, labels=labels)
        owners.append(handle_of(model).selection.inner[0])
    logits(model, build(family, [[5, video, 6, 7]]))
    owners.append(handle_of(model).selection.inner[0])
    assert all(torch.equal(owners[0], o) for o in owners[1:])
    assert (owners[0] != torch.arange(len(owners[0]))).any()


# ----------------------------------------------------------------------------------------- ways to generate


def test_beams_score_what_a_recomputation_scores(family):
    needs(family, mode="beams")
    model = make_model(family)
    patch(model, preset("holimerge-25"))
    x = build(family, [[5, make_video(family), 6, 7, 6, 7], [8, 9, 10, make_video(family, seed=2), 11, 12]])
    beams = generate(model, x, num_beams=3, output_scores=True)
    assert beams.sequences.shape[0] == 2
    # the score of the best beam, from scratch
    answer = answer_of(beams, x)
    logits(model, x)
    steps = recomputed(model, family, x, answer, handle_of(model).selection)
    blocked = torch.zeros(steps[0].shape[-1])
    blocked[model.generation_config.suppress_tokens] = -torch.inf
    total = sum((s + blocked).log_softmax(-1).gather(1, answer[:, i : i + 1])[:, 0] for i, s in enumerate(steps))
    raw = sum(s.log_softmax(-1).gather(1, answer[:, i : i + 1])[:, 0] for i, s in enumerate(steps))
    score = beams.sequences_scores * answer.shape[1]
    closest = torch.minimum((score - total).abs(), (score - raw).abs())
    assert closest.max() < 5e-3


def test_prompt_lookup_gives_the_greedy_answer(family):
    needs(family, mode="prompt lookup")
    for seed in range(3):
        model = make_model(family, seed=seed)
        patch(model, preset("holimerge-25"))
        # the prompt repeats itself, so the first forward holds guesses too, and few models take them
        x = build(family, [[5, make_video(family, seed=seed), 6, 7, 6, 7]])
        greedy = generate(model, x, 8)
        lookup = generate(model, x, 8, prompt_lookup_num_tokens=3)
        assert torch.equal(greedy.sequences, lookup.sequences)


def test_samples_are_the_same_for_the_same_seed(family):
    needs(family, mode="samples")
    model = make_model(family)
    patch(model, preset("holimerge-25"))
    x = build(family, [[5, make_video(family), 6, 7, 6, 7]])
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.no_grad():
            runs.append(model.generate(**x, max_new_tokens=4, do_sample=True, num_return_sequences=3))
    assert torch.equal(*runs)
    assert runs[0].shape[0] == 3


STATIC = list(product(["sdpa", "eager"], INNER))


@pytest.mark.parametrize(("family", "attn", "inner"), cases(STATIC, [("sdpa", True)]))
def test_a_static_cache_gives_the_same_tokens(family, attn, inner):
    needs(family, inner=inner, mode="static cache")
    model = make_model(family, attn=attn)
    patch(model, preset("holimerge-25", inner))
    for rows in [[[5, make_video(family), 6, 7]], *batch_rows(family)[:2]]:
        x = build(family, rows)
        dynamic = generate(model, x)
        static = generate(model, x, cache_implementation="static")
        assert torch.equal(dynamic.sequences, static.sequences)
        assert_steps_close(dynamic.logits, static.logits)


def test_outer_reduction_allows_chunked_prefill(family):
    model = make_model(family)
    needs_chunked_prefill(family, model)
    patch(model, preset("holimerge-25", inner=False))
    x = prompt(family)
    whole = generate(model, x)
    chunked = generate(model, x, prefill_chunk_size=17)
    assert torch.equal(whole.sequences, chunked.sequences)


def test_a_second_turn_continues_the_first(family):
    """Text after an answer, over the same cache, equals the same conversation from scratch."""
    model = make_model(family)
    for cfg in (preset("holimerge-25", inner=False), preset("holimerge-25"), preset("holitom-25")):
        patch(model, cfg)
        x = prompt(family)
        first = generate(model, x, 3)
        selection = handle_of(model).selection
        ids = torch.cat([first.sequences, torch.tensor([[14, 15, 16]])], 1)
        y = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in x:
            kinds = torch.zeros(1, ids.shape[1] - x["input_ids"].shape[1]).int()
            y["mm_token_type_ids"] = torch.cat([x["mm_token_type_ids"], kinds], 1)
        if TOYS[family].mrope:
            # Stock Qwen2.5-VL numbers a later turn from its largest position and not from its last; given the positions
            # of the whole conversation, both ways of running it can be compared.
            y["position_ids"] = model._prepare_position_ids_for_generation(ids, {**x, **y})
        second = generate(model, y, 3, past_key_values=copy.deepcopy(first.past_key_values))
        fresh_inputs = {**x, **{k: v for k, v in y.items() if k != "position_ids"}}
        steps = recomputed(model, family, fresh_inputs, answer_of(second, y), selection)
        assert_steps_close(second.logits, steps)


def test_encoding_in_chunks_of_frames_changes_nothing_but_rounding(family):
    model = make_model(family)
    x = build(family, [[5, make_video(family), 6, make_video(family, seed=2, frames=6), 7]])
    for at in ("projector_input", "projector_output"):
        cfg = {"base": "holimerge-25", "outer": {"at": at}, "inner": None}
        patch(model, cfg)
        whole = logits(model, x)
        selection = handle_of(model).selection
        for chunk in (1, 2, 4, 100):
            patch(model, {**cfg, "chunk_frames": chunk})
            with handle_of(model).replaying(selection):
                torch.testing.assert_close(logits(model, x), whole, atol=1e-4, rtol=0)


def test_reductions_before_and_after_the_projector_agree_where_the_projector_is_linear(family):
    """With a linear projector, merging and projecting commute, so both placements give the same features."""
    model = make_model(family)
    TOYS[family].make_projector_linear(model)
    x = prompt(family)
    # anchors equal to their members' positions: temporal merging only, so the bilinear weights are the anchor's own
    cfg = {"base": "holimerge-25", "inner": None, "budget": {"retain": 0.9}, "outer": {"similarity": 0.5}}
    patch(model, {**cfg, "outer": {"at": "projector_output", "similarity": 0.5}})
    after = logits(model, x)
    selection = handle_of(model).selection
    assert selection.outer[0].kept < selection.outer[0].total
    patch(model, {**cfg, "outer": {"at": "projector_input", "similarity": 0.5}})
    with handle_of(model).replaying(selection):
        torch.testing.assert_close(logits(model, x), after, atol=5e-4, rtol=0)


@pytest.mark.parametrize("family", SOME)
def test_which_videos_a_row_holds_is_asked_for_once(family, monkeypatch):
    """Asked again behind the decoder's layers, a GPU would have to finish them first."""
    model, x = make_model(family), build(family, batch_rows(family)[0])
    patch(model, preset("holimerge-25"))
    rows_of, asked = Source.rows_of, []
    monkeypatch.setattr(Source, "rows_of", lambda self, held: (asked.append(self), rows_of(self, held))[1])
    logits(model, x)
    assert len(asked) == len({id(source) for source in asked}) > 0
