"""Hostile inputs: each gives a right result or a clear error, and leaves the model as it was.

A failing case is printed as it can be pasted into ALWAYS. With HOLIMERGE_CASES (`make nightly`) so many are drawn at
random, over all families; without it a few hundred, the same each time.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hostile import CALLS, FAULTS, LOOKS, PICTURE, POISONS, Case, Clip, frames_of, inputs
from hostile_calls import call
from hostile_draws import cases, examples, fitted, impossible, level, options
from hostile_laws import check, counts, left_as_it_was, record_laws
from hypothesis import given
from hypothesis import strategies as st
from patching import handle_of
from test_holitom import KINDS, check_agreement, make_video
from torch import Tensor
from toys import SOME

import holimerge
from holimerge import list_methods, load_config
from holimerge.methods.holitom import HolitomOptions
from holimerge.registry import method_module
from holimerge.tokens import Target, VideoTokens

CASES = int(os.environ.get("HOLIMERGE_CASES") or 120)
SHARES = {"": 0.66, "poison": 0.12, "fault": 0.22}  # of cases by what is badly wrong in them
REDUCING = [name for name in list_methods() if method_module(name).METHOD.reduce is not None]


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# ------------------------------------------------------------------------------------------------------- any case


@pytest.mark.parametrize("trouble", SHARES)
def test_every_case_is_right_or_clearly_refused(family: str, trouble: str, record_property: Any) -> None:
    number = math.ceil(SHARES[trouble] * CASES / len(SOME))
    seen: Counter[str] = Counter()

    @examples(number, f"{family} {trouble}")
    @given(case=cases(family, trouble))
    def one(case: Case) -> None:
        seen[check(family, case)] += 1

    one()
    record_property("cases", seen.total())
    print(f"\n{family} {trouble}: {dict(seen)}")
    assert seen.total() >= number
    assert trouble or seen["right"] > seen.total() / 3  # or the laws are hardly tried


# ----------------------------------------------------------------------------------------------------- named cases

PRESET: dict[str, Any] = {"base": "holimerge-25", "inner": {"layer": 3}}
OUTER = {**PRESET, "inner": None}
SEGMENTS = {"order": "segment", "positions": "contiguous", "similarity": 0.5}
LEVEL = "rows of one length that lose unlike numbers"
TWO_VIDEOS = (2, Clip(), 2, Clip(seed=1), 1)
ALWAYS = {
    **{f"{look} pixels": Case(PRESET, ((2, Clip(look=look), 2), (3,)), CALLS[i % 2]) for i, look in enumerate(POISONS)},
    **{f"fault {fault}": Case(PRESET, (TWO_VIDEOS, (3,)), CALLS[i % 2], fault=fault) for i, fault in enumerate(FAULTS)},
    "huge pixels": Case(PRESET, ((2, Clip(look="huge"), 2), (3,))),
    "every look": Case(PRESET, tuple((1, *(Clip(3, look), Clip(3, look)), 1) for look in LOOKS if look != "huge")),
    "one token": Case({**PRESET, "budget": {"tokens": 1}}, ((2, Clip(3), 2),), "generate"),
    "all tokens": Case({**PRESET, "budget": {"retain": 1.0}}, ((2, Clip(3), 2),), "generate"),
    "all FLOPs": Case({**OUTER, "budget": {"flops": 1.0}}, ((2, Clip(3), 2),), "generate"),
    "no FLOPs": Case({**PRESET, "budget": {"flops": 0.001}}, ((2, Clip(3), 2),), "generate"),
    "nothing but a video": Case(PRESET, ((Clip(3),),), "generate"),
    "nothing after its placeholders": Case(PRESET, ((4, Clip(3)),), "generate", bare=True),
    "the video first": Case(PRESET, ((Clip(3), 4), (Clip(3, seed=1), 9)), "generate"),
    "the video first, one token": Case({**OUTER, "budget": {"tokens": 1}}, ((Clip(), 2), (6, Clip(seed=1), 6))),
    "the video last": Case(PRESET, ((4, Clip(3)), (9, Clip(3, seed=1))), side="right"),
    "videos side by side": Case(PRESET, ((1, Clip(), Clip(seed=1), Clip(seed=2), 1), (3,)), "generate"),
    "a row of nothing": Case(PRESET, ((), (2, Clip(), 2))),
    "no video": Case(PRESET, ((2,), (5,)), "generate"),
    "an image": Case(PRESET, ((2, PICTURE, 1, Clip(), PICTURE, 2), (2, PICTURE, 1)), "generate"),
    "one step": Case(PRESET, ((2, Clip(1), 2),), "generate"),
    LEVEL: Case(PRESET, ((2, Clip(3), 2), (9,), (1, Clip(3), 1, Clip(3, seed=1))), "generate"),
    "segment order": Case({**PRESET, "outer": SEGMENTS}, ((2, Clip(6), 2), (9,))),
    "original positions": Case({**OUTER, "outer": {**SEGMENTS, "positions": "original"}}, ((2, Clip(6), 2), (9,))),
    "equal tokens alone": Case({**OUTER, "outer": {"similarity": 1.0}}, ((2, Clip(6, "identical"), 2),)),
    "no mask": Case(PRESET, ((2, Clip(3), 2), (9,)), "generate", mask="missing"),
    "a bool mask": Case(PRESET, ((2, Clip(3), 2), (9,)), side="right", mask="bool"),
    "float16": Case(PRESET, ((2, Clip(3), 2), (3, Clip(3), 9)), dtype="float16", grad=True),
    "bfloat16": Case(PRESET, ((2, Clip(3), 2), (3, Clip(3), 9)), "generate", dtype="bfloat16", use_cache=True),
    "no cache": Case(OUTER, ((2, Clip(3), 2), (3, Clip(3), 9)), "generate", use_cache=False),
    "no cache, inner": Case(PRESET, ((2, Clip(3), 2),), "generate", use_cache=False),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_these_are_right_or_clearly_refused(family: str, name: str, record_property: Any) -> None:
    case = fitted(family, ALWAYS[name])
    if name == LEVEL:
        case = replace(case, rows=tuple(level(family, list(case.rows))))
    if why := impossible(family, case):
        pytest.skip(why)
    verdict = check(family, case)
    record_property("cases", 1)
    if case.poisoned:
        # VideoLLaMA3's processor drops tokens by comparing pixels, which is refused before they are looked at
        assert verdict in ("refused: not finite", "refused: video_compression_mask")
    elif name == "no FLOPs":
        assert verdict in (r"refused: budget\.flops: .* leaves ", "refused: no FLOPs model")
    elif name == "all FLOPs":
        assert verdict in ("right", "refused: no FLOPs model")
    elif name == "no cache, inner":
        assert verdict == "refused: use_cache=False"
    elif case.fault is None and not case.huge and name not in ("a row of nothing", "every look"):
        assert verdict in ("right", "refused: video_compression_mask")


THOUSAND = {
    "scene": {**PRESET, "base": "holimerge-10"},
    "identical": {**PRESET, "base": "holimerge-10", "budget": {"tokens": 700}},
    "noise": {**PRESET, "base": "holitom-10", "chunk_frames": 64},
}


@pytest.mark.parametrize("look", THOUSAND if "HOLIMERGE_CASES" in os.environ else ["scene"])
def test_a_thousand_frames_take_bounded_time_and_memory(family: str, look: str) -> None:
    case = fitted(family, Case(THOUSAND[look], ((2, Clip(1024 // frames_of(family, Clip(1)), look, side=1), 2),)))
    if why := impossible(family, case):
        pytest.skip(why)
    x = inputs(family, case)
    with left_as_it_was(family, case) as model, holimerge.merging(model, case.config):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        ours = call(model, family, x, case)
        assert time.process_time() - start < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes
        assert ours.error is None, ours.error
        assert all(step.isfinite().all() for step in ours.logits)
        counts(family, case, x, handle_of(model).config, holimerge.last_report(model))


# ----------------------------------------------------------------------------------------- the maths under them


@st.composite
def features(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """[T, N, D] of any float dtype and scores [T, N], finite, with ties, zeros and extreme magnitudes."""
    shape = draw(st.sampled_from([1, 2, 3, 9, 40])), draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 8]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if draw(st.booleans()):  # frames that repeat
        x = x[torch.randint(0, min(2, shape[0]), shape[:1], generator=g).sort().values]
    if draw(st.booleans()):  # few distinct values, exact ties
        x = x.sign() * (torch.rand(shape, generator=g) < 0.5)
    x = x * draw(st.sampled_from([1.0, 0.0, 1e-40, 1e-20, 1e-7, 1e4, 1e15]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    x = x.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else x.to(dtype)
    scores = torch.rand(shape[:2], generator=g) if draw(st.booleans()) else torch.full(shape[:2], 1 / shape[1])
    return x, scores


@pytest.mark.parametrize("method", REDUCING)
def test_any_features_reduce_to_a_whole_record(method: str) -> None:
    @examples(CASES, method)
    @given(video=features(), rules=options(method), data=st.data())
    def one(video: tuple[Tensor, Tensor], rules: dict[str, Any], data: st.DataObject) -> None:
        x, scores = video
        total = x.shape[0] * x.shape[1]
        keep, exact = data.draw(st.integers(1, total)), data.draw(st.booleans())
        config = load_config({"method": method, "budget": {"tokens": keep, "exact": exact}, "outer": rules})
        reduce = method_module(method).METHOD.reduce
        target, before = Target(keep, keep / total, exact), x.clone()
        record = reduce(VideoTokens(x, scores), target, config.outer)
        assert torch.equal(x, before)
        record_laws(record, config)
        assert record.kept == keep if exact else 1 <= record.kept <= total
        again = reduce(VideoTokens(x, scores), target, config.outer)
        assert torch.equal(record.assignment, again.assignment)
        assert torch.equal(record.weight, again.weight)
        flat = x.flatten(0, 1)
        merged = record.merge(flat)
        room = 4 * torch.finfo(x.dtype).eps * flat.abs().max()  # a mean lies between its members
        assert (merged <= flat.amax(0) + room).all()
        assert (merged >= flat.amin(0) - room).all()

    one()


def test_any_video_reduces_as_the_oracle_says() -> None:
    @examples(CASES, "oracle")
    @given(
        seed=st.integers(0, 2**32 - 1),
        kind=st.sampled_from(KINDS),
        shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6)),
        rules=options("holitom"),
        similarity=st.sampled_from([0.8, 1.0, 0.0, 0.31, 0.999]),  # far from the cosines of tied tokens
        retain=st.sampled_from([0.25, 1e-6, 0.05, 0.5, 0.77, 1.0]),
        exact=st.booleans(),
    )
    def one(seed: int, kind: str, shape: Any, rules: dict[str, Any], similarity: float, retain: float, exact: bool):
        x, scores = make_video(np.random.default_rng(seed), kind, *shape)
        chosen = HolitomOptions(**{**rules, "similarity": similarity})
        check_agreement(x, scores, retain=retain, exact=exact, options=chosen)

    one()
