"""What tests of patched models share: a configuration as a family takes it, runs, and recomputation from scratch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from toys import MODES, TOYS, build, make_video

import holimerge


def preset(name: str, inner: bool = True, **outer: Any) -> dict[str, Any]:
    """A preset for four layers: the inner merge at layer 2, or none."""
    changes: dict[str, Any] = {"base": name, "inner": {"layer": 2} if inner else None}
    if outer:
        changes["outer"] = outer
    return changes


def suited(model: Any, cfg: Any) -> dict[str, Any]:
    """The configuration with the keys the model's family needs, and without what that family refuses.

    For a family that refuses nothing and needs nothing this is the configuration itself. A test of something that may
    be refused asks `needs` first; here only the rest of its configuration is made to fit.
    """
    toy = TOYS[model.config.model_type]
    given = holimerge.load_config(cfg)
    config = given.to_dict()
    if given.inner is not None:
        layer = given.inner.resolve(len(toy.language_model(model).layers))
        if not toy.inner_layers:
            config["inner"] = None
        elif layer not in toy.inner_layers:
            config["inner"]["layer"] = toy.inner_layers[0]
    if given.outer is not None:
        if given.outer.positions not in ("auto", *toy.positions):
            config["outer"]["positions"] = toy.positions[0]
        if given.outer.order not in toy.orders:
            config["outer"]["order"] = toy.orders[0]
    return {**config, **toy.extra}


def patch(model: Any, cfg: Any) -> Any:
    """`holimerge.patch_model` with the configuration as the model's family takes it."""
    return holimerge.patch_model(model, suited(model, cfg))


def needs(
    family: str,
    *,
    inner: bool = False,
    layer: int | None = None,
    positions: str = "auto",
    order: str = "raster",
    mode: str | None = None,
) -> None:
    """Skip a test of what the family refuses, or of what its stock class itself cannot do."""
    toy = TOYS[family]
    if inner and not toy.inner_layers:
        pytest.skip(f"{family} refuses an inner merge")
    if layer is not None and layer not in toy.inner_layers:
        pytest.skip(f"{family} refuses an inner merge at layer {layer}")
    if positions not in ("auto", *toy.positions):
        pytest.skip(f"{family} refuses {positions} positions")
    if order not in toy.orders:
        pytest.skip(f"{family} refuses {order} order")
    assert {mode or MODES[0], *toy.stock_fails} <= set(MODES)
    if mode in toy.stock_fails:
        pytest.skip(f"stock {family}, {mode}: {toy.stock_fails[mode]}")


def needs_chunked_prefill(family: str, model: Any) -> None:
    needs(family, mode="chunked prefill")
    if TOYS[family].recurrent:
        pytest.skip(f"{family} refuses it: see test_hard_cases")
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers cannot prefill a video in chunks, patched or not")


def handle_of(model: Any) -> Any:
    return model.__dict__["_holimerge_handle"]


def generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 5, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
        )


def logits(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def answer_of(out: Any, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, t]: what was generated after the prompt."""
    return out.sequences[:, x["input_ids"].shape[1] :]


def recomputed(
    model: Any, family: str, x: dict[str, torch.Tensor], answer: torch.Tensor, selection: Any
) -> list[torch.Tensor]:
    """Logits of every step without a cache, with the prefill's choices: one forward over prompt and answer."""
    y = TOYS[family].extended(x, answer[:, :-1])
    with handle_of(model).replaying(selection):
        return list(logits(model, y, use_cache=False)[:, -answer.shape[1] :].unbind(1))


def assert_steps_close(ours: Any, theirs: Any) -> None:
    """The logits of every step agree."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)


def check_cached(model: Any, family: str, x: dict[str, torch.Tensor], tokens: int = 4, **kwargs: Any) -> Any:
    """Cached generation equals recomputation from scratch with the same choices."""
    out = generate(model, x, tokens, **kwargs)
    selection = handle_of(model).selection
    assert_steps_close(out.logits, recomputed(model, family, x, answer_of(out, x), selection))
    return out, selection


def check_rows(model: Any, family: str, rows: list[list[Any]], out: Any, selection: Any) -> None:
    """Every row of a batch that was generated as `out` gives what it gives alone."""
    x = build(family, rows)
    video = 0
    for i, row in enumerate(rows):
        count = TOYS[family].videos(row)
        mine = selection.of(list(range(video, video + count)), [i])
        video += count
        single = build(family, [row])
        with handle_of(model).replaying(mine):
            alone = generate(model, single, len(out.logits))
        # what the user sees keeps its shape: the answer starts where the prompt ends
        assert torch.equal(answer_of(out, x)[i], answer_of(alone, single)[0])
        assert_steps_close([step[i] for step in out.logits], [step[0] for step in alone.logits])


def batch_rows(family: str) -> list[list[list[Any]]]:
    """Ragged batches: one against two videos, video against text, unequal grids."""
    still = make_video(family, seed=1)
    other = make_video(family, seed=2)
    wide = make_video(family, seed=3, side=(16, 48), frames=6)
    return [
        [[5, still, 6, 7], [8, 9, other, 10, still, 11, 12]],
        [[5, 6, still, 7, 8, 9], [10, 11]],
        [[5, wide, 6], [7, 8, 9, other, 10, 11, 12, 13, 14, 15]],
    ]
