"""`inner.compact_cache`: layers below the inner merge forget the merged tokens once the prompt is through."""

from __future__ import annotations

import copy

import pytest
import torch
from generating import configured
from patching import answer_of, assert_steps_close, check_rows, generate, handle_of, needs
from toys import SOME, TOYS, build, make_model, make_video, prompt
from transformers import DynamicCache, StaticCache

import holimerge
from holimerge.cache import held_length

FAMILIES = [family for family in SOME if TOYS[family].inner_layers]
pytestmark = pytest.mark.parametrize("family", FAMILIES)


def patched(family: str, compact: bool = True):
    cfg = configured(family, True)
    cfg["inner"] = {**cfg["inner"], "compact_cache": compact}
    return holimerge.patch_model(make_model(family, gain=2.0), cfg)


def stores(cache):
    """The layers of a cache that hold tokens."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def test_the_prompt_is_answered_as_before_and_the_cache_shrinks(family):
    outs, sizes = [], []
    for compact in (False, True):
        model = patched(family, compact)
        out = generate(model, prompt(family), 4)
        outs.append(out)
        sizes.append([layer.keys.shape[2] for layer in stores(out.past_key_values)])
    assert torch.equal(outs[0].logits[0], outs[1].logits[0])
    assert len(set(sizes[0])) == 2
    assert set(sizes[1]) == {min(sizes[0])}
    # the caller's count is that of the tokens given
    assert outs[0].past_key_values.get_seq_length() == outs[1].past_key_values.get_seq_length()


def test_decoding_is_that_of_a_cache_compacted_by_hand(family):
    # the stock decoder over the cache of a run without compaction, from which the merged columns are taken by hand
    model, x = patched(family, compact=False), prompt(family)
    handle, steps, caches = handle_of(model), [], []
    layer = handle.inner.layer

    def watch(_module, _args, kwargs, output):
        steps.append((kwargs["inputs_embeds"], kwargs["position_ids"]))
        if len(steps) == 1:
            caches.append((copy.deepcopy(output.past_key_values), handle.current().inner.index))

    hook = handle.lm.register_forward_hook(watch, with_kwargs=True)
    first = answer_of(generate(model, x, 4), x)
    hook.remove()
    cache, index = caches[0]
    for store in stores(cache):
        if store.keys.shape[2] > index.shape[1]:
            store.keys, store.values = store.keys[:, :, index[0]], store.values[:, :, index[0]]
    assert {store.keys.shape[2] for store in stores(cache)} == {index.shape[1]}
    holimerge.unpatch_model(model)
    cache.__class__ = DynamicCache
    ours = generate(patched(family), x, 4)
    assert answer_of(ours, x)[0, 0] == first[0, 0]
    head, lm = model.get_output_embeddings(), TOYS[family].language_model(model)
    embed = model.get_input_embeddings()
    for step in range(1, 4):
        with torch.no_grad():
            token = answer_of(ours, x)[:, step - 1 : step]
            hidden = lm(inputs_embeds=embed(token), position_ids=steps[step][1], past_key_values=cache)
            torch.testing.assert_close(head(hidden.last_hidden_state)[:, -1], ours.logits[step], atol=1e-5, rtol=0)
    assert layer > 0


def test_rows_of_a_batch_are_those_of_their_own(family):
    model = patched(family)
    rows = [[5, make_video(family, seed=1), 6, 7], [8, make_video(family, seed=2), 9, 10, 11, 12, 13]]
    out = generate(model, build(family, rows), 4)
    check_rows(model, family, rows, out, handle_of(model).selection)


def test_a_second_turn_sees_the_same_tokens_in_one_piece_or_one_by_one(family):
    model, x = patched(family), prompt(family)
    out = generate(model, x, 3)
    later = torch.tensor([[20, 21, 22]])
    results = []
    for pieces in (later.split(3, 1), later.split(1, 1)):
        cache = copy.deepcopy(out.past_key_values)
        ids, last = out.sequences, None
        for piece in pieces:
            ids = torch.cat([ids, piece], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            last = generate(model, turn, 1, past_key_values=cache).logits[0]
        results.append(last)
        assert len({store.keys.shape[2] for store in stores(cache)}) == 1
    assert_steps_close(*([step] for step in results))


def test_drafts_give_the_same_answer(family):
    needs(family, mode="prompt lookup")
    x = prompt(family)
    plain = generate(patched(family), x, 6)
    drafted = generate(patched(family), x, 6, prompt_lookup_num_tokens=2)
    assert torch.equal(plain.sequences, drafted.sequences)
    assert_steps_close(plain.logits, drafted.logits)


def test_another_kind_of_cache_is_refused_before_any_work(family):
    model, x = patched(family), prompt(family)
    with pytest.raises(ValueError, match="compact_cache: a StaticLayer cannot lose tokens"):
        generate(model, x, 2, past_key_values=StaticCache(config=model.config, max_cache_len=400))
    with pytest.raises(ValueError, match="compact_cache: a cache of cache_implementation 'static'"):
        generate(model, x, 2, cache_implementation="static")
    cache = StaticCache(config=model.config, max_cache_len=400)
    with pytest.raises(ValueError, match="cannot lose tokens"), torch.no_grad():
        model(**x, past_key_values=cache)
    assert held_length(cache) == 0
