"""What the tests of generation share: the cases, one row of a batch on its own, and conversations over one cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from patching import generate, handle_of, logits, preset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from toys import FAMILIES, SOME, TOYS, Toy, build, make_model, make_video
from transformers import PreTrainedTokenizerFast, cache_utils

import holimerge
from holimerge.report import Selection

Inputs = dict[str, torch.Tensor]
Rows = list[list[Any]]
# Two ways to the same number in float32; what is wrong shows at 1e-2 and above.
CLOSE = {"atol": 1e-4, "rtol": 0.0}
# as long as the prompt; the rest are pixels and grids
IN_SEQUENCE = ("input_ids", "attention_mask", "mm_token_type_ids")


# ------------------------------------------------------------------------------------------------------------ cases

# What surrounds their decoders is another family's. The laws run on them all the same; these tests do so at night.
TWINS = ("glm46v", "glm4v_moe", "qwen2_vl", "qwen3_5_moe", "qwen3_vl_moe")
TESTED = [name for name in FAMILIES if name not in TWINS or os.environ.get("HOLIMERGE_ALL_FAMILIES")]


def every_case(broken: str = "", where: Callable[[Toy, bool], bool] = lambda toy, inner: True) -> Any:
    """SOME families by the outer reduction alone and with the inner merge; the others by what does the most of these.

    broken: why the cases that `where` names fail until the core is mended.
    """
    params = []
    for family in TESTED:
        most = bool(TOYS[family].inner_layers)
        for inner in sorted({False, most}) if family in SOME else [most]:
            wrong = bool(broken) and where(TOYS[family], inner)
            marks = [pytest.mark.xfail(strict=True, reason=broken)] if wrong else []
            params.append(pytest.param(family, inner, id=f"{family}-{'inner' if inner else 'outer'}", marks=marks))
    return pytest.mark.parametrize(("family", "inner"), params)


every_family = pytest.mark.parametrize("family", TESTED)
every_family_with_an_inner_merge = pytest.mark.parametrize("family", [f for f in TESTED if TOYS[f].inner_layers])


def configured(family: str, inner: bool, name: str = "holimerge-25") -> dict[str, Any]:
    """A preset for this family's toy: the inner merge at layer 2, or the first it may sit at, or none."""
    toy = TOYS[family]
    cfg = preset(name, inner) | toy.extra
    if inner and 2 not in toy.inner_layers:
        cfg["inner"] = {**cfg["inner"], "layer": toy.inner_layers[0]}
    return cfg


def patched(family: str, inner: bool, name: str = "holimerge-25", *, attn: str = "sdpa") -> Any:
    """A patched toy whose answers vary from token to token."""
    return holimerge.patch_model(make_model(family, attn=attn, gain=2.0), configured(family, inner, name))


def stock_does(family: str, mode: str) -> bool:
    """Whether the unpatched class can do it; what it cannot do, nobody asks of the patched one."""
    return mode not in getattr(TOYS[family], "stock_fails", {})


def skip_unless_stock_does(family: str, *modes: str) -> None:
    for mode in modes:
        if not stock_does(family, mode):
            pytest.skip(f"{mode}: {TOYS[family].stock_fails[mode]}")


def skip_if_recurrent(family: str, why: str) -> None:
    """For what a decoder cannot do whose layers keep a state: neither stock nor, where we refuse it, patched."""
    if TOYS[family].recurrent:
        pytest.skip(f"{family}: {why}")


