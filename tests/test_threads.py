"""Threads: what one forward of a patched model knows, no other thread's forward sees."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from around import Said, assert_same, most, said, settings, videos
from patching import handle_of, logits
from toys import SOME, TOYS, make_model, prompt

import holimerge

ROUNDS = 6


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns every 10 microseconds instead of every 5 ms, so that they do meet inside a forward."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def meet(family: str, models: list[Any]) -> None:
    """From now on two threads wait for each other where their forwards enter the decoder, and in its last layer."""
    barrier = threading.Barrier(2, timeout=20)

    def wait(*_: Any) -> None:
        barrier.wait()

    for model in {id(m): m for m in models}.values():
        decoder = TOYS[family].language_model(model)
        for module in (decoder, decoder.layers[-1]):
            module.register_forward_pre_hook(wait, prepend=True)
        TOYS[family].modules(model)["vision"].register_forward_pre_hook(lambda *_: time.sleep(1e-3))


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_two_threads_answer_as_one_after_the_other(family, shared):
    outer, inner = settings(family)["outer"], most(family)
    first = holimerge.patch_model(make_model(family), inner)
    other = {**outer, "budget": {"retain": 0.5}}
    models = [first, first if shared else holimerge.patch_model(make_model(family, seed=1), other)]
    prompts = [prompt(family, seed=s, frames=f) for s, f in ((0, 6), (3, 4))]
    # positions of three axes are state of the stock model between its steps: threads cannot share it for decoding
    decodes = not (shared and TOYS[family].mrope)

    def run(i: int) -> tuple[Said, Any]:
        return said(models[i], prompts[i], decodes=decodes), handle_of(models[i]).selection

    expected = [run(i) for i in range(2)]
    assert expected[0][0].videos != expected[1][0].videos
    meet(family, models)
    with ThreadPoolExecutor(2) as pool:
        for i, (answer, selection) in enumerate(pool.map(run, [0, 1] * ROUNDS)):
            assert_same(answer, expected[i % 2][0])
            for ours, alone in zip(selection.outer, expected[i % 2][1].outer, strict=True):
                assert torch.equal(ours.assignment, alone.assignment)
            for ours, alone in zip(selection.inner or [], expected[i % 2][1].inner or [], strict=True):
                assert torch.equal(ours, alone)


def test_a_replay_is_seen_by_its_own_thread_alone(family):
    model = holimerge.patch_model(make_model(family), most(family))
    mine, other = prompt(family), prompt(family, seed=5)
    own = logits(model, mine), videos(model)
    logits(model, other)
    foreign = handle_of(model).selection
    with handle_of(model).replaying(foreign):
        replayed = logits(model, mine), videos(model)
    assert not torch.equal(own[0], replayed[0])
    meet(family, [model])

    def run(replays: bool) -> list[tuple[torch.Tensor, Any]]:
        if not replays:
            return [(logits(model, mine), videos(model)) for _ in range(ROUNDS)]
        with handle_of(model).replaying(foreign):
            return [(logits(model, mine), videos(model)) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(2) as pool:
        for answers, expected in zip(pool.map(run, (True, False)), (replayed, own), strict=True):
            for answer, told in answers:
                assert torch.equal(answer, expected[0])
                assert told == expected[1]


def test_reports_and_selections_are_the_thread_s_own(family):
    """Also those of a model patched in another thread; who only watches is told of the latest forward."""
    prompts = [prompt(family, frames=f) for f in (4, 8)]
    made = threading.Barrier(2, timeout=20)
    models: list[Any] = []

    def run(i: int) -> list[list[dict[str, Any]]]:
        if i == 0:
            models.append(holimerge.patch_model(make_model(family), most(family)))
        made.wait()
        told = []
        for _ in range(ROUNDS):
            logits(models[0], prompts[i])
            made.wait()  # both have run
            told.append(videos(models[0]))
            assert [r.total for r in handle_of(models[0]).selection.outer] == [v["features"] for v in told[-1]]
            made.wait()
        return told

    with ThreadPoolExecutor(2) as pool:
        few, many = pool.map(run, (0, 1))
    assert all(told == few[0] for told in few)
    assert all(told == many[0] for told in many)
    assert few[0] != many[0]
    with pytest.raises(RuntimeError, match="in this thread"):
        _ = handle_of(models[0]).selection
    assert videos(models[0]) in (few[0], many[0])


def test_a_thread_may_end_its_forward_while_another_is_inside_the_tower(family):
    """Hooks that live for one call come and go on shared modules: another thread must not trip over them."""
    x = prompt(family)
    model = holimerge.patch_model(make_model(family), most(family))
    patched = logits(model, x)
    who, first_inside, second_inside, first_done = threading.local(), *(threading.Event() for _ in range(3))

    def inside(*_: Any) -> None:
        if who.name == "first" and not first_inside.is_set():
            first_inside.set()
            second_inside.wait(20)
        elif who.name == "second" and not second_inside.is_set():
            second_inside.set()
            first_done.wait(20)

    TOYS[family].modules(model)["projector"].register_forward_pre_hook(inside, prepend=True)

    def run(name: str) -> torch.Tensor:
        who.name = name
        if name == "second":
            first_inside.wait(20)
        try:
            return logits(model, x)
        finally:
            if name == "first":
                first_done.set()

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run, ("first", "second")):
            assert torch.equal(result, patched)
