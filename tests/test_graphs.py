"""Recorded decoding steps give, bit for bit, what the same steps give one by one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generating import TESTED, configured, ragged
from patching import assert_steps_close, generate
from recording import record_cpu
from toys import SOME, TOYS, build, make_model, prompt
from transformers import CompileConfig, LogitsProcessorList, StaticCache

import holimerge
from holimerge import graphs
from holimerge.graphs import graphed

STATIC = {"cache_implementation": "static", "disable_compile": True}
LINEAR = [name for name in TESTED if TOYS[name].recurrent]
FAMILIES = [name for name in TESTED if "static cache" not in TOYS[name].stock_fails and name not in LINEAR]
CASES = [
    (family, case)
    for family in FAMILIES
    for case in (("unpatched", "outer", "inner") if family in SOME else ("inner",))
    if case != "inner" or TOYS[family].inner_layers
]


def model_of(family: str, case: str, **how: Any) -> Any:
    model = make_model(family, gain=2.0, **how)
    return model if case == "unpatched" else holimerge.patch_model(model, configured(family, case == "inner"))


class Counted:
    """Counts what is recorded and how often it is done again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Any], device: torch.device) -> Any:
        replay, output = record_cpu(run, device)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted, output


def same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("family", "case"), CASES)
def test_replayed_steps_are_the_steps(family, case, batch):
    model = model_of(family, case)
    x = prompt(family) if batch == 1 else build(family, ragged(family))
    plain, grown = generate(model, x, 6, **STATIC), generate(model, x, 6)
    record = Counted()
    with graphed(model, record=record):
        out = generate(model, x, 6, cache_implementation="static")
        assert (record.recorded, record.replayed) == (1, 4)  # after the prompt and one step as it is
        again = generate(model, x, 4, cache_implementation="static")  # another cache: another graph
        assert (record.recorded, record.replayed) == (2, 6)
    same(out, plain)
    assert torch.equal(again.sequences, plain.sequences[:, :-2])
    assert torch.equal(out.sequences, grown.sequences)
    assert_steps_close(out.logits, grown.logits)
    same(generate(model, x, 6, **STATIC), plain)  # the block is over
    assert record.recorded == 2


