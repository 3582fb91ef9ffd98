"""Every way a Hugging Face model generates: patched, each step equals its own recomputation from scratch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import (
    CLOSE,
    Positions,
    answer_of,
    check,
    choices,
    close,
    configured,
    every_case,
    every_family,
    exact_and_anywhere,
    from_scratch,
    patched,
    ragged,
    refused,
    sampled,
    skip_if_recurrent,
    skip_unless_stock_does,
    stock_does,
)
from patching import generate, handle_of, logits
from toys import TEXT, TOYS, VIDEO, build, make_model, make_video, prompt
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, cache_utils

import holimerge

# ------------------------------------------------------------------------------------------------ greedy and sampled


@every_case()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_greedy_answer_takes_the_largest_logit_of_a_recomputation(family, inner, attn):
    model, rows = patched(family, inner, attn=attn), ragged(family)
    x = build(family, rows)
    out = generate(model, x)
    for t, fresh in enumerate(check(model, family, rows, out)):
        fresh[:, model.generation_config.suppress_tokens] = -torch.inf
        assert torch.equal(fresh.argmax(-1), answer_of(out, x)[:, t])
    # padding is found without a mask too, and lengths are the caller's
    x.pop("attention_mask")
    with torch.no_grad():
        by_length = model.generate(**x, max_length=x["input_ids"].shape[1] + 3, do_sample=False)
    assert torch.equal(by_length, out.sequences[:, :-2])


@every_case()
def test_a_sampled_answer_repeats_with_its_seed_and_equals_recomputation(family, inner):
    model, rows = patched(family, inner), ragged(family)
    x = build(family, rows)
    out = sampled(model, x)
    check(model, family, rows, out)
    assert torch.equal(sampled(model, x).sequences, out.sequences)
    assert not torch.equal(sampled(model, x, seed=1).sequences, out.sequences)


@every_case()
def test_several_sequences_of_a_prompt_equal_their_own_recomputation(family, inner):
    skip_unless_stock_does(family, "samples")
    model, rows = patched(family, inner), ragged(family)
    out = sampled(model, build(family, rows), num_return_sequences=3)
    assert len({tuple(s) for s in out.sequences.tolist()}) == 6
    assert len(holimerge.last_report(model).videos) == sum(map(TOYS[family].videos, rows))
    check(model, family, [row for row in rows for _ in range(3)], out)


# -------------------------------------------------------------------------------------------------------------- beams


@every_case()
@pytest.mark.parametrize(("beams", "sample"), [(2, False), (3, False), (3, True)], ids=["2", "3", "sampled"])
def test_every_beam_has_the_score_of_its_recomputation(family, inner, beams, sample):
    skip_unless_stock_does(family, "beams")
    model, rows = patched(family, inner), ragged(family)
    x = build(family, rows)
    run = sampled if sample else generate
    out = run(model, x, 4, num_beams=beams, num_return_sequences=beams, output_scores=True)
    assert (out.beam_indices[:, :-1] != out.beam_indices[:, 1:]).any(), "no beam was ever reordered"
    expanded = build(family, [row for row in rows for _ in range(beams)])
    answers = answer_of(out, x)
    steps = from_scratch(model, family, expanded, answers, choices(model))
    # a step's logits stand in the row of the beam that was gone on from
    close([step[out.beam_indices[:, t]] for t, step in enumerate(out.logits)], steps)
    if not sample:
        chosen = [s.log_softmax(-1).gather(1, answers[:, t, None])[:, 0] for t, s in enumerate(steps)]
        torch.testing.assert_close(out.sequences_scores, torch.stack(chosen).mean(0), **CLOSE)
    by_steps = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices).mean(1)
    torch.testing.assert_close(out.sequences_scores, by_steps, **CLOSE)


# ------------------------------------------------------------------------------------------------------------- drafts


def repeating(family: str) -> list[list[Any]]:
    """A prompt whose end stands in it before, so that a lookup drafts tokens at once."""
    return [[20, 21, 22, 5, make_video(family), 6, 7, 20, 21]]


def lengths_of(model: Any) -> list[int]:
    """From now on, how many tokens each forward was given."""
    lengths: list[int] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        lengths.append(given.shape[1])

    handle_of(model).core.register_forward_pre_hook(look, with_kwargs=True)
    return lengths


@every_case()
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_looked_up_drafts_equal_recomputation(family, inner, sample):
    skip_unless_stock_does(family, "prompt lookup")
    model, rows = patched(family, inner), repeating(family)
    x = build(family, rows)
    lengths = lengths_of(model)
    out = (sampled if sample else generate)(model, x, 12, prompt_lookup_num_tokens=3)
    assert lengths[0] > x["input_ids"].shape[1], "nothing was drafted on top of the prompt"
    assert sum(lengths) - x["input_ids"].shape[1] > 12, "no draft was taken back"
    check(model, family, rows, out)


@every_case()
def test_looked_up_drafts_change_neither_what_is_kept_nor_the_answer(family, inner):
    skip_unless_stock_does(family, "prompt lookup")
    model = patched(family, inner)
    x = build(family, repeating(family))
    greedy, kept = generate(model, x, 8), choices(model)
    out, again = generate(model, x, 8, prompt_lookup_num_tokens=3), choices(model)
    assert torch.equal(again.outer[0].assignment, kept.outer[0].assignment)
    if inner:
        assert torch.equal(again.inner[0], kept.inner[0])
    assert torch.equal(out.sequences, greedy.sequences)


def assistant(family: str, kind: str) -> Any:
    """Another toy of the family, or a text model: some of its drafts are taken and others are not."""
    if kind == "text":
        torch.manual_seed(0)
        other: Any = Qwen2ForCausalLM(Qwen2Config(**{**TEXT, "num_hidden_layers": 1})).eval()
    else:
        other = make_model(family, gain=2.0, seed=1)
    other.generation_config.num_assistant_tokens = 3
    return other


@every_case()
@pytest.mark.parametrize("kind", ["family", "text"])
def test_an_unpatched_assistant_drafts_for_a_patched_model(family, inner, kind):
    skip_unless_stock_does(family, "assistant")
    rows = [[5, 6, make_video(family), 11, 12]]
    if kind == "text":
        skip_unless_stock_does(family, "text assistant")
        if TOYS[family].mrope:
            pytest.skip("stock hands a text model positions of four axes and arguments that it does not take")
    model, x = patched(family, inner), build(family, rows)
    greedy = generate(model, x, 6)
    lengths = lengths_of(model)
    out = generate(model, x, 6, assistant_model=assistant(family, kind))
    assert lengths[0] > x["input_ids"].shape[1], "nothing was drafted on top of the prompt"
    close(out.logits, greedy.logits)
    assert torch.equal(out.sequences, greedy.sequences)


@every_case()
def test_a_patched_assistant_is_refused_since_it_never_sees_the_pixels(family, inner):
    skip_unless_stock_does(family, "assistant")
    if TOYS[family].placeholder != VIDEO:
        pytest.skip(f"{family}: its placeholders do not tell that a video is missing")
    model, x = make_model(family, gain=2.0), prompt(family)
    helper = holimerge.patch_model(assistant(family, "family"), configured(family, inner))
    with pytest.raises(RuntimeError, match="no video"):
        generate(model, x, 6, assistant_model=helper)


# ------------------------------------------------------------------------------------------------------------- caches


QUANTIZED = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
CACHES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # what stock must do for it, and how it is asked for
    "static": (("static cache",), {"cache_implementation": "static"}),
    "quantized": (("quantized cache",), QUANTIZED),
    "offloaded": (("offloaded cache",), {"cache_implementation": "offloaded"}),
    "offloaded_static": (("offloaded cache", "static cache"), {"cache_implementation": "offloaded_static"}),
}


@every_case()
@pytest.mark.parametrize("kind", CACHES)
def test_every_kind_of_cache_gives_the_same_answer(family, inner, kind, monkeypatch):
    modes, how = CACHES[kind]
    skip_unless_stock_does(family, *modes)
    exact_and_anywhere(monkeypatch)
    rows = ragged(family)
    model, x = patched(family, inner, attn="eager" if kind == "static" else "sdpa"), build(family, rows)
    if kind in ("static", "quantized") and stock_does(family, "beams"):
        more = {"num_beams": 3, "num_return_sequences": 2}
        assert torch.equal(generate(model, x, 4, **how, **more).sequences, generate(model, x, 4, **more).sequences)
    generate(model, x, 1)
    kept, out = choices(model), generate(model, x, 4, **how)
    for a, b in zip(kept.inner or [], choices(model).inner or [], strict=True):
        assert torch.equal(a, b)
    kinds = {"quantized": cache_utils.QuantizedCache, "offloaded": DynamicCache}
    assert isinstance(out.past_key_values, kinds.get(kind, cache_utils.StaticCache))
    assert out.past_key_values.offloading == ("offloaded" in kind)
    check(model, family, rows, out)


@every_case()
def test_a_quantised_cache_holds_the_rounded_keys_of_the_reduced_prompt(family, inner):
    skip_unless_stock_does(family, "quantized cache")
    model, x = patched(family, inner), prompt(family)
    exact, out = generate(model, x, 2), generate(model, x, 2, **QUANTIZED)
    torch.testing.assert_close(out.logits[0], exact.logits[0], **CLOSE)  # the prompt is read before it is rounded
    assert (out.logits[1] != exact.logits[1]).any()
    for rounded, layer in zip(out.past_key_values.layers, exact.past_key_values.layers, strict=True):
        assert rounded._quantized_keys[0].dtype == torch.float8_e4m3fn
        keys, wanted = rounded._dequantize(rounded._quantized_keys)[:, :, :-1], layer.keys[:, :, :-1]
        assert keys.shape == wanted.shape
        # three bits after the leading one, and the smallest steps of an 8-bit float on the tensor's scale
        assert ((keys - wanted).abs() <= wanted.abs() / 16 + wanted.abs().max() / 448).all()


# --------------------------------------------------------------------------------------- without a cache, or in pieces


@every_case()
@pytest.mark.parametrize("name", ["use_cache", "prefill_chunk_size"])
def test_what_has_no_single_last_token_is_refused_with_an_inner_merge_and_right_without(family, inner, name):
    """Without a cache every step, and in pieces every piece, would choose with a last token of its own."""
    how = {"use_cache": False} if name == "use_cache" else {"prefill_chunk_size": 16}
    if name != "use_cache":
        skip_unless_stock_does(family, "chunked prefill")
        skip_if_recurrent(family, "refused; see test_hard_cases")
    model, rows = patched(family, inner), ragged(family)
    x = build(family, rows)
    if inner:
        for given in (how, {"generation_config": GenerationConfig(**how, max_new_tokens=2)}):
            with refused(model, family, rf"{name}.*: .*without an inner block"):
                model.generate(**x, **given)
        with holimerge.merging(model, configured(family, inner=False)):  # the way out
            model.generate(**x, **how, max_new_tokens=1)
        return
    close(generate(model, x, 3, **how).logits, generate(model, x, 3).logits)
    if stock_does(family, "beams"):
        more = {"num_beams": 2, "num_return_sequences": 2}
        assert torch.equal(generate(model, x, 3, **how, **more).sequences, generate(model, x, 3, **more).sequences)


@every_family
def test_a_padded_batch_is_prefilled_in_pieces_into_a_static_cache(family):
    skip_unless_stock_does(family, "chunked prefill", "static cache")
    skip_if_recurrent(family, "refused; see test_hard_cases")
    model, x = patched(family, inner=False), build(family, ragged(family))
    pieces = generate(model, x, 3, prefill_chunk_size=16, cache_implementation="static")
    close(pieces.logits, generate(model, x, 3).logits)


# ----------------------------------------------------------------------------------------------- embeddings as prompts


@every_case()
def test_embeddings_beside_their_ids_change_nothing(family, inner):
    skip_unless_stock_does(family, "embeds")
    model, x = patched(family, inner), build(family, ragged(family))
    embeds = model.get_input_embeddings()(x["input_ids"]).detach()
    expected, out = generate(model, x, 4), generate(model, {"inputs_embeds": embeds, **x}, 4)
    assert torch.equal(out.sequences, expected.sequences)
    close(out.logits, expected.logits)


@every_case()
def test_embeddings_alone_equal_their_recomputation(family, inner):
    """Without ids stock models with several position axes count a video's tokens as text; so do patched ones."""
    skip_unless_stock_does(family, "embeds")
    model, x = patched(family, inner), build(family, ragged(family))
    table, positions = model.get_input_embeddings(), Positions(model, family)
    embeds = table(x["input_ids"]).detach()
    positions.listening = True
    out = generate(model, {"inputs_embeds": embeds, **{k: v for k, v in x.items() if k != "input_ids"}}, 4)
    positions.listening = False
    selection = choices(model)
    assert out.sequences.shape[1] == 4  # a caller without ids gets the answer alone
    y = TOYS[family].extended(x, out.sequences[:, :-1])
    y["inputs_embeds"], y["position_ids"] = table(y.pop("input_ids")).detach(), positions.all
    with handle_of(model).replaying(selection):
        close(out.logits, logits(model, y, use_cache=False)[:, embeds.shape[1] - 1 :].unbind(1))
    if not TOYS[family].mrope:
        assert torch.equal(out.sequences, answer_of(generate(model, x, 4), x))