def ragged(family: str) -> Rows:
    """Two prompts: one video and two, so that rows are padded and lose different numbers of tokens."""
    first, second = make_video(family, seed=1), make_video(family, seed=2)
    return [[5, first, 6, 7, 6, 7], [8, 9, second, 10, first, 11, 12]]


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of one letter a token, as many as the toys' vocabulary has."""
    vocabulary = {chr(32 + i) if i < 95 else "\u00e9": i for i in range(96)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


class _NoStream(contextlib.nullcontext):
    """Stands in for a CUDA stream."""

    def wait_stream(self, other: Any) -> None:
        pass


def exact_and_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantised cache that loses nothing, and an offloaded one that needs no GPU, so that both can be compared."""
    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    monkeypatch.setattr(torch, "Stream", _NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: _NoStream())


# -------------------------------------------------------------------------------------------- against recomputation


def sampled(model: Any, inputs: Inputs, tokens: int = 4, *, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": 2.0, "top_k": 0, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=tokens, **how, **kwargs)


def answer_of(out: Any, inputs: Inputs) -> torch.Tensor:
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def choices(model: Any) -> Selection:
    """What the last forward with a video chose: ask before the next one runs."""
    found: Selection = handle_of(model).selection
    return found


def from_scratch(
    model: Any, family: str, inputs: Inputs, answers: torch.Tensor, selection: Selection
) -> list[torch.Tensor]:
    """[rows, vocabulary] of every step: one forward without a cache, in which no token sees a later one."""
    before = inputs["input_ids"].shape[1]
    with handle_of(model).replaying(selection):
        found = logits(model, TOYS[family].extended(inputs, answers[:, :-1]), use_cache=False)
    return list(found[:, before - 1 :].unbind(1))


def close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """Two lists of logits, step by step."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def check(model: Any, family: str, rows: Rows, out: Any) -> list[torch.Tensor]:
    """The logits of every step equal those from scratch, which are returned. rows: one for every sequence in `out`."""
    x = build(family, rows)
    steps = from_scratch(model, family, x, answer_of(out, x), choices(model))
    close(out.logits, steps)
    return steps


@contextlib.contextmanager
def refused(model: Any, family: str, match: str) -> Iterator[None]:
    """Inside the block something is refused with these words, before tower or language model ran."""
    toy, calls = TOYS[family], list[str]()
    places = {"vision": toy.modules(model)["vision"], "language model": toy.language_model(model)}
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, m in places.items()]
    try:
        with pytest.raises(ValueError, match=match):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not calls


# ---------------------------------------------------------------------------------------------------- conversations


def of_rows(selection: Selection, rows: Rows) -> list[Selection]:
    """The choices of each row."""
    found, video = [], 0
    for i, row in enumerate(rows):
        count = sum(isinstance(part, torch.Tensor) for part in row)
        found.append(selection.of(list(range(video, video + count)), [i]))
        video += count
    return found