# --- other calls in a block ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["outer", "inner"])
def test_a_conversation_over_one_static_cache(case):
    """A later turn of text, over rows whose answers were padded: what the caller's mask says goes into the record."""
    family = SOME[0]
    model, rows = model_of(family, case), ragged(family)
    x = build(family, rows)

    def talk(**how: Any) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=400)
        first = generate(model, x, 4, past_key_values=cache, **how)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8], [9, 6]])], dim=1)
        mask = torch.cat([x["attention_mask"], torch.ones(2, ids.shape[1] - x["attention_mask"].shape[1])], dim=1)
        mask[0, -4:-2] = 0  # this row's answer had ended
        text = {"input_ids": ids, "attention_mask": mask.long()}
        return first, generate(model, text, 6, past_key_values=cache, **how)

    plain, record = talk(disable_compile=True), Counted()
    with graphed(model, record=record):
        told = talk()
    assert record.recorded == 2
    for ours, theirs in zip(told, plain, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("case", ["outer", "inner"])
def test_padding_of_an_earlier_answer_stays_padding(case, static):
    """`generate` remembers it from the turn's prompt; forwards one by one are given the whole mask every time."""
    family = SOME[0]
    model, x = model_of(family, case), prompt(family)
    cache = StaticCache(config=model.config, max_cache_len=400) if static else None
    first = generate(model, x, 4, **({"past_key_values": cache} if static else {}))
    cache = first.past_key_values
    ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    mask = torch.ones_like(ids)
    mask[0, -5:-3] = 0  # the answer's last tokens in the cache; of the prompt and the new tokens none is padding
    twin = copy.deepcopy(cache)
    out = generate(model, {"input_ids": ids, "attention_mask": mask}, 4, past_key_values=cache, disable_compile=True)
    tokens, held = ids[:, -3:], mask.sum(1, keepdim=True)
    places = mask.cumsum(1)[:, -3:] - 1
    for step, expected in enumerate(out.logits):
        with torch.no_grad():
            found = model(
                input_ids=tokens, attention_mask=mask, position_ids=places, past_key_values=twin, use_cache=True
            ).logits[:, -1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        tokens = out.sequences[:, ids.shape[1] + step, None]
        mask, places = torch.cat([mask, torch.ones_like(tokens)], dim=1), held + step


def test_what_a_step_hands_out_stays_as_it_was():
    model, x = model_of(SOME[0], "inner"), prompt(SOME[0])
    more = {"output_hidden_states": True}
    plain = generate(model, x, 6, **STATIC, **more)
    with graphed(model, record=record_cpu):
        out = generate(model, x, 6, cache_implementation="static", **more)
    for ours, theirs in zip(out.hidden_states, plain.hidden_states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_beams_and_samples():
    family = SOME[0]
    model, x = model_of(family, "inner"), prompt(family)

    def both(**how: Any) -> list[Any]:
        torch.manual_seed(0)
        options = {"cache_implementation": "static", "max_new_tokens": 5}
        with torch.no_grad():
            return [
                model.generate(**x, num_beams=2, do_sample=False, **options, **how),
                model.generate(**x, num_return_sequences=2, do_sample=True, temperature=2.0, **options, **how),
            ]

    plain, record = both(disable_compile=True), Counted()
    with graphed(model, record=record):
        told = both()
    assert record.recorded == 1  # of the samples
    assert all(torch.equal(a, b) for a, b in zip(told, plain, strict=True))


def test_a_patch_may_come_and_go_within_the_block():
    family = SOME[0]
    model, x = make_model(family, gain=2.0), prompt(family)
    stock, record = generate(model, x, 5, **STATIC), Counted()
    names = set(model.__dict__)
    with graphed(model, record=record):
        with holimerge.merging(model, configured(family, True)):
            generate(model, x, 5, cache_implementation="static")
        same(generate(model, x, 5, cache_implementation="static"), stock)
        holimerge.patch_model(model, configured(family, True))
    assert record.recorded == 2
    ours = generate(model, x, 5, **STATIC)
    assert record.recorded == 2  # the patch stays, the block does not
    assert not torch.equal(ours.logits[0], stock.logits[0])
    holimerge.unpatch_model(model)
    model.__dict__.pop("generate", None)  # the block's, inert by now
    assert set(model.__dict__) - {"_previous_max_cache_length"} == names - {"_previous_max_cache_length"}
    same(generate(model, x, 5, **STATIC), stock)


def test_a_copy_made_in_the_block_runs_its_own_model():
    family = SOME[0]
    model, x = model_of(family, "outer"), prompt(family)
    with graphed(model, record=record_cpu):
        twin = copy.deepcopy(model)
        before = generate(twin, x, 4, cache_implementation="static")
        with torch.no_grad():
            model.lm_head.weight.zero_()
        same(generate(twin, x, 4, cache_implementation="static"), before)


def test_a_copy_made_in_the_block_ends_with_it():
    family = SOME[0]
    model, x = model_of(family, "outer"), prompt(family)
    with graphed(model, record=record_cpu):
        twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, x, 4).sequences, generate(model, x, 4).sequences)  # with a dynamic cache


def test_hooks_of_somebodys_own_are_called_at_every_step(caplog):
    family = SOME[0]
    model, x = model_of(family, "outer"), prompt(family)
    seen, record = [], Counted()
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    plain = generate(model, x, 5, **STATIC)
    calls = len(seen)
    with graphed(model, record=record), caplog.at_level("WARNING", "holimerge"):
        same(generate(model, x, 5, cache_implementation="static"), plain)
    assert (len(seen), record.recorded) == (2 * calls, 0)
    assert "hooks of your own watch this model" in caplog.text
    hook.remove()


def test_another_threads_call_knows_nothing_of_the_block():
    family = SOME[0]
    model, x = model_of(family, "outer"), prompt(family)
    plain, found = generate(model, x, 4), []
    with graphed(model, record=record_cpu):
        thread = threading.Thread(target=lambda: found.append(generate(model, x, 4)))  # with a dynamic cache
        thread.start()
        thread.join()
    assert torch.equal(found[0].sequences, plain.sequences)


def test_another_models_cache_keeps_its_room_while_steps_are_recorded():
    family = SOME[0]
    one, other, x = model_of(family, "outer"), model_of(family, "outer"), prompt(family)
    plain = rooms(generate(other, x, 3, cache_implementation="static", disable_compile=False))
    inside = []

    def ask(ids: Any, scores: Any) -> Any:
        inside.append(rooms(generate(other, x, 3, cache_implementation="static", disable_compile=False)))
        return scores

    with graphed(one, record=record_cpu):
        generate(one, x, 3, cache_implementation="static", logits_processor=LogitsProcessorList([ask]))
    assert inside == [plain] * len(inside)
    assert inside


def test_tensors_in_tuples_are_those_of_the_step():
    given = [{"a": (torch.tensor([float(i)]), {"b": torch.tensor([2.0 * i])})} for i in range(3)]
    held = graphs._map(torch.clone, given[0])
    for value in given:
        graphs._fill(held, value)
        assert (held["a"][0].item(), held["a"][1]["b"].item()) == (value["a"][0].item(), value["a"][1]["b"].item())


def test_threads_replay_their_own_steps():
    family = SOME[0]
    model = model_of(family, "inner")
    prompts = [prompt(family, seed=seed) for seed in range(3)]
    alone, found = [generate(model, x, 6, **STATIC) for x in prompts], [None] * 3

    def ask(i: int) -> None:
        found[i] = generate(model, prompts[i], 6, cache_implementation="static")

    with graphed(model, record=record_cpu):
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for ours, theirs in zip(found, alone, strict=True):
        same(ours, theirs)


def test_mistakes():
    family = SOME[0]
    model, x = model_of(family, "outer"), prompt(family)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match="one CUDA device; this one is on cpu"), graphed(model):
        pass
    with graphed(model, record=record_cpu):
        with pytest.raises(ValueError, match=r"a DynamicCache .* does not stay in place; pass cache_implementation="):
            generate(model, x, 3)
        with pytest.raises(ValueError, match="compile_config: inside `graphed` steps are recorded"):
            generate(model, x, 3, cache_implementation="static", compile_config=CompileConfig())
        with pytest.raises(ValueError, match=r"prefill_chunk_size=1: .* use larger chunks"):
            generate(model, x, 3, cache_implementation="static", prefill_chunk_size=1)
        head = model.lm_head.forward
        model.lm_head.forward = lambda hidden: head(hidden) * (1 if float(hidden.sum()) else 2)  # asks the device
        with pytest.raises(
            RuntimeError, match=r"LlavaOnevision.* cannot be recorded as a CUDA graph \(.*not permitted"
        ):
            generate(model, x, 4, cache_implementation="static")
        del model.lm_head.forward
        generate(model, x, 4, cache_implementation="static")
    assert model.__dict__.keys() - {"_previous_max_cache_length"} == before.keys() - {"_previous_max_cache_length"}


