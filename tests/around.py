"""What a model says, patched or not, and how two of them are compared: for tests of what surrounds a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from patching import generate, logits
from toys import TOYS, make_model, prompt

import holimerge

Inputs = dict[str, torch.Tensor]


def settings(family: str) -> dict[str, dict[str, Any]]:
    """The configurations to look at: the outer reduction alone, and with the inner merge where the family has one."""
    toy = TOYS[family]
    outer = {"method": "holitom", "budget": {"retain": 0.25}, **toy.extra}
    if not toy.inner_layers:
        return {"outer": outer}
    return {"outer": outer, "inner": {**outer, "inner": {"layer": toy.inner_layers[0]}}}


def most(family: str) -> dict[str, Any]:
    """The configuration that does the most."""
    return list(settings(family).values())[-1]


def cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: v.to(dtype) if v.is_floating_point() and k.startswith("pixel") else v for k, v in x.items()}


@dataclass
class Said:
    """A model's answers to one prompt.

    logits: [B, L, V] of a forward, and videos: of its report (none if unpatched).
    steps: [tokens, B, V] logits that `generate` chose from, tokens: [B, L + tokens], generated_videos: the report's.
    failed: "forward" or "generate", where an offloaded weight was not there: what it would have given is None.
    """

    logits: torch.Tensor | None = None
    videos: list[dict[str, Any]] | None = None
    steps: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    generated_videos: list[dict[str, Any]] | None = None
    failed: tuple[str, ...] = ()


def said(model: Any, x: Inputs, *, decodes: bool = True) -> Said:
    answer = Said()
    try:
        answer.logits, answer.videos = logits(model, x), videos(model)
    except (NotImplementedError, RuntimeError) as error:
        answer.failed += _unless_offloaded(error, "forward")
    if not decodes:
        return answer
    try:
        out = generate(model, x, 3)
        answer.steps, answer.tokens, answer.generated_videos = torch.stack(out.logits), out.sequences, videos(model)
    except (NotImplementedError, RuntimeError) as error:
        answer.failed += _unless_offloaded(error, "generate")
    return answer


def _unless_offloaded(error: Exception, what: str) -> tuple[str, ...]:
    """accelerate leaves weights on the device "meta" that a stock model reads outside of the forward they belong to."""
    if "meta" not in str(error):
        raise error
    return (what,)


def videos(model: Any) -> list[dict[str, Any]]:
    """The last report's videos; none of a model that is not patched."""
    try:
        return holimerge.last_report(model).to_dict()["videos"]
    except ValueError:
        return []


def assert_same(ours: Said, expected: Said, atol: float = 0.0) -> None:
    """Equal bit by bit, or logits within `atol`; what one of them has not is not compared."""
    if ours.logits is not None and expected.logits is not None:
        assert ours.videos == expected.videos
        torch.testing.assert_close(ours.logits, expected.logits, atol=atol, rtol=0)
    if ours.steps is not None and expected.steps is not None:
        assert ours.generated_videos == expected.generated_videos
        torch.testing.assert_close(ours.steps, expected.steps, atol=atol, rtol=0)
        assert torch.equal(ours.tokens, expected.tokens)


@cache
def stock_answers(family: str) -> Said:
    return said(make_model(family), prompt(family))


@cache
def patched_answers(family: str, which: str) -> Said:
    """Of the toy as it is under one of `settings`: what a wrapped one must say too."""
    return said(holimerge.patch_model(make_model(family), settings(family)[which]), prompt(family))