class Positions:
    """The positions the language model was called with, whoever counted them; the caller's length, not the shortened.

    Stock models number later turns in ways of their own. Taken down, the same conversation can be run from scratch.
    """

    def __init__(self, model: Any, family: str) -> None:
        self.all: Any = None
        self.listening = False
        # before the patch's own hook, which shortens them
        TOYS[family].language_model(model).register_forward_pre_hook(self._look, with_kwargs=True, prepend=True)

    def _look(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if not self.listening:
            return
        embeds, cache, given = (kwargs.get(k) for k in ("inputs_embeds", "past_key_values", "position_ids"))
        seen = 0 if cache is None else int(cache.get_seq_length())
        if given is None:
            given = torch.arange(seen, seen + embeds.shape[1])[None]
        if given.ndim == 3:  # a fourth axis tells packed sequences apart; one alone stands for three
            given = given[-3:].expand(3, -1, -1)
        given = given.expand(*given.shape[:-2], *embeds.shape[:2])
        self.all = given if seen == 0 else torch.cat([self.all[..., :seen], given], -1)


class Talk:
    """A conversation over one cache, and the same from scratch with the choices of its turns."""

    def __init__(self, model: Any, family: str, cache: Any = None) -> None:
        if TOYS[family].one_video_a_row:
            pytest.skip(f"{family}: a recomputation would make one video of all turns' frames; see test_laws")
        self.model, self.family, self.cache = model, family, cache
        self.positions = Positions(model, family)
        self.said: Inputs = {}
        self.parts: Rows = []
        self.choices: list[list[Selection]] = []

    def say(self, rows: Rows, tokens: int = 3, *, how: str = "all ids", ended: int | None = None, **kwargs: Any) -> Any:
        """One turn of text and videos, and its answer; no answer where `tokens` is 0.

        how: "all ids" of the conversation, "new ids" alone (the mask tells of all), or all with their "positions".
        ended: a token that ends a row's answer; what follows it is padding.
        """
        new = build(self.family, rows)
        self._append({k: new[k] for k in IN_SEQUENCE if k in new})
        self.parts = [old + row for old, row in zip(self.parts or [[]] * len(rows), rows, strict=True)]
        inputs = dict(self.said)
        seen = 0 if self.cache is None else int(self.cache.get_seq_length())
        if how == "new ids":
            inputs |= {k: v[:, seen:] for k, v in self.said.items() if k != "attention_mask"}
        elif how == "positions":
            grids = {k: v for k, v in self._pixels().items() if "pixel" not in k}
            ids = self.said["input_ids"]
            inputs["position_ids"] = self.model._prepare_position_ids_for_generation(ids, {**inputs, **grids})
        inputs |= {k: v for k, v in new.items() if k not in IN_SEQUENCE}
        self.positions.listening = True
        if tokens:
            if ended is not None:
                kwargs["eos_token_id"] = ended
            out = generate(self.model, inputs, tokens, past_key_values=self.cache, **kwargs)
        else:
            with torch.no_grad():
                out = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.positions.listening = False
        self.cache = out.past_key_values
        if any(isinstance(part, torch.Tensor) for row in rows for part in row):
            self.choices.append(of_rows(handle_of(self.model).selection, rows))
        if tokens:
            self.answer = out.sequences[:, inputs["input_ids"].shape[1] :]
            real = torch.ones_like(self.answer)
            if ended is not None:
                real = ((self.answer == ended).long().cumsum(1) - (self.answer == ended).long() == 0).long()
            self._append({"input_ids": self.answer, "attention_mask": real, "mm_token_type_ids": real * 0})
        return out

    def fork(self, times: int, keep: list[int]) -> None:
        """Go on with several copies of the one row there is."""
        self.cache.batch_repeat_interleave(times)
        self.cache.batch_select_indices(torch.tensor(keep))
        self.said = {k: v.expand(len(keep), -1) for k, v in self.said.items()}
        self.positions.all = self.positions.all.repeat_interleave(len(keep), -2)
        self.parts, self.choices = self.parts * len(keep), [turn * len(keep) for turn in self.choices]

    def _append(self, more: Inputs) -> None:
        names = [k for k in IN_SEQUENCE if k in (self.said or more)]
        self.said = {k: torch.cat([self.said[k], more[k]], 1) if self.said else more[k] for k in names}

    def _pixels(self) -> Inputs:
        seen = build(self.family, [[p for p in row if not isinstance(p, int)] for row in self.parts])
        return {k: v for k, v in seen.items() if k not in IN_SEQUENCE}

    def selection(self) -> Selection:
        """All turns' choices: each merged its own video tokens, which stand behind one another in a prompt of all."""
        outer, inner = [], []
        for turns in zip(*self.choices, strict=True):
            outer += [record for turn in turns for record in turn.outer]
            owners = [turn.inner[0] for turn in turns if turn.inner is not None]
            starts = torch.tensor([0, *(len(o) for o in owners)]).cumsum(0)
            inner += [torch.cat([o + s for o, s in zip(owners, starts, strict=False)])] if owners else []
        return Selection(outer, inner or None)

    def from_scratch(self) -> list[torch.Tensor]:
        """Logits of the last answer's steps, without a cache."""
        length, count = self.said["input_ids"].shape[1] - 1, self.answer.shape[1]
        inputs = {k: v[:, :length] for k, v in self.said.items()} | self._pixels()
        inputs["position_ids"] = self.positions.all[..., :length]
        with handle_of(self.model).replaying(self.selection()):
            found = logits(self.model, inputs, use_cache=False)
        return list(found[:, -count:].unbind(1))

    def check(self, out: Any) -> None:
        """The answer that was just given is that of the same conversation from scratch."""
        close(out.logits, self.from_scratch())
