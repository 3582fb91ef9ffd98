"""What a caller sees of a generation and of a forward: streams, stops, processors, states, logits, losses."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
from generating import (
    CLOSE,
    answer_of,
    check,
    choices,
    close,
    configured,
    every_case,
    from_scratch,
    letters,
    patched,
    ragged,
    skip_unless_stock_does,
)
from patching import generate, handle_of, logits
from toys import PAD, TOYS, build, make_model, make_video, prompt
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.generation import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

import holimerge


class Puts(BaseStreamer):
    """Everything a streamer is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


# ------------------------------------------------------------------------------------------------------------ streams


@every_case()
@pytest.mark.parametrize("drafts", [False, True], ids=["greedy", "drafts"])
def test_a_streamer_gets_the_whole_prompt_once_and_then_every_token(family, inner, drafts):
    if drafts:
        skip_unless_stock_does(family, "prompt lookup")
    model, streamer = patched(family, inner), Puts()
    x = build(family, [[20, 21, 5, make_video(family), 6, 20, 21]])
    out = generate(model, x, 6, streamer=streamer, **({"prompt_lookup_num_tokens": 2} if drafts else {}))
    assert streamer.given[0] == x["input_ids"][0].tolist()
    assert [token for tokens in streamer.given[1:] for token in tokens] == answer_of(out, x)[0].tolist()
    assert streamer.ended == 1


@every_case()
def test_text_is_streamed_as_it_is_returned(family, inner, capsys):
    model, x, tokenizer = patched(family, inner), prompt(family), letters()
    for skip_prompt in (False, True):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=60)
        worker = threading.Thread(target=generate, args=(model, x, 4), kwargs={"streamer": streamer})
        worker.start()
        read = "".join(streamer)
        worker.join()
        out = generate(model, x, 4, streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt))
        shown = answer_of(out, x) if skip_prompt else out.sequences
        assert read == tokenizer.decode(shown[0])
        assert capsys.readouterr().out == read + "\n"


# -------------------------------------------------------------------------------------------------------------- stops


class Watch(StoppingCriteria):
    """Stops when `tokens` have been written after `start`; takes down what it is shown."""

    def __init__(self, start: int, tokens: int) -> None:
        self.start, self.tokens = start, tokens
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.seen.append(input_ids)
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.start + self.tokens)


@every_case()
def test_stopping_criteria_are_shown_the_full_sequences(family, inner):
    model, x = patched(family, inner), build(family, ragged(family))
    length = x["input_ids"].shape[1]
    watch = Watch(length, 3)
    out = generate(model, x, 9, stopping_criteria=[watch])
    assert out.sequences.shape[1] == length + 3
    assert [ids.shape[1] for ids in watch.seen] == [length + 1, length + 2, length + 3]
    assert all(torch.equal(ids, out.sequences[:, : ids.shape[1]]) for ids in watch.seen)


@every_case()
def test_generation_stops_at_a_string_and_in_time(family, inner):
    model, x, tokenizer = patched(family, inner), prompt(family), letters()
    written = answer_of(generate(model, x, 8), x)[0]
    stop = tokenizer.decode(written[2:4])
    end = next(n for n in range(1, 9) if tokenizer.decode(torch.cat([x["input_ids"][0], written[:n]])).endswith(stop))
    assert torch.equal(answer_of(generate(model, x, 8, stop_strings=[stop], tokenizer=tokenizer), x)[0], written[:end])
    assert answer_of(generate(model, x, 8, max_time=1e-9), x).shape[1] == 1


@every_case()
def test_a_row_that_ended_is_padded_and_the_other_goes_on_right(family, inner):
    model, rows = patched(family, inner), ragged(family)
    x = build(family, rows)
    first, second = answer_of(generate(model, x), x).tolist()
    end = next((token for token in first[:3] if token not in second), None)
    if end is None:
        pytest.skip("this toy's two answers begin with the same tokens")
    out = generate(model, x, eos_token_id=end)
    cut = first.index(end) + 1
    assert answer_of(out, x).tolist() == [first[:cut] + [PAD] * (5 - cut), second]
    check(model, family, rows, out)  # the ended row goes on in stock too, over its padding
    held_off = generate(model, x, eos_token_id=end, min_new_tokens=5)
    assert end not in answer_of(held_off, x)[:, :-1]


# --------------------------------------------------------------------------------------------------------- processors


