"""Encoded while it is read: the same answers as with the tower called in pieces, and never a stale feature."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toys import make_model

import holimerge
from holimerge.eval.bench import prompt_around
from holimerge.inputs import build_inputs
from holimerge.preprocess import Settings, default_settings
from holimerge.reading import _Pixels, read_pixels
from holimerge.video import Video, synthetic_clip

FAMILIES = ("llava_onevision", "llava_video", "qwen2_5_vl")
CHUNK = 4
BUDGET: dict[str, Any] = {"method": "holitom", "budget": {"retain": 0.3}}
TOKENS: dict[str, Any] = {**BUDGET, "encoder": {"tokens": {"r": 1}}}
FRAMES: dict[str, Any] = {**BUDGET, "encoder": {"frames": {"layers": [1]}}}
GATE: dict[str, Any] = {**BUDGET, "encoder": {"gate": {"threshold": 0.0}}}


def settings_of(model: Any) -> Settings:
    settings = default_settings(model.config.model_type, model.config)
    if model.config.model_type == "qwen2_5_vl":
        settings = replace(settings, min_pixels=28 * 28 * 6, max_pixels=28 * 28 * 6)
    return settings


def clip(count: int = 10) -> np.ndarray:
    return synthetic_clip(count, 56, 84)


def tower_of(model: Any) -> Any:
    return model.model.visual if model.config.model_type == "qwen2_5_vl" else model.model.vision_tower


@contextmanager
def counted(model: Any) -> Any:
    """Calls of the tower."""
    calls: list[tuple[int, ...]] = []
    hook = tower_of(model).register_forward_pre_hook(lambda module, args, kwargs: calls.append(()), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def prompt(model: Any, pixels: dict[str, Any], frames: int) -> dict[str, Any]:
    config = model.config
    if config.model_type == "llava_video":
        from holimerge.llava_video import layout_of

        ids = torch.tensor([[5, 6, *[config.video_token_id] * len(layout_of(config, frames)), 7, 8]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    grid = pixels.get("video_grid_thw")
    rows = None if grid is None else (int(grid[0, 1]), int(grid[0, 2]))
    rng = np.random.default_rng(0)
    return prompt_around(pixels, config, frames=frames, text_tokens=8, grid=rows, rng=rng)


def read_ahead(family: str = "llava_onevision") -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A patched model, a video's pixels that it has encoded, and a prompt with them."""
    model = holimerge.patch_model(make_model(family), BUDGET)
    pixels = read_pixels(clip(), settings_of(model), chunk=CHUNK, model=model)[1]
    return model, pixels, prompt(model, pixels, 10)


def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, min_new_tokens=3
    )
    return torch.stack(out.logits)


