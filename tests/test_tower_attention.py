"""Batched spans in whole models: seen by our own calls alone, undone without a trace, trained through."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from attending import (
    CPU,
    assert_same,
    attentions,
    config,
    counted,
    odd,
)
from fingerprint import fingerprint
from patching import generate, logits, patch
from torch import Tensor
from towers import encoded
from toys import make_model, prompt
from transformers import AttentionInterface

import holimerge
from holimerge import load_config
from holimerge.patches import _grid_spans
from holimerge.registry import family_module
from holimerge.spans import by_length

# ------------------------------------------------------------------------------------------------ whole models


def test_only_a_batched_configuration_changes_a_cpus_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """And bit for bit nothing: the law that nothing to merge is the unpatched model rests on it."""
    model, x = make_model("qwen2_5_vl"), odd("qwen2_5_vl")
    with counted(monkeypatch, model) as stock:
        plain = logits(model, x)
    for mode in ("auto", "stock", "batched"):
        patch(model, config(tower_attention=mode, budget={"retain": 1.0}))
        with counted(monkeypatch, model) as calls:
            ours = logits(model, x)
        if mode == "batched":
            assert all(len(ours) < len(theirs) / 2 for ours, theirs in zip(calls, stock, strict=True))
            torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
        else:
            assert calls == stock
            assert torch.equal(ours, plain)


def test_auto_batches_on_a_gpu() -> None:
    model = make_model("qwen2_vl")
    tower = family_module("qwen2_vl").FAMILY.encoder_tower(model.model, {}, [])
    layer = tower.attentions[0]
    ends = torch.tensor([0, 4, 8], dtype=torch.int32)

    class Rows:  # of a device that is not here
        def __init__(self, kind: str) -> None:
            self.device = torch.device(kind)

    for mode, kind, batches in (("auto", "cuda", True), ("auto", "cpu", False), ("batched", "cpu", True)):
        call = _grid_spans.BatchedAttention(tower, mode)
        call.spans._batches[id(ends), torch.device(kind)] = by_length([4, 4], CPU)
        call._entering(layer)((Rows(kind),), {"cu_seqlens": ends})
        assert (call.now is not None) is batches
    assert not _grid_spans.BatchedAttention(tower, "stock").hooks()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "video_llama_3"])
def test_a_patch_is_undone_and_generation_goes_on_as_in_a_forward(family: str) -> None:
    model, x = make_model(family), odd(family)
    plain = logits(model, x)
    before = fingerprint(model)
    patch(model, config())
    looks = fingerprint(model)
    for _ in range(2):
        ours = logits(model, x)
        torch.testing.assert_close(generate(model, x, 1).logits[0], ours[:, -1])
        assert fingerprint(model) == looks
    holimerge.unpatch_model(model)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, x), plain)


def test_only_our_own_call_is_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that calls the tower meanwhile, and a copy of the model, are stock."""
    model, x = make_model("qwen2_5_vl"), odd("qwen2_5_vl")
    given = {k: v for k, v in x.items() if k in ("pixel_values_videos", "video_grid_thw")}
    layers = attentions(model)
    configs = [layer.config for layer in layers]
    with torch.no_grad():
        stock = model.model.get_video_features(**given, return_dict=True).pooler_output
    patch(model, config())
    expected = logits(model, x)
    seen: dict[str, Any] = {}

    def aside() -> None:
        seen["names"] = [layer.config._attn_implementation for layer in layers]
        with torch.no_grad():
            seen["stock"] = model.model.get_video_features(**given, return_dict=True).pooler_output

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread() or "held" in seen:
            return
        seen["held"] = [type(layer.config) for layer in layers]
        seen["here"] = layers[1].config._attn_implementation
        seen["size"] = layers[1].config.hidden_size
        seen["copy"] = copy.deepcopy(layers[1].config)
        with counted(monkeypatch, model) as calls:
            thread = threading.Thread(target=aside)
            thread.start()
            thread.join()
            seen["calls"] = list(calls)

    inside: list[str] = []
    layers[0].qkv.register_forward_hook(lambda *_: inside.append(layers[0].config._attn_implementation))
    hook = model.model.visual.blocks[1].register_forward_pre_hook(meanwhile)
    torch.testing.assert_close(logits(model, x), expected)
    hook.remove()
    assert seen["held"] == [_grid_spans._Config] * len(layers)
    assert seen["names"] == ["sdpa"] * len(layers)
    assert seen["here"] == "sdpa"  # between two attentions
    assert inside[0] == _grid_spans.NAME
    assert inside[1] == "sdpa"  # the other thread's
    assert seen["size"] == configs[1].hidden_size
    assert type(seen["copy"]) is type(configs[1])
    assert {spans for layer in seen["calls"] for spans, _ in layer} == {1}
    for a, b in zip(seen["stock"], stock, strict=True):
        assert torch.equal(a, b)
    assert all(layer.config is real for layer, real in zip(layers, configs, strict=True))