# ----------------------------------------------------------------------------------------------------- other decodings


@every_case()
def test_a_decoding_of_ones_own_runs_on_the_reduced_prompt(family, inner):
    def second_best(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k not in ("synced_gpus", "streamer")}
        out = model._prefill(input_ids, generation_config, kwargs)
        while True:
            kwargs = model._update_model_kwargs_for_generation(out, kwargs)
            token = logits_processor(input_ids, out.logits[:, -1].float()).topk(2).indices[:, 1:]
            input_ids = torch.cat([input_ids, token], 1)
            if stopping_criteria(input_ids, None).all():
                return input_ids
            given = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
            out = model(**given, return_dict=True)

    model, x = patched(family, inner), build(family, ragged(family))
    with torch.no_grad():
        ids = model.generate(**x, max_new_tokens=4, do_sample=False, custom_generate=second_best)
    answers = ids[:, x["input_ids"].shape[1] :]
    for t, fresh in enumerate(from_scratch(model, family, x, answers, choices(model))):
        fresh[:, model.generation_config.suppress_tokens] = -torch.inf
        assert torch.equal(fresh.topk(2).indices[:, 1], answers[:, t])


def guided(family: str, inner: bool) -> tuple[Any, list[list[Any]], Any]:
    if TOYS[family].mrope:
        pytest.skip("stock keeps one rope_deltas for both prompts and runs into it")
    model, rows = patched(family, inner), [[5, 6, make_video(family), 11, 12]]
    return model, rows, generate(model, build(family, rows), 4, guidance_scale=1.5, output_scores=True)