class Notes(LogitsProcessor):
    """Changes nothing; takes down the ids it is shown."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids)
        return scores


@every_case()
def test_processors_are_shown_the_full_prompt(family, inner):
    rows = [[20, 21, 5, make_video(family), 6, 7]]
    model, x, notes = patched(family, inner), build(family, rows), Notes()
    penalties = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 1}
    out = generate(model, x, 4, logits_processor=[notes], output_scores=True, **penalties)
    length = x["input_ids"].shape[1]
    by_hand = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(1)])
    by_hand.append(SuppressTokensLogitsProcessor(model.generation_config.suppress_tokens))
    assert len(notes.seen) == 4
    for t, fresh in enumerate(check(model, family, rows, out)):
        ids = out.sequences[:, : length + t]
        assert torch.equal(notes.seen[t], ids)
        torch.testing.assert_close(out.scores[t], by_hand(ids, fresh.clone()), **CLOSE)


@every_case()
def test_words_are_banned_and_allowed_by_what_stands_before_them(family, inner):
    model, x = patched(family, inner), prompt(family)
    last, free = int(x["input_ids"][0, -1]), int(answer_of(generate(model, x, 1), x))
    banned = answer_of(generate(model, x, 3, bad_words_ids=[[last, free]]), x)[0].tolist()
    assert banned[0] != free  # its first half is the prompt's last token
    before: list[int] = []

    def allowed(_row: int, ids: torch.Tensor) -> list[int]:
        before.append(len(ids))
        return [30, 31]

    only = answer_of(generate(model, x, 3, prefix_allowed_tokens_fn=allowed), x)
    length = x["input_ids"].shape[1]
    assert before == [length, length + 1, length + 2]
    assert set(only[0].tolist()) <= {30, 31}


# ------------------------------------------------------------------------------------------ hidden states, attentions


def lengths_by_layer(model: Any, family: str, inner: bool, length: int) -> list[int]:
    """What enters each decoder layer of the one row that ran last."""
    videos = holimerge.last_report(model).videos
    newlines = sum(v.placement.placeholders - v.features - v.separators for v in videos)  # those that went
    entering = length - newlines - sum(v.features - v.entering for v in videos)
    depth = len(TOYS[family].language_model(model).layers)
    if not inner:
        return [entering] * depth
    k = configured(family, inner)["inner"]["layer"]
    return [entering] * k + [entering - sum(v.entering - v.after_inner for v in videos)] * (depth - k)


@every_case()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_hidden_states_have_the_lengths_of_what_entered(family, inner, attn):
    """One more than layers: what entered each, and what left the last; an answer's token adds one to each."""
    model, x = patched(family, inner, attn=attn), prompt(family)
    with torch.no_grad():
        out = model(**x, output_hidden_states=True)
    lengths = lengths_by_layer(model, family, inner, x["input_ids"].shape[1])
    assert lengths[0] < x["input_ids"].shape[1]
    assert (lengths[-1] < lengths[0]) == inner
    # the state after layer k - 1 is what enters layer k, before the merge there
    expected = [lengths[0], *lengths]
    assert [h.shape[1] for h in out.hidden_states] == expected
    torch.testing.assert_close(model.get_output_embeddings()(out.hidden_states[-1][:, -1]), out.logits[:, -1], **CLOSE)
    steps = generate(model, x, 3, output_hidden_states=True).hidden_states
    assert [[h.shape[1] for h in step] for step in steps] == [expected, *[[1] * len(expected)] * 2]
    close([h[:, -1] for h in steps[0]], [h[:, -1] for h in out.hidden_states])


@every_case()
def test_attentions_have_the_lengths_of_what_entered(family, inner):
    model, x = patched(family, inner, attn="eager"), prompt(family)
    with torch.no_grad():
        out = model(**x, output_attentions=True)
    lengths = lengths_by_layer(model, family, inner, x["input_ids"].shape[1])
    types = getattr(TOYS[family].language_model(model).config, "layer_types", None) or []
    lengths = [n for n, kind in zip(lengths, types or ["full_attention"] * len(lengths), strict=True) if "full" in kind]
    assert [tuple(a.shape[-2:]) for a in out.attentions] == [(n, n) for n in lengths]
    for weights in out.attentions:
        assert (weights.triu(1) == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    steps = generate(model, x, 3, output_attentions=True).attentions
    shapes = [[tuple(a.shape[-2:]) for a in step] for step in steps]
    assert shapes == [[(n, n) for n in lengths], [(1, n + 1) for n in lengths], [(1, n + 2) for n in lengths]]


@every_case()
def test_where_stock_has_no_attentions_to_give_nor_have_we(family, inner):
    model, x = make_model(family), prompt(family)
    with torch.no_grad():
        stock = model(**x, output_attentions=True).attentions
        ours = holimerge.patch_model(model, configured(family, inner))(**x, output_attentions=True).attentions
    assert [a is None for a in ours] == [a is None for a in stock]
    assert len(generate(model, x, 2, output_attentions=True).attentions) == 2


# ---------------------------------------------------------------------------------------------------- logits and loss


@every_case()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_logits_to_keep_are_those_of_all(family, inner, side):
    model, x = patched(family, inner), build(family, ragged(family), side=side)
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        pytest.skip(f"{family}: the stock class gives all logits, whatever is asked for")
    every, length = logits(model, x), x["input_ids"].shape[1]
    assert every.shape[:2] == x["input_ids"].shape
    for keep in (1, 7, torch.tensor([2, length - 4, length - 1])):
        some = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
        torch.testing.assert_close(logits(model, x, logits_to_keep=keep), every[:, some], **CLOSE)


@every_case()
def test_the_loss_of_an_answer_is_that_of_generating_it(family, inner):
    model, rows = patched(family, inner), ragged(family)
    x, answer = build(family, rows), torch.tensor([[30, 31, 32], [33, 34, 35]])
    generate(model, x, 1)
    asked = choices(model)
    steps = torch.stack(from_scratch(model, family, x, answer, asked), 1)
    given = TOYS[family].extended(x, answer)
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, -3:] = answer
    with torch.no_grad():
        out = model(**given, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(steps.flatten(0, 1), answer.flatten()))
    torch.testing.assert_close(out.logits[:, -4:-1], steps, **CLOSE)
    for a, b in zip(asked.inner or [], choices(model).inner or [], strict=True):
        assert torch.equal(a, b)


@every_case()
def test_gradient_checkpointing_changes_nothing_in_evaluation(family, inner):
    model, x = patched(family, inner), build(family, ragged(family))
    plain, written = logits(model, x), generate(model, x, 3)
    model.gradient_checkpointing_enable()
    assert torch.equal(logits(model, x), plain)
    assert torch.equal(generate(model, x, 3).sequences, written.sequences)
    assert handle_of(model).report.videos