@pytest.mark.parametrize("family", LINEAR)
def test_linear_layers_are_refused_by_name(family):
    model = model_of(family, "outer")
    with graphed(model, record=record_cpu), pytest.raises(ValueError, match="LinearAttentionLayer"):
        generate(model, prompt(family), 4, cache_implementation="static")


# --- how large a static cache is -------------------------------------------------------------------------------------


def rooms(out: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in out.past_key_values.layers]


@pytest.mark.parametrize("family", [name for name in SOME if name in FAMILIES])
def test_a_static_cache_has_room_for_what_was_left(family):
    case = "inner" if TOYS[family].inner_layers else "outer"
    model, x = model_of(family, case), build(family, ragged(family))
    grown = generate(model, x, 6)
    kept = [layer.keys.shape[2] for layer in grown.past_key_values.layers]
    assert len(set(kept)) == (2 if case == "inner" else 1)
    assert rooms(generate(model, x, 6, **STATIC)) == kept
    with graphed(model, record=record_cpu):
        assert rooms(generate(model, x, 6, cache_implementation="static")) == kept


def test_a_cache_that_others_made_or_compile_for_keeps_its_size():
    family = SOME[0]
    model, x = model_of(family, "outer"), prompt(family)
    model.__dict__.pop("_previous_max_cache_length", None)
    whole = x["input_ids"].shape[1] + 5
    assert rooms(generate(model, x, 6, cache_implementation="static")) == [whole] * 4
    cache = StaticCache(config=model.config, max_cache_len=200)
    assert rooms(generate(model, x, 6, past_key_values=cache, disable_compile=True)) == [200] * 4


def test_a_small_cache_that_is_reset_has_its_room_again():
    family = SOME[0]
    model, x = model_of(family, "inner"), prompt(family)
    first = generate(model, x, 6, **STATIC)
    cache = first.past_key_values
    small = rooms(first)
    cache.reset()
    whole = generate(model, {"input_ids": x["input_ids"][:, :3].repeat(1, 5)}, 3, past_key_values=cache)
    assert set(rooms(whole)) == {x["input_ids"].shape[1] + 5}
    assert max(small) < min(rooms(whole))