def test_an_error_inside_the_tower_leaves_the_configuration_as_it_was() -> None:
    model, x = make_model("qwen3_5"), odd("qwen3_5")
    configs = [layer.config for layer in attentions(model)]
    patch(model, config())
    expected = logits(model, x)

    def breaks(*_: Any) -> None:
        raise KeyboardInterrupt

    for place in (attentions(model)[1], attentions(model)[1].proj):
        hook = place.register_forward_pre_hook(breaks)
        with pytest.raises(KeyboardInterrupt):
            logits(model, x)
        hook.remove()
        assert all(layer.config is real for layer, real in zip(attentions(model), configs, strict=True))
        assert torch.equal(logits(model, x), expected)


def test_a_configuration_is_held_until_the_last_call_leaves() -> None:
    tower = family_module("qwen2_vl").FAMILY.encoder_tower(make_model("qwen2_vl").model, {}, [])
    layers = tower.attentions
    real = layers[0].config
    first, second = (_grid_spans.BatchedAttention(tower, "batched") for _ in range(2))
    with first.named():
        with second.named():
            held = layers[0].config
        assert layers[0].config is held is not real
        assert _grid_spans._CALL.get() is first
    assert layers[0].config is real
    assert _grid_spans._CALL.get() is None


def test_threads_share_a_tower() -> None:
    """One leaves the tower while the other is inside."""
    model, prompts = make_model("qwen2_5_vl"), [odd("qwen2_5_vl"), prompt("qwen2_5_vl", frames=6)]
    configs = [layer.config for layer in attentions(model)]
    patch(model, config())
    expected = [logits(model, x) for x in prompts]
    barrier = threading.Barrier(2, timeout=20)

    def meet(*_: Any) -> None:
        barrier.wait()

    attentions(model)[1].register_forward_pre_hook(meet)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            for i, answer in enumerate(pool.map(lambda i: logits(model, prompts[i % 2]), range(12))):
                assert torch.equal(answer, expected[i % 2])
    finally:
        sys.setswitchinterval(before)
    assert all(layer.config is real for layer, real in zip(attentions(model), configs, strict=True))


def test_other_implementations_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    flash: list[tuple[int, Any]] = []
    sdpa = AttentionInterface._global_mapping["sdpa"]

    def custom(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.shape[0], query.shape[2]))
        return sdpa(module, query, *args, **kwargs)

    def varlen(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        marks = kwargs.pop("cu_seq_lens_q")
        flash.append((q.shape[2], kwargs.pop("max_length_q")))
        for name in ("cu_seq_lens_k", "max_length_k"):
            kwargs.pop(name)
        parts = [x.split([b - a for a, b in pairwise(marks.tolist())], 2) for x in (q, k, v)]
        return torch.cat(
            [sdpa(module, *part, attention_mask, **kwargs)[0] for part in zip(*parts, strict=True)], 1
        ), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "counting", custom)
    monkeypatch.setitem(AttentionInterface._global_mapping, "counting_flash", varlen)
    model, x = make_model("qwen2_5_vl"), odd("qwen2_5_vl")
    expected, _ = encoded(model, x, None, attention="stock")
    with counted(monkeypatch, model) as stock:
        encoded(model, x, None, attention="stock")
    tower = model.model.visual
    tower.config._attn_implementation = "counting"
    ours, _ = encoded(model, x, None, attention="batched")
    assert calls == [call for layer in stock for call in layer]
    assert_same(ours, expected, 1e-7)
    tower.config._attn_implementation = "counting_flash"
    ours, _ = encoded(model, x, None, attention="batched")
    assert len(flash) == len(attentions(model))
    assert all(longest is not None for _, longest in flash)
    assert_same(ours, expected, 1e-7)
    tower.config._attn_implementation = "sdpa"


def test_our_name_is_no_implementation_to_ask_for() -> None:
    model, x = make_model("qwen2_vl"), odd("qwen2_vl")
    encoded(model, x, None, attention="batched")
    model.model.visual.config._attn_implementation = _grid_spans.NAME
    with pytest.raises(RuntimeError, match="inside a patched model's own calls"):
        logits(model, x)


# ------------------------------------------------------------------------------------------------ training


def trained(model: Any, x: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and gradients of the tower's weights."""
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**x).logits
    out.float().square().mean().backward()
    tower = family_module(model.config.model_type).FAMILY.tower(model.model)
    return out.detach(), [p.grad for p in tower.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llama_3"])
def test_gradients_are_those_of_stock_calls(family: str, checkpointing: bool) -> None:
    """Also with dropout, which draws the same numbers, and with blocks that are run again in the backward pass."""
    model, x = make_model(family), odd(family)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for layer in attentions(model):
        layer.attention_dropout = 0.2
    model.train()
    found = []
    for mode in ("stock", "batched"):
        patch(model, config(tower_attention=mode, budget={"retain": 1.0}))
        found.append(trained(model, x))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    assert len(found[0][1]) > 10
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ the configuration


def test_the_key_of_the_configuration() -> None:
    assert load_config("holimerge-10").tower_attention == "auto"
    assert load_config(config()).tower_attention == "batched"
    assert load_config({"method": "keep_all", "tower_attention": "stock"}).tower_attention == "stock"
    with pytest.raises(holimerge.ConfigError, match="tower_attention: method keep_all makes the stock call"):
        load_config({"method": "keep_all", "tower_attention": "batched"})
    with pytest.raises(holimerge.ConfigError, match=r"'batch' is not valid.*Valid: auto, stock, batched"):
        load_config(config(tower_attention="batch"))
