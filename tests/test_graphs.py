"""Recorded decoding steps give, bit for bit, what the same steps give one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generating import TESTED, configured, ragged
from patching import assert_steps_close, generate
from recording import record_cpu
from toys import SOME, TOYS, build, make_model, prompt

import holimerge
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
