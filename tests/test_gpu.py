"""The laws once more where a GPU is at hand; skipped elsewhere, which `make test` counts."""

from __future__ import annotations

import pytest
import torch
from test_graphs import CASES, STATIC, model_of
from test_laws import generate, handle_of, logits, preset, recomputed
from test_reading import SETTINGS
from toys import build, make_model, make_video, prompt

import holimerge
from holimerge.reading import read_pixels
from holimerge.video import read_video, synthetic_clip, write_video

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


@pytest.mark.parametrize(("family", "case"), CASES)
def test_recorded_steps_are_the_steps_on_a_gpu(family, case):
    model = model_of(family, case).cuda()
    x = on_gpu(build(family, [[5, make_video(family), 6, 7], [8, make_video(family, seed=1), 9, 10, 11]]))
    plain = generate(model, x, 8, **STATIC)
    with holimerge.graphed(model):
        for _ in range(2):
            out = generate(model, x, 8, cache_implementation="static")
            assert torch.equal(out.sequences, plain.sequences)
            for ours, theirs in zip(out.logits, plain.logits, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_made_on_a_gpu_are_those_of_the_host(tmp_path, name, dtype):
    path = write_video(tmp_path / "a.mp4", synthetic_clip(40, 96, 128))
    whole = SETTINGS[name].pixels(read_video(path, frames=9).frames)["pixel_values_videos"]
    for _ in range(2):  # the pinned memory is used again
        video, made = read_pixels(path, SETTINGS[name], frames=9, chunk=2, device="cuda", dtype=dtype)
        video.frames[:] = 0  # the caller's
        assert made["pixel_values_videos"].is_cuda
        assert torch.equal(made["pixel_values_videos"].cpu(), whole.to(dtype))


def test_stages_are_timed_by_events(family):
    model = make_model(family).cuda()
    holimerge.patch_model(model, preset("holimerge-25"))
    logits(model, on_gpu(prompt(family)))
    ms = holimerge.last_report(model).milliseconds
    assert all(value > 0 for value in ms.values())
    assert {"vision", "reduce", "project", "splice", "inner", "prefill"} <= set(ms)
