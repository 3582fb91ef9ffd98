"""The laws once more where a GPU is at hand; skipped elsewhere, which `make test` counts."""

from __future__ import annotations

import pytest
import torch
from attending import ENCODERS, assert_same, attentions, counted, two_videos
from test_laws import generate, handle_of, logits, preset, recomputed
from towers import encoded
from toys import build, make_model, make_video, prompt

import holimerge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def on_gpu(x):
    return {k: v.cuda() for k, v in x.items()}


def test_keep_all_is_bit_identical_on_a_gpu(family, attn, dtype):
    model = make_model(family, attn=attn, dtype=dtype).cuda()
    x = on_gpu(prompt(family, dtype=dtype))
    plain, tokens = logits(model, x), generate(model, x).sequences
    holimerge.patch_model(model, "keep-all")
    assert torch.equal(logits(model, x), plain)
    assert torch.equal(generate(model, x).sequences, tokens)


@pytest.mark.parametrize("name", ["holimerge-25", "holitom-25"])
def test_cached_generation_equals_recomputation_on_a_gpu(family, attn, name):
    model = make_model(family, attn=attn).cuda()
    holimerge.patch_model(model, preset(name))
    x = on_gpu(build(family, [[5, make_video(family), 6, 7], [8, make_video(family, seed=1), 9, 10, 11]]))
    out = generate(model, x)
    answer = out.sequences[:, x["input_ids"].shape[1] :]
    for ours, fresh in zip(out.logits, recomputed(model, family, x, answer, handle_of(model).selection), strict=True):
        torch.testing.assert_close(ours, fresh, atol=2e-3, rtol=0)


def test_records_are_the_same_on_both_devices_and_the_same_every_time(family):
    model = make_model(family)
    holimerge.patch_model(model, preset("holimerge-25"))
    x = prompt(family)
    logits(model, x)
    on_cpu = handle_of(model).selection.outer[0]
    model.cuda()
    for _ in range(3):
        out = logits(model, on_gpu(x))
        record = handle_of(model).selection.outer[0].to("cpu")
        assert torch.equal(record.assignment, on_cpu.assignment)
        assert torch.equal(logits(model, on_gpu(x)), out)


def test_stages_are_timed_by_events(family):
    model = make_model(family).cuda()
    holimerge.patch_model(model, preset("holimerge-25"))
    logits(model, on_gpu(prompt(family)))
    ms = holimerge.last_report(model).milliseconds
    assert all(value > 0 for value in ms.values())
    assert {"vision", "reduce", "project", "splice", "inner", "prefill"} <= set(ms)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_spans_of_one_length_attend_together_on_a_gpu(name, attn, dtype, monkeypatch):
    model = make_model(name, attn=attn, dtype=dtype).cuda()
    x = on_gpu(two_videos(name))
    x["pixel_values_videos"] = x["pixel_values_videos"].to(dtype)
    expected, _ = encoded(model, x, None, attention="stock")
    with counted(monkeypatch, model) as calls:
        ours, _ = encoded(model, x, None)
    assert_same(ours, expected, 1e-4 if dtype == torch.float32 else 5e-2)
    if attn == "sdpa":
        assert all(1 <= len(layer) <= 4 for layer in calls)


@pytest.mark.parametrize("kind", [None, "tokens"])
def test_between_two_blocks_of_a_tower_nothing_waits_for_the_gpu(kind):
    model, x = make_model("qwen2_vl").cuda(), on_gpu(two_videos("qwen2_vl"))
    options = None if kind is None else ENCODERS[kind]
    expected, _ = encoded(model, x, options)
    first, *_, last = attentions(model)  # the marks of spans are read on entering the first
    first.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    last.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        ours, _ = encoded(model, x, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(ours, expected, 0)
