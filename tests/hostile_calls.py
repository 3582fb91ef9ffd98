"""Calling a model with a case: what came out, what entered the language model, and whether an error is a clear one."""

from __future__ import annotations

import functools
import linecache
import re
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fingerprint import fingerprint
from hostile import Case, Clip, inputs
from patching import generate
from torch import Tensor
from toys import TOYS, make_model

from holimerge import __file__ as package
from holimerge import load_config
from holimerge.shapes import text_shape

STEPS = 3  # tokens generated
ROOT = Path(package).parents[1]
HARMLESS = Case(rows=((2, Clip(3), 2),))


@dataclass
class Outcome:
    """What a call gave.

    logits: of every column (forward), of every step (generate); output: all the model returned.
    entered: the arguments with which the language model was called first.
    graded: parameters with a gradient, and whether it is finite.
    """

    logits: list[Tensor] = field(default_factory=list)
    output: Any = None
    error: Exception | None = None
    entered: dict[str, Any] = field(default_factory=dict)
    graded: dict[str, bool] = field(default_factory=dict)


def call(model: Any, family: str, x: dict[str, Tensor], case: Case) -> Outcome:
    """The case's call. The hook that looks at the language model's arguments is set last, so it sees what enters."""
    seen: list[dict[str, Any]] = []
    language_model = TOYS[family].language_model(model)
    hook = language_model.register_forward_pre_hook(lambda _m, _a, k: seen.append(dict(k)), with_kwargs=True)
    try:
        out, found = run(model, x, case)
        graded = {}
        if case.grad and case.call == "forward":
            words = (x["input_ids"] >= 5) & (x["input_ids"] < 85)  # a loss is on text
            out.logits[words if words.any() else ...].float().sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            graded = {name: bool(grad.isfinite().all()) for name, grad in grads.items()}
        return Outcome([step.detach() for step in found], out, None, seen[0], graded)
    except Exception as error:
        return Outcome(error=error, entered=seen[0] if seen else {})
    finally:
        hook.remove()
        model.zero_grad()


def run(model: Any, x: dict[str, Tensor], case: Case) -> tuple[Any, list[Tensor]]:
    cached = {} if case.use_cache is None else {"use_cache": case.use_cache}
    if case.call == "generate":
        out = generate(model, x, STEPS, **cached)
        return out, list(out.logits)
    with torch.set_grad_enabled(case.grad):
        out = model(**x, **cached)
    return out, [out.logits]


@functools.cache
def model_of(family: str, dtype: str, attn: str) -> tuple[Any, dict[str, Any], Outcome]:
    """A model for all cases, what it looks like unpatched, and what it says to a harmless prompt."""
    model = make_model(family, attn=attn, dtype=getattr(torch, dtype))
    said = harmless(model, family, dtype)
    assert said.error is None, said.error
    return model, fingerprint(model), said


def harmless(model: Any, family: str, dtype: str) -> Outcome:
    case = replace(HARMLESS, dtype=dtype)
    return call(model, family, inputs(family, case), case)


def same(a: Outcome, b: Outcome) -> bool:
    """The same error, or the same logits bit for bit, NaN equal to NaN."""
    return (
        repr(a.error) == repr(b.error)
        and len(a.logits) == len(b.logits)
        and all(torch.equal(x.nan_to_num(7e4), y.nan_to_num(7e4)) for x, y in zip(a.logits, b.logits, strict=True))
    )


def close(a: Tensor, b: Tensor, case: Case) -> None:
    """Equal but for rounding.

    In half precision single logits stray far where a norm divides by little, in the stock model too, so there the
    distance of all of them is looked at; what is wrong is farther apart.
    """
    if case.dtype == "float32":
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)
    elif b.numel():
        distance = torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float())
        assert distance < 16 * torch.finfo(getattr(torch, case.dtype)).eps, f"{distance:.3f} apart"


# -------------------------------------------------------------------------------------------------- a clear error


def finite(stock: Outcome) -> bool:
    """Whether the stock model's video features are numbers."""
    return not stock.entered or bool(stock.entered["inputs_embeds"].isfinite().all())


def refusals(model: Any, case: Case, x: dict[str, Tensor], stock: Outcome) -> list[str]:
    """What a patched model may say to a case that the stock one computes."""
    config, allowed = load_config(case.config), []
    if case.fault is not None:
        allowed.append("placeholder")
    if case.fault == "one empty":  # the stock model skips it
        allowed.append("at least one frame")
    if case.poisoned or case.huge or not finite(stock):
        allowed.append("not finite")
    if config.inner is not None and case.call == "generate" and case.use_cache is False:
        allowed.append("use_cache=False")
    if config.budget is not None and (config.budget.flops or 1) < 1:
        allowed.append(r"budget\.flops: .* leaves ")
    if config.budget is not None and config.budget.flops is not None and not counts_flops(model):
        allowed.append("no FLOPs model")
    if not bool(x.get("video_compression_mask", torch.ones(1)).all()):
        allowed.append("video_compression_mask")
    return allowed


def counts_flops(model: Any) -> bool:
    """Whether there is a cost model for the decoder."""
    try:
        text_shape(model.config)
    except TypeError:
        return False
    return True


def judge(error: Exception, model: Any, case: Case, x: dict[str, Tensor], stock: Outcome) -> str:
    """Which clear error this is: the stock model's own, or one that our code raises on purpose for a good cause."""
    at = _origin(error)
    words = f"{error!r} from {at.filename}:{at.lineno}; the stock model: {stock.error!r}"
    ours = any(Path(at.filename).is_relative_to(ROOT / folder) for folder in ("holimerge", "patches"))
    if not ours or not linecache.getline(at.filename, at.lineno or 0).lstrip().startswith("raise "):
        assert stock.error is not None, f"an obscure error: {words}"
        theirs = _origin(stock.error)
        assert (at.filename, at.name) == (theirs.filename, theirs.name), f"an obscure error: {words}"
        return "the stock model's error"
    assert isinstance(error, (ValueError, TypeError, RuntimeError)), words
    found = [pattern for pattern in refusals(model, case, x, stock) if re.search(pattern, str(error))]
    assert found or stock.error is not None, f"refused without a cause: {words}"
    return f"refused: {found[0] if found else 'as the stock model does'}"


def _origin(error: BaseException) -> traceback.FrameSummary:
    return traceback.extract_tb(error.__traceback__)[-1]