def same_choices(one: Any, two: Any) -> bool:
    return all(
        torch.equal(a.slots, b.slots) and torch.equal(a.sizes, b.sizes)
        for a, b in zip(one.outer, two.outer, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [3, 8, 10])
@pytest.mark.parametrize("at", ["projector_input", "projector_output"])
def test_the_answer_is_that_of_a_tower_called_in_pieces(family: str, count: int, at: str) -> None:
    model, frames = make_model(family), clip(count)
    settings = settings_of(model)
    steps = settings.temporal_patch_size if family == "qwen2_5_vl" else 1
    cfg = {**BUDGET, "outer": {"at": at}, "inner": {"layer": 1, "retain": 0.5}}
    holimerge.patch_model(model, {**cfg, "chunk_frames": CHUNK // steps})
    plain = read_pixels(frames, settings)[1]
    expected = answer(model, prompt(model, plain, count))
    choices = holimerge.api._handle(model).selection  # type: ignore[union-attr]
    assert not holimerge.last_report(model).ahead

    holimerge.patch_model(model, cfg)
    with counted(model) as calls:
        pixels = read_pixels(frames, settings, chunk=CHUNK, model=model)[1]
        assert len(calls) == -(-count // CHUNK)
        found = answer(model, prompt(model, pixels, count))
        again = answer(model, prompt(model, pixels, count))  # another question about the same video
        assert len(calls) == -(-count // CHUNK)
    assert all(torch.equal(pixels[key], plain[key]) for key in plain)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert same_choices(holimerge.api._handle(model).selection, choices)  # type: ignore[union-attr]
    report = holimerge.last_report(model)
    assert report.ahead
    assert report.to_dict()["ahead"] is True


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
def test_tokens_that_merge_inside_the_tower_do_so_while_reading(family: str) -> None:
    model, frames = make_model(family), clip()
    settings = settings_of(model)
    holimerge.patch_model(model, {**TOKENS, "chunk_frames": CHUNK})
    expected = answer(model, prompt(model, read_pixels(frames, settings)[1], 10))
    wanted = holimerge.last_report(model).encoders[0].to_dict()
    holimerge.patch_model(model, TOKENS)
    pixels = read_pixels(frames, settings, chunk=CHUNK, model=model)[1]
    assert torch.equal(answer(model, prompt(model, pixels, 10)), expected)
    assert [e.to_dict() for e in holimerge.last_report(model).encoders] == [wanted]


def test_the_tower_starts_before_the_last_frame_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = holimerge.patch_model(make_model("llava_onevision"), BUDGET)
    settings, events = settings_of(model), list[str]()
    stock = Settings.fit

    def fit(self: Settings, picture: np.ndarray, frames: int) -> np.ndarray:
        events.append("frame")
        return stock(self, picture, frames)

    monkeypatch.setattr(Settings, "fit", fit)
    tower_of(model).register_forward_pre_hook(lambda *_: events.append("tower"))
    read_pixels(list(clip()), settings, chunk=CHUNK, model=model)
    assert events.count("tower") == 3
    assert events.count("frame") == 10
    assert events.index("tower") == CHUNK


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
@pytest.mark.parametrize("cfg", [FRAMES, GATE, {"method": "keep_all"}], ids=["frames", "gate", "keep_all"])
def test_what_needs_all_frames_is_encoded_with_the_prompt(family: str, cfg: dict[str, Any]) -> None:
    model = make_model(family)
    settings = settings_of(model)
    holimerge.patch_model(model, cfg)
    expected = answer(model, prompt(model, read_pixels(clip(), settings)[1], 10))
    with counted(model) as calls:
        pixels = read_pixels(clip(), settings, model=model)[1]
        assert not calls
        assert torch.equal(answer(model, prompt(model, pixels, 10)), expected)
    assert not holimerge.last_report(model).ahead


def _copied(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone()}


def _written(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    inputs["pixel_values_videos"].mul_(1.0)
    return inputs


def _patched_anew(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    holimerge.patch_model(model, BUDGET)
    return inputs


def _weights(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        next(tower_of(model).parameters()).mul_(1.0)
    return inputs


def _dtype(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    model.bfloat16()
    return inputs


def _training(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    model.model.train()
    return inputs


@pytest.mark.parametrize("change", [_copied, _written, _patched_anew, _training, _weights, _dtype])
def test_nothing_else_is_taken_for_the_encoded_tensor(change: Callable[[Any, Any], dict[str, Any]]) -> None:
    model, _, inputs = read_ahead()
    with counted(model) as calls:
        answer(model, inputs)
        assert not calls
        inputs = change(model, inputs)
        answer(model, inputs)
        assert len(calls) == 1
    assert not holimerge.last_report(model).ahead


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changed_pixels_change_the_answer(mode: Any) -> None:
    with mode():
        model, pixels, inputs = read_ahead()
        before = answer(model, inputs)
        pixels["pixel_values_videos"].neg_()
        assert not torch.equal(answer(model, inputs), before)


def test_features_of_a_layer_that_the_config_names_later_are_encoded_anew() -> None:
    model, _, inputs = read_ahead()
    before = answer(model, inputs)
    model.config.vision_feature_layer = -2
    with counted(model) as calls:
        assert not torch.equal(answer(model, inputs), before)
        assert len(calls) == 1


def test_another_layer_another_dtype_and_gradients_are_encoded_anew() -> None:
    model, _, inputs = read_ahead()
    with torch.no_grad(), counted(model) as calls:
        model(**inputs)
        assert not calls
        model(**inputs, vision_feature_layer=model.config.vision_feature_layer)
        assert not calls
        model(**inputs, vision_feature_layer=-2)
        assert len(calls) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs)
        assert len(calls) == 2
    with counted(model) as calls:
        model(**inputs).logits.sum().backward()
        assert len(calls) == 1
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tower_of(model).parameters())


def test_two_videos_in_one_tensor_are_encoded_anew() -> None:
    model = holimerge.patch_model(make_model("llava_onevision"), BUDGET)
    settings = settings_of(model)
    first, second = (read_pixels(clip()[::way].copy(), settings, model=model)[1] for way in (1, -1))
    both = {"pixel_values_videos": torch.cat([first["pixel_values_videos"], second["pixel_values_videos"]])}
    rows = [prompt(model, x, 10)["input_ids"] for x in (first, second)]
    inputs = {"input_ids": torch.cat(rows, 1), **both}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with counted(model) as calls:
        answer(model, inputs)
        assert len(calls) == 1


def test_another_grid_of_the_same_patches_is_encoded_anew() -> None:
    model, pixels, _ = read_ahead("qwen2_5_vl")
    steps, rows, columns = pixels["video_grid_thw"][0].tolist()
    assert rows != columns
    inputs = prompt(model, {**pixels, "video_grid_thw": torch.tensor([[steps, columns, rows]])}, 10)
    with counted(model) as calls:
        answer(model, inputs)
        assert len(calls) == 1


def test_beams_use_what_is_there() -> None:
    model, _, inputs = read_ahead()
    with counted(model) as calls:
        found = model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=3)
        spent = len(calls)
    holimerge.patch_model(model, {**BUDGET, "chunk_frames": CHUNK})
    expected = model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=3)
    assert torch.equal(found, expected)
    assert spent == 0


def test_another_patch_gives_the_features_memory_back() -> None:
    from holimerge.encode_ahead import _KNOWN

    (model, _, inputs), before = read_ahead(), len(_KNOWN)
    with holimerge.merging(model, BUDGET):
        answer(model, inputs)
    assert len(_KNOWN) == before - 1


def test_a_patch_that_goes_while_a_video_is_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = holimerge.patch_model(make_model("llava_onevision"), BUDGET)
    settings, stock, seen = settings_of(model), Settings.fit, [0]

    def fit(self: Settings, picture: np.ndarray, frames: int) -> np.ndarray:
        seen[0] += 1
        if seen[0] == CHUNK + 2:
            holimerge.unpatch_model(model)
        return stock(self, picture, frames)

    monkeypatch.setattr(Settings, "fit", fit)
    with pytest.raises(RuntimeError, match="unpatched, or patched anew, while a video was being read"):
        read_pixels(list(clip()), settings, chunk=CHUNK, model=model)


def test_the_features_go_with_the_pixels() -> None:
    from holimerge.encode_ahead import _KNOWN

    gc.collect()
    before = len(_KNOWN)
    model = holimerge.patch_model(make_model("llava_onevision"), BUDGET)
    pixels = read_pixels(clip(), settings_of(model), chunk=CHUNK, model=model)[1]
    assert len(_KNOWN) == before + 1
    ahead = weakref.ref(_KNOWN[pixels["pixel_values_videos"]])
    answer(model, prompt(model, pixels, 10))
    del pixels
    gc.collect()
    assert len(_KNOWN) == before
    assert ahead() is None


@pytest.mark.parametrize("at", ["projector_input", "projector_output"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pixels_keep_no_model_alive(family: str, at: str) -> None:
    model = holimerge.patch_model(make_model(family), {**BUDGET, "outer": {"at": at}})
    pixels = read_pixels(clip(), settings_of(model), chunk=CHUNK, model=model)[1]
    answer(model, prompt(model, pixels, 10))
    gone = [weakref.ref(model), weakref.ref(model.model.language_model), weakref.ref(tower_of(model))]
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    del pixels


def test_a_read_that_begins_anew_forgets_what_it_had() -> None:
    model = holimerge.patch_model(make_model("llava_onevision"), TOKENS)
    settings = settings_of(model)
    expected = answer(model, prompt(model, read_pixels(clip(), settings, chunk=CHUNK, model=model)[1], 10))
    wanted = holimerge.last_report(model).encoders[0].to_dict()
    ahead = holimerge.api._handle(model).outer.ahead(torch.device("cpu"))  # type: ignore[union-attr]
    made = _Pixels(settings, False, CHUNK, torch.device("cpu"), torch.float32, ahead)
    made.start(10)
    with pytest.raises(RuntimeError, match="another table"):  # a file whose packets are not its frames
        made.take(_BrokenOff(settings), 10)
    made.start(10)
    made.take((settings.fit(picture, 10) for picture in clip()), 10)
    assert torch.equal(answer(model, prompt(model, made.inputs(), 10)), expected)
    report = holimerge.last_report(model)
    assert report.ahead
    assert report.encoders[0].to_dict() == wanted


class _BrokenOff:
    """Six of ten frames."""

    def __init__(self, settings: Settings) -> None:
        self.left = [settings.fit(picture, 10) for picture in clip()[::-1][:6]]

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> np.ndarray:
        if not self.left:
            raise RuntimeError("another table")
        return self.left.pop(0)


def test_a_model_whose_first_weights_are_kept_elsewhere() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model("qwen2_5_vl")
    settings = settings_of(model)
    holimerge.patch_model(model, BUDGET)
    expected = answer(model, prompt(model, read_pixels(clip(), settings, chunk=CHUNK, model=model)[1], 10))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    with counted(model) as calls:
        pixels = read_pixels(clip(), settings, chunk=CHUNK, model=model)[1]
        assert len(calls) == 3
        found = answer(model, prompt(model, pixels, 10))
        assert len(calls) == 3
    assert torch.equal(found, expected)


def test_a_default_device_of_the_users_is_not_where_the_host_counts() -> None:
    model = holimerge.patch_model(make_model("llava_onevision"), BUDGET)
    plain = read_pixels(clip(), settings_of(model), chunk=CHUNK, model=model)[1]
    inputs = prompt(model, plain, 10)
    expected = answer(model, inputs)
    with torch.device("meta"):  # anything that is made without saying where has no values
        pixels = read_pixels(clip(), settings_of(model), chunk=CHUNK, model=model)[1]
        assert torch.equal(pixels["pixel_values_videos"], plain["pixel_values_videos"])
        with torch.no_grad():
            model(**inputs)
    assert torch.equal(answer(model, {**inputs, **pixels}), expected)


def test_a_copy_of_the_model_encodes_by_itself() -> None:
    model = holimerge.patch_model(make_model("llava_onevision"), BUDGET)
    pixels = read_pixels(clip(), settings_of(model), chunk=CHUNK, model=model)[1]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in tower_of(twin).parameters():
            p.mul_(1.5)
    inputs = prompt(model, pixels, 10)
    with counted(twin) as calls:
        found = answer(twin, inputs)
        assert len(calls) == 1
    assert not torch.equal(found, answer(model, inputs))


def test_build_inputs_hands_the_tensor_on() -> None:
    from holimerge.eval.load import load, to_model
    from holimerge.eval.tiny import CHECKPOINT

    model, tokenizer, settings, template = load(CHECKPOINT, dtype="float32", device_map="cpu")
    holimerge.patch_model(model, BUDGET)
    video, pixels = read_pixels(synthetic_clip(9, 96, 96), settings, model=model)
    assert isinstance(video, Video)
    inputs = build_inputs(
        "what color is the bowl ?",
        video,
        config=model.config,
        tokenizer=tokenizer,
        settings=settings,
        chat_template=template,
        pixels=[pixels],
    )
    with counted(model) as calls:
        model.generate(**to_model(inputs, model), max_new_tokens=1)
        assert not calls
    assert holimerge.last_report(model).ahead


def test_in_inference_mode() -> None:
    model = holimerge.patch_model(make_model("llava_onevision"), BUDGET)
    with torch.inference_mode(), counted(model) as calls:
        pixels = read_pixels(clip(), settings_of(model), chunk=CHUNK, model=model)[1]
        spent = len(calls)
        answer(model, prompt(model, pixels, 10))
        assert len(calls) == spent


def test_a_failed_read_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from holimerge.encode_ahead import _KNOWN

    model = holimerge.patch_model(make_model("llava_onevision"), BUDGET)
    settings, before, seen = settings_of(model), len(_KNOWN), [0]

    def fit(self: Settings, picture: np.ndarray, frames: int) -> np.ndarray:
        seen[0] += 1
        if seen[0] == 9:
            raise ValueError("frame 8 is damaged")
        return picture

    monkeypatch.setattr(Settings, "fit", fit)
    with pytest.raises(ValueError, match="frame 8"):
        read_pixels(list(clip()), settings, chunk=CHUNK, model=model)
    gc.collect()
    assert len(_KNOWN) == before


def test_wrong_models() -> None:
    model = make_model("llava_onevision")
    settings = settings_of(model)
    with pytest.raises(ValueError, match="model: it is not patched"):
        read_pixels(clip(), settings, model=model)
    holimerge.patch_model(model, BUDGET)
    with pytest.raises(ValueError, match="llava_onevision, but the settings are for qwen2_5_vl"):
        read_pixels(clip(), default_settings("qwen2_5_vl"), model=model)
    with pytest.raises(ValueError, match=r"dtype: torch\.bfloat16, but the model's is torch\.float32"):
        read_pixels(clip(), settings, model=model, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="device: meta, but the model's is cpu"):
        read_pixels(clip(), settings, model=model, device="meta")
    read_pixels(clip(), settings, model=model, device="cpu", dtype=torch.float32)
