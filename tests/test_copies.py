"""Copies of a patched model: deep copies are patched models of their own, saved ones are plain, pickles are refused."""

from __future__ import annotations

import copy
import io
import multiprocessing.reduction
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from around import assert_same, most, said, settings, stock_answers, videos
from fingerprint import fingerprint, hook_count
from patching import generate, handle_of, logits
from toys import SOME, TOYS, make_model, prompt

import holimerge


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def patched(family: str) -> Any:
    return holimerge.patch_model(make_model(family), most(family))


# ------------------------------------------------------------------------------------------------ deep copies


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
def test_a_deep_copy_is_patched_as_the_original(family, patched, ran):
    x = prompt(family)
    if ran:
        said(patched, x)
    twin = copy.deepcopy(patched)
    assert hook_count(twin) == hook_count(patched)
    expected = said(patched, x)
    assert_same(said(twin, x), expected)


def test_the_hooks_of_a_deep_copy_point_to_the_copy(patched):
    twin = copy.deepcopy(patched)
    handle, own = handle_of(twin), {id(module) for module in twin.modules()}
    assert handle is not handle_of(patched)
    assert handle.model is twin
    assert {id(handle.core), id(handle.lm)} <= own
    hooks = [h for m in twin.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    of_ours = [h.__self__ for h in hooks if type(getattr(h, "__self__", None)).__module__.startswith("holimerge")]
    assert of_ours
    assert all(owner is handle or owner.handle is handle for owner in of_ours)
    for module in twin.modules():
        for replaced in vars(module).values():
            if type(replaced).__module__ == "holimerge.handle" and hasattr(replaced, "original"):
                assert id(replaced.original.__self__) in own


def test_a_deep_copy_and_its_original_go_their_own_ways(family, patched):
    x, other = prompt(family), prompt(family, frames=4, seed=3)
    stock, before = stock_answers(family), said(patched, x)
    twin = copy.deepcopy(patched)
    # reports
    logits(twin, other)
    told = videos(twin)
    assert videos(patched) == before.videos != told
    logits(patched, x)
    assert videos(twin) == told
    # weights
    with torch.no_grad():
        twin.get_input_embeddings().weight.mul_(2)
    assert not torch.equal(logits(twin, x), before.logits)
    assert_same(said(patched, x), before)
    with torch.no_grad():
        twin.get_input_embeddings().weight.div_(2)
    # configurations
    outer = settings(family)["outer"]
    expected = said(holimerge.patch_model(make_model(family), {**outer, "budget": {"retain": 0.5}}), x)
    assert_same(said(holimerge.patch_model(twin, {**outer, "budget": {"retain": 0.5}}), x), expected)
    assert_same(said(patched, x), before)
    # undoing one of them, and then the other
    holimerge.unpatch_model(twin)
    assert_same(said(twin, x), stock)
    assert_same(said(patched, x), before)
    twin = copy.deepcopy(patched)
    holimerge.unpatch_model(patched)
    assert_same(said(patched, x), stock)
    assert_same(said(twin, x), before)
    assert_same(said(holimerge.unpatch_model(twin), x), stock)


def test_a_deep_copy_that_is_unpatched_looks_like_one_of_the_plain_model(family):
    model = make_model(family)
    logits(model, prompt(family))  # transformers sets hooks of its own then
    plain = fingerprint(model)
    twin = holimerge.unpatch_model(copy.deepcopy(holimerge.patch_model(model, most(family))))
    ours = fingerprint(twin)
    for look in (plain, ours):  # bound methods and closures of another instance
        for module in look["modules"].values():
            module["callables"] = sorted(module["callables"])
            for key in [k for k in module if k.endswith("_hooks")]:
                module[key] = [flags for _, *flags in module[key]]
    assert ours == plain


# ------------------------------------------------------------------------------------------------ on disk


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_what_a_patched_model_saves_is_byte_for_byte_the_plain_model(family, patched, shards, tmp_path):
    x = prompt(family)
    generate(patched, x, 2)
    patched.save_pretrained(tmp_path / "patched", **shards)
    make_model(family).save_pretrained(tmp_path / "plain", **shards)

    def contents(folder: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}

    assert contents("patched") == contents("plain")
    assert len(contents("patched")) > (3 if shards else 2)
    again = type(patched).from_pretrained(tmp_path / "patched").eval()
    assert videos(again) == []
    assert torch.equal(logits(again, x), stock_answers(family).logits)
    assert torch.equal(logits(holimerge.patch_model(again, most(family)), x), logits(patched, x))


def test_a_patched_model_s_state_is_the_plain_one_and_can_be_loaded_while_patched(family, patched):
    x, plain, other = prompt(family), make_model(family), make_model(family, seed=1)
    state = patched.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), plain.state_dict().values(), strict=True))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert plain.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys == []
    patched.load_state_dict(other.state_dict())
    assert torch.equal(logits(patched, x), logits(holimerge.patch_model(other, most(family)), x))


PICKLES: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "another process": multiprocessing.reduction.ForkingPickler.dumps,
}


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("how", PICKLES)
def test_a_patched_model_is_not_pickled_and_the_error_tells_the_way_out(family, patched, how, ran):
    x = prompt(family)
    expected = logits(patched, x) if ran else None
    with pytest.raises(TypeError, match=r"unpatch_model.*save_pretrained"):
        PICKLES[how](patched)
    assert expected is None or torch.equal(logits(patched, x), expected)


def test_an_unpatched_model_is_pickled_as_the_plain_one(family, patched, tmp_path: Path):
    torch.save(holimerge.unpatch_model(patched), tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert b"holimerge.handle" not in (tmp_path / "model.pt").read_bytes()
    assert_same(said(again, prompt(family)), stock_answers(family))
    assert TOYS[family].language_model(again) is not TOYS[family].language_model(patched)
