"""The laws once more where a GPU is at hand; skipped elsewhere, which `make test` counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attending import ENCODERS, assert_same, attentions, counted, two_videos
from test_graphs import CASES, STATIC, model_of
from test_laws import generate, handle_of, logits, preset, recomputed
from test_reading import SETTINGS
from towers import encoded
from toys import build, make_model, make_video, prompt

import holimerge
from holimerge.eval.bench import prompt_around
from holimerge.preprocess import default_settings
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


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_that_encodes_while_frames_are_read_gives_what_it_gives_in_pieces(tmp_path, family, dtype):
    path = write_video(tmp_path / "a.mp4", synthetic_clip(40, 56, 84))
    model = make_model(family, dtype=dtype).cuda()
    settings = default_settings(family, model.config)
    if family == "qwen2_5_vl":
        settings = replace(settings, min_pixels=28 * 28 * 6, max_pixels=28 * 28 * 6)
    steps = settings.temporal_patch_size if family == "qwen2_5_vl" else 1
    told = []
    for more in ({"chunk_frames": 4 // steps}, {}):
        holimerge.patch_model(model, preset("holimerge-25") | more)
        where = {"device": "cuda", "dtype": dtype} if more else {"model": model}
        _, made = read_pixels(path, settings, frames=10, chunk=4, **where)
        grid = made.get("video_grid_thw")
        rows = None if grid is None else (int(grid[0, 1]), int(grid[0, 2]))
        rng = np.random.default_rng(0)
        x = prompt_around(made, model.config, frames=10, text_tokens=8, grid=rows, rng=rng)
        told.append(logits(model, on_gpu(x)))
        assert holimerge.last_report(model).ahead is not bool(more)
    assert torch.equal(*told)


def test_stages_are_timed_by_events(family):
    model = make_model(family).cuda()
    holimerge.patch_model(model, preset("holimerge-25"))
    logits(model, on_gpu(prompt(family)))
    ms = holimerge.last_report(model).milliseconds
    assert all(value > 0 for value in ms.values())
    assert {"vision", "reduce", "project", "splice", "inner", "prefill"} <= set(ms)


TOKENS = {"tokens": {"layers": [1], "r": 2}}


@pytest.mark.parametrize("encoder", [None, TOKENS])
def test_a_captured_tower_gives_the_bits_of_the_eager_one(encoder, dtype):
    model = make_model("llava_onevision", dtype=dtype).cuda()
    config = preset("holimerge-25") | ({"encoder": encoder} if encoder else {})
    fc1 = model.model.get_submodule("vision_tower").get_parameter(
        next(name for name, _ in model.model.vision_tower.named_parameters() if name.endswith("fc1.weight"))
    )
    for change in (False, True):  # weights that are changed in place are seen by the graph
        if change:
            fc1.data.mul_(1.25)
        for seed, frames in ((0, 5), (1, 5), (2, 4), (1, 5)):
            x = on_gpu(
                build(
                    "llava_onevision", [[5, make_video("llava_onevision", frames=frames, seed=seed), 6, 7]], dtype=dtype
                )
            )
            holimerge.patch_model(model, config)
            plain = logits(model, x)
            if seed == 0 and not change:
                twin = make_model("llava_onevision", dtype=dtype).cuda()
                holimerge.patch_model(twin, config | {"cuda_graph": True})
            twin.load_state_dict(model.state_dict())
            assert torch.equal(logits(twin, x), plain)
    assert len(handle_of(twin).graphs._known) == 2  # numbers of frames; a graph each


def test_threads_share_a_captured_tower():
    from concurrent.futures import ThreadPoolExecutor

    model = make_model("llava_onevision").cuda()
    xs = [on_gpu(build("llava_onevision", [[5, make_video("llava_onevision", seed=i), 6, 7]])) for i in range(8)]
    holimerge.patch_model(model, preset("holimerge-25"))
    plain = [logits(model, x) for x in xs]
    holimerge.patch_model(model, preset("holimerge-25") | {"cuda_graph": True})

    def run(x):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = logits(model, x)
            torch.cuda.current_stream().synchronize()
            return found

    run(xs[0])
    with ThreadPoolExecutor(4) as pool:
        for ours, expected in zip(pool.map(run, xs * 4), plain * 4, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("retain", [0.1, 1.0])
def test_the_reduction_asks_the_device_once(retain):
    from holimerge.methods.holitom import HolitomOptions, reduce
    from holimerge.tokens import Target, VideoTokens

    x = torch.randn(4, 20, 64).repeat_interleave(4, 0) + 0.1 * torch.randn(16, 20, 64)
    tokens = VideoTokens(x.cuda(), torch.rand(16, 20).cuda())
    target, options = Target(int(320 * retain), retain), HolitomOptions()
    reduce(tokens, target, options)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        record = reduce(tokens, target, options)
        record.merge(tokens.features.flatten(0, 1))
    events = [event.name for event in seen.events()]
    assert sum("DtoH" in name for name in events) == 1
    if retain < 1:
        assert record.clustered


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


@pytest.mark.parametrize("of", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", [None, "tokens"])
def test_between_two_blocks_of_a_tower_nothing_waits_for_the_gpu(of, kind):
    model, x = make_model(of).cuda(), on_gpu(two_videos(of))
    options = None if kind is None else ENCODERS[kind]
    expected, _ = encoded(model, x, options)
    first, *_, last = attentions(model)
    first.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    last.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        ours, _ = encoded(model, x, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(ours, expected, 0)
