"""Several turns over one cache: every answer equals that of the same conversation from scratch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from generating import (
    CLOSE,
    Positions,
    Talk,
    check,
    close,
    configured,
    every_case,
    every_family,
    every_family_with_an_inner_merge,
    exact_and_anywhere,
    patched,
    ragged,
    refused,
    skip_if_recurrent,
    skip_unless_stock_does,
)
from patching import generate
from toys import TOYS, build, make_model, make_video
from transformers import DynamicCache, QuantizedCache, StaticCache

import holimerge


def videos(family: str) -> list[torch.Tensor]:
    return [make_video(family, seed=seed) for seed in range(1, 4)]


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def ends_first(first: list[int], second: list[int]) -> int:
    """A token that ends the first answer early and the second not at all."""
    found = next((token for token in first[:2] if token not in second), None)
    if found is None:
        pytest.skip("this toy's two answers begin with the same tokens")
    return found


# -------------------------------------------------------------------------------------------------------- three turns


@every_case()
@pytest.mark.parametrize(
    ("how", "name"), [("all ids", "holimerge-25"), ("new ids", "holimerge-25"), ("new ids", "holitom-25")]
)
def test_later_turns_go_on_as_generate_numbers_them(family, inner, how, name):
    talk = Talk(patched(family, inner, name), family)
    one, two, _ = videos(family)
    turns = [[5, one, 6, 7], [14, 15, 16], [8, two, 9, 10], [11, 12]]
    if TOYS[family].mrope and how == "all ids":  # stock needs all grids to number them, and may have the new ones alone
        turns = turns[:2]
    for turn in turns:
        talk.check(talk.say([turn], how=how))


@every_case()
@pytest.mark.parametrize(
    ("opening", "name"), [("video", "holimerge-25"), ("text", "holimerge-25"), ("video", "holitom-25")]
)
def test_later_turns_go_on_with_given_positions(family, inner, opening, name):
    talk = Talk(patched(family, inner, name), family)
    one, two, three = videos(family)
    first = [5, one, 6, 7] if opening == "video" else [20, 21, 22]
    for turn in (first, [8, two, 9, 10], [17, three, two, 18]):
        talk.check(talk.say([turn], 2, how="positions"))


def go_on_unevenly(family: str, inner: bool, kind: str, *, videos_first: bool) -> None:
    """Padding stands before the first turn and inside the conversation."""
    skip_if_recurrent(family, "padding inside a conversation is refused; see test_hard_cases")
    model = patched(family, inner)
    talk = Talk(model, family, CACHES[kind](model))
    two, three = videos(family)[1:]
    turns = [ragged(family), [[14, three, 15], [16, 17, 18, 19, three, 20]], [[21], [22, 23]], [[24, two], [two, 25]]]
    if not videos_first:
        turns = [[[26, 27], [28]], turns[1]]
    for rows in turns:
        talk.check(talk.say(rows, 2, how="positions"))


@every_case()
@pytest.mark.parametrize("kind", ["plain", "static"])
def test_padded_rows_see_their_first_video_together(family, inner, kind):
    skip_unless_stock_does(family, f"{kind} cache")
    go_on_unevenly(family, inner, kind, videos_first=False)


@every_case()
def test_rows_of_unequal_length_go_on_together(family, inner):
    go_on_unevenly(family, inner, "plain", videos_first=True)


@every_case()
def test_rows_of_unequal_length_go_on_together_over_a_static_cache(family, inner):
    skip_unless_stock_does(family, "static cache")
    go_on_unevenly(family, inner, "static", videos_first=True)


@every_case()
def test_an_image_may_come_later(family, inner):
    skip_unless_stock_does(family, "image and video")
    if TOYS[family].as_images:
        pytest.skip("its videos are images")
    talk = Talk(patched(family, inner), family)
    one, two, _ = videos(family)
    image = ("image", make_video(family, frames=2, side=(24, 24), seed=5)[0])
    for turn in ([5, one, 6, 7], [8, image, 9], [10, two, 11]):
        talk.check(talk.say([turn], 2, how="positions"))


@every_case()
@pytest.mark.parametrize("kind", ["plain", "static"])
def test_padding_after_an_answer_s_end_stays_hidden(family, inner, kind):
    skip_unless_stock_does(family, f"{kind} cache")
    skip_if_recurrent(family, "stock lets its state decay over the padding")
    model, rows = patched(family, inner), ragged(family)
    x = build(family, rows)
    first, second = generate(model, x, 4).sequences[:, x["input_ids"].shape[1] :].tolist()
    talk = Talk(model, family, CACHES[kind](model))
    talk.say(rows, 4, how="positions", ended=ends_first(first, second))
    assert (talk.said["attention_mask"][0, -2:] == 0).all()
    assert (talk.said["attention_mask"][1, -2:] == 1).all()
    talk.check(talk.say([[14, 15], [16, 17]], how="positions"))


@every_case()
def test_a_turn_after_drafts_that_were_taken_back(family, inner):
    skip_unless_stock_does(family, "prompt lookup")
    talk = Talk(patched(family, inner), family)
    one, two, _ = videos(family)
    talk.check(talk.say([[20, 21, 5, one, 6, 20, 21]], 8, prompt_lookup_num_tokens=3))
    talk.check(talk.say([[8, two, 9, 10]], how="positions"))


@every_family
def test_a_later_video_may_be_prefilled_in_chunks(family):
    skip_unless_stock_does(family, "chunked prefill")
    skip_if_recurrent(family, "refused; see test_hard_cases")
    talk = Talk(patched(family, inner=False), family)
    one, two, _ = videos(family)
    talk.say([[5, one, 6, 7]])
    chunked = copy.copy(talk)
    chunked.cache = copy.deepcopy(talk.cache)
    # the answer's last token is not in the cache yet, so that pieces do not begin where the turn does
    out = chunked.say([[8, two, 9, 10]], how="positions", prefill_chunk_size=16)
    close(out.logits, talk.say([[8, two, 9, 10]], how="positions").logits)


# ------------------------------------------------------------------------------------------------------ kinds of cache


CACHES: dict[str, Any] = {
    "plain": lambda model: DynamicCache(config=text_config(model)),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=500),
    "offloaded": lambda model: DynamicCache(config=text_config(model), offloading=True),
    "quantized": lambda model: QuantizedCache("fp8", text_config(model)),
}


@every_case()
@pytest.mark.parametrize("kind", CACHES)
def test_turns_over_every_kind_of_cache(family, inner, kind, monkeypatch):
    skip_unless_stock_does(family, f"{kind} cache")
    exact_and_anywhere(monkeypatch)
    model = patched(family, inner, attn="eager" if kind == "static" else "sdpa")
    talk = Talk(model, family, CACHES[kind](model))
    one, two, _ = videos(family)
    turns = [[5, one, 6, 7], [14, 15], [8, two, 9]]
    if kind == "quantized" and inner:  # see below
        turns = turns[:2]
    for turn in turns:
        talk.check(talk.say([turn], 2, how="positions"))


@every_family_with_an_inner_merge
def test_an_inner_merge_over_keys_that_cannot_be_read_is_refused_before_any_work(family):
    skip_unless_stock_does(family, "quantized cache")
    model = patched(family, inner=True)
    talk = Talk(model, family, CACHES["quantized"](model))
    talk.say([[5, 6, 7]])
    with refused(model, family, "(?i)quantized.*dynamic.*without an inner block"):
        talk.say([[8, make_video(family), 9]], how="positions")


@every_case()
@pytest.mark.parametrize("kind", ["plain", "static"])
def test_a_cache_that_was_reset_holds_nothing_of_the_conversation_before(family, inner, kind):
    skip_unless_stock_does(family, f"{kind} cache")
    model = patched(family, inner)
    rows = [[5, make_video(family), 6, 7]]
    cache = CACHES[kind](model)
    generate(model, build(family, ragged(family)[1:]), 3, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    check(model, family, rows, generate(model, build(family, rows), 3, past_key_values=cache))


# ----------------------------------------------------------------------------- caches that are cut, copied and shared


@every_case()
@pytest.mark.parametrize("meaning", ["tokens to remove", "length to keep"])
def test_another_question_after_taking_the_first_back(family, inner, meaning):
    skip_if_recurrent(family, "a state cannot be taken back")
    talk = Talk(patched(family, inner), family)
    talk.say([[5, make_video(family), 6, 7]], tokens=0)
    before, length = copy.copy(talk), talk.cache.get_seq_length()
    talk.say([[14, 15]], 3, how="positions")
    # the answer's last token was never read
    talk.cache.crop(-4 if meaning == "tokens to remove" else length)
    assert talk.cache.get_seq_length() == length
    before.check(before.say([[16, 17, 18]], 3, how="positions"))


@every_case()
def test_a_cache_is_not_cut_into_a_reduced_video(family, inner):
    talk = Talk(patched(family, inner), family)
    talk.say([[5, 6, make_video(family), 7, 8]], tokens=0)
    length = talk.cache.get_seq_length()
    with pytest.raises(ValueError, match="video"):
        talk.cache.crop(-(length - 4))
    assert talk.cache.get_seq_length() == length


@every_case()
def test_a_prompt_is_read_once_and_asked_about_often(family, inner):
    """One forward reads it; the questions go on from copies of its cache, one by one and together."""
    skip_if_recurrent(family, "its caches cannot be repeated")
    one, two, _ = videos(family)
    talk = Talk(patched(family, inner), family)
    talk.say([[5, one, 6, 7, 8, 9]], tokens=0)
    for question in ([14, 15], [16, two, 17]):
        alone = copy.copy(talk)
        alone.cache, alone.choices = copy.deepcopy(talk.cache), list(talk.choices)
        alone.check(alone.say([question], 2, how="positions"))
    talk.fork(3, keep=[2, 0])
    talk.check(talk.say([[14, 15], [16, 17, 18]], how="positions"))


# --------------------------------------------------------------------------------------------------- without generate


@every_case()
@pytest.mark.parametrize("kind", ["plain", "static"])
def test_a_loop_of_ones_own_writes_what_generate_writes(family, inner, kind):
    skip_unless_stock_does(family, f"{kind} cache")
    model = patched(family, inner)
    for rows in (ragged(family)[:1], ragged(family))[kind == "static" :]:
        x = build(family, rows)
        positions = Positions(model, family)
        positions.listening = True
        expected = generate(model, x, 4)
        positions.listening = False
        inputs, length = dict(x), x["input_ids"].shape[1]
        given = len(rows) > 1  # padding needs a mask, and with a mask a model of several axes needs positions
        inputs |= {"past_key_values": CACHES[kind](model)}
        for step, logits in enumerate(expected.logits):
            if given:
                inputs["position_ids"] = positions.all[..., : length + step][..., -inputs["input_ids"].shape[1] :]
            with torch.no_grad():
                out = model(**inputs, use_cache=True)
            torch.testing.assert_close(out.logits[:, -1], logits, **CLOSE)
            inputs = {"input_ids": expected.sequences[:, length + step, None], "past_key_values": out.past_key_values}
            if given:
                more = torch.ones(len(rows), step + 1, dtype=torch.long)
                inputs["attention_mask"] = torch.cat([x["attention_mask"], more], 1)


def test_windows_of_attention_see_what_is_padding_in_a_batch():
    """A sliding layer's mask begins at an offset: its padding is read there, not from the left."""
    family = "llava_onevision"
    model = make_model(family, gain=2.0)
    config = copy.deepcopy(model.config)
    text = config.text_config
    text.use_sliding_window, text.sliding_window, text.max_window_layers = True, 8, 0
    text.layer_types = ["sliding_attention"] * text.num_hidden_layers
    sliding = type(model)(config).eval()
    sliding.load_state_dict(model.state_dict())
    sliding.generation_config = model.generation_config
    holimerge.patch_model(sliding, configured(family, False))
    x = build(family, ragged(family))
    cached, anew = generate(sliding, x, 6), generate(sliding, x, 6, use_cache=False)
    for a, b in zip(cached.logits, anew.logits, strict=True):
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)