@every_case()
def test_guidance_weighs_the_video_against_no_video(family, inner):
    """Classifier-free guidance runs a second prompt, the last token alone, over a cache of its own."""
    model, rows, out = guided(family, inner)
    steps = check(model, family, rows, out)
    blind = logits(model, {"input_ids": out.sequences[:, -5:-1]})
    for t, (score, seeing) in enumerate(zip(out.scores, steps, strict=True)):
        without, free = blind[:, t].log_softmax(-1), torch.isfinite(score)
        torch.testing.assert_close(score[free], without.lerp(seeing.log_softmax(-1), 1.5)[free], **CLOSE)


@every_case()
def test_after_guidance_the_report_still_tells_about_the_prompt(family, inner):
    model, _, _ = guided(family, inner)
    assert len(holimerge.last_report(model).videos) == 1


@every_family
@pytest.mark.parametrize("call", ["generate", "generate_batch"])
def test_continuous_batching_of_a_video_is_refused(family, call, monkeypatch):
    """Stock answers without having seen the video: it takes ids and no pixels."""
    model, x = patched(family, inner=False), prompt(family)
    # or else a thread would start, and take seconds to fail
    monkeypatch.setattr(type(model), "continuous_batching_context_manager", lambda *_, **__: pytest.fail("work began"))
    with refused(model, family, "paged|continuous batching"):
        if call == "generate":
            model.generate(**x, max_new_tokens=2, cache_implementation="paged")
        else:
            model.generate_batch(x["input_ids"].tolist(), GenerationConfig(max_new_tokens=2))
