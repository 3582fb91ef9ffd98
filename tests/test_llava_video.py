"""LLaVA-Video: checkpoints in lmms-lab's layout are converted, load, and compute what is described of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_video_files import INDEX, POOLED, SHARDS, TEXT, TOWER, WIDTH, Parts, write_theirs
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

import holimerge
from holimerge.eval import convert
from holimerge.eval.cli import app
from holimerge.eval.convert import convert_llava_video
from holimerge.eval.load import Loaded, load
from holimerge.eval.measure import measure
from holimerge.inputs import build_inputs, collate
from holimerge.llava_video import NEWLINES, LlavaVideoConfig, LlavaVideoForConditionalGeneration, layout_of
from holimerge.preprocess import default_settings
from holimerge.shapes import shape_of
from holimerge.video import read_video, synthetic_clip, write_video

FRAMES = 6


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts.random()


@pytest.fixture(scope="module")
def published(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_theirs(tmp_path_factory.mktemp("published") / "llava-video", parts.their_weights())


@pytest.fixture(scope="module")
def converted(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By newline; "grid" is the checkpoint's own."""
    folder = tmp_path_factory.mktemp("converted")
    for newline in NEWLINES:
        told = convert_llava_video(published, folder / newline, newline=None if newline == "grid" else newline)
        assert (told["newline"], told["tokens_per_frame"], told["dtype"]) == (newline, POOLED**2, "float32")
    return {newline: folder / newline for newline in NEWLINES}


def inputs_of(loaded: Loaded, frames: int = FRAMES, **extra: Any) -> dict[str, Tensor]:
    return build_inputs(
        "What moves?",
        read_video(synthetic_clip(24, 60, 80), frames=frames),
        config=loaded.model.config,
        tokenizer=loaded.tokenizer,
        settings=loaded.settings,
        **{"chat_template": loaded.chat_template, **extra},
    )


@pytest.mark.parametrize(
    ("newline", "expected"),
    [
        ("grid", [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1]),
        ("frame", [0, 1, 2, 3, -1, 4, 5, 6, 7, -1]),
        ("one_token", [0, 1, 2, 3, 4, 5, 6, 7, -1]),
    ],
)
def test_the_layout_of_two_frames_of_two_by_two_tokens(newline: str, expected: list[int]) -> None:
    config = LlavaVideoConfig(vision_config={**TOWER, "image_size": 14 * 5}, video_newline=newline)
    assert layout_of(config, 2).tolist() == expected


@pytest.mark.parametrize("newline", NEWLINES)
def test_a_converted_checkpoint_computes_what_is_described(
    parts: Parts, converted: dict[str, Path], newline: str
) -> None:
    loaded = load(converted[newline])
    inputs = inputs_of(loaded)
    ids = inputs["input_ids"][0].tolist()
    video = loaded.model.config.video_token_id
    places = [i for i, token in enumerate(ids) if token == video]
    pixels = inputs["pixel_values_videos"][0]
    reference = parts.logits(ids[: places[0]], pixels, ids[places[-1] + 1 :], newline)
    assert reference.shape[0] == len(ids)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs).logits[0], reference)
    others = [parts.logits(ids[: places[0]], pixels, ids[places[-1] + 1 :], n) for n in NEWLINES if n != newline]
    assert all((other[-1] - reference[-1]).abs().max() > 0.1 for other in others)  # a newline is seen in the logits


def test_every_weight_arrives_and_the_auto_classes_read_the_folder(
    parts: Parts, converted: dict[str, Path], tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted["grid"]
    assert isinstance(AutoConfig.from_pretrained(folder), LlavaVideoConfig)
    model, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, LlavaVideoForConditionalGeneration)
    assert not any(told.values())
    sums = sorted(float(tensor.double().sum()) for tensor in parts.their_weights().values())
    assert sorted(float(tensor.double().sum()) for tensor in model.state_dict().values()) == sums
    text, vision = model.config.text_config, model.config.vision_config
    assert all(getattr(text, key) == value for key, value in TEXT.items())
    assert all(getattr(vision, key) == value for key, value in TOWER.items())
    assert text.rope_parameters["rope_theta"] == 500.0
    assert text.sliding_window is None
    assert not vision.vision_use_head
    assert model.generation_config.eos_token_id == [258, 256]
    monkeypatch.setattr(convert, "SHARD", "40KB")
    convert_llava_video(published, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("head", [False, True])
def test_one_file_of_bfloat16_weights_with_tied_embeddings(parts: Parts, tmp_path: Path, head: bool) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in parts.their_weights().items()}
    if not head:  # with tied embeddings it is not looked at
        del weights["lm_head.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a constant that older files hold
    source = write_theirs(tmp_path / "source", weights, tie_word_embeddings=True, mm_newline_position=None)
    save_file({k: v for file in SHARDS for k, v in load_file(source / file).items()}, source / "model.safetensors")
    for name in (INDEX, *SHARDS, "generation_config.json"):
        (source / name).unlink()
    told = convert_llava_video(source, tmp_path / "target")
    assert (told["dtype"], told["newline"]) == ("bfloat16", "one_token")
    model = load(tmp_path / "target").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])
    assert torch.equal(model.model.image_newline, weights["model.image_newline"])
    assert model.generation_config.eos_token_id == 258


def test_prompt_and_pixels_are_the_authors(converted: dict[str, Path]) -> None:
    loaded = load(converted["frame"])
    tokens = "<video>" * (2 * (POOLED**2 + 1))
    user = f"<|im_start|>user\n{tokens}\nWhat moves?<|im_end|>\n<|im_start|>assistant\n"
    inputs = inputs_of(loaded, 2)
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert loaded.tokenizer.decode(inputs["input_ids"][0]) == start + user
    told = inputs_of(loaded, 2, system="Look.")["input_ids"][0]
    assert loaded.tokenizer.decode(told) == "<|im_start|>system\nLook.<|im_end|>\n" + user
    plain = inputs_of(loaded, 2, chat_template="<video>{{ messages[0]['content'][1]['text'] }}")["input_ids"][0]
    assert loaded.tokenizer.decode(plain) == tokens + "What moves?"
    assert loaded.settings.size == (104, 104)
    assert (loaded.settings.mean, loaded.settings.std) == ((0.5,) * 3, (0.5,) * 3)
    assert loaded.settings.source.startswith(str(converted["frame"]))
    assert default_settings("llava_video").mean == (0.5,) * 3
    videos = [read_video(synthetic_clip(24, 60, 80), frames=n) for n in (2, 3)]
    common = {"config": loaded.model.config, "tokenizer": loaded.tokenizer, "settings": loaded.settings}
    with pytest.raises(ValueError, match="llava_video takes videos of equally many frames in one call, got 2, 3"):
        build_inputs("?", videos, **common)


@pytest.mark.parametrize("newline", NEWLINES)
def test_a_patched_checkpoint_answers_with_a_newline_for_every_row_that_holds_a_token(
    converted: dict[str, Path], newline: str
) -> None:
    loaded = load(converted[newline])
    inputs = collate([inputs_of(loaded), inputs_of(loaded)], loaded.tokenizer.pad_token_id)
    model = holimerge.patch_model(loaded.model, {"base": "holimerge-25", "inner": None})
    answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape == (2, inputs["input_ids"].shape[1] + 4)
    group = {"grid": POOLED, "frame": POOLED**2, "one_token": FRAMES * POOLED**2}[newline]
    for video in holimerge.last_report(model).videos:
        assert (video.features, video.entering, video.grid) == (FRAMES * POOLED**2, 14, (POOLED, POOLED))
        lines = {token // group for token in video.record.anchor.tolist()}
        assert video.separators == len(lines)
        if newline == "grid":
            assert len(lines) < FRAMES * POOLED  # some rows are empty: their newlines are gone
    with holimerge.merging(loaded.model, "keep-all"), torch.no_grad():
        kept = loaded.model(**inputs).logits
    holimerge.unpatch_model(loaded.model)
    with torch.no_grad():
        torch.testing.assert_close(kept, loaded.model(**inputs).logits)


def test_ask_and_measure_count_the_newlines_that_enter(converted: dict[str, Path], tmp_path: Path) -> None:
    loaded = load(converted["grid"])
    inputs, text = inputs_of(loaded), 69  # bytes and special tokens of the prompt
    configs = (None, {"base": "holimerge-25", "inner": None})
    full, merged = (
        measure(loaded.model, inputs, config=config, warmup=0, repeats=1, new_tokens=0, count=True)
        for config in configs
    )
    assert full["tokens"] == {**full["tokens"], "entering": 54, "separators": FRAMES * POOLED, "text": text}
    assert full["flops"]["total"] == full["flops_measured"]
    assert shape_of(loaded.model.config).vision.tokens_per_step(None) == POOLED**2
    assert merged["tokens"]["text"] == text
    # released static tokens are not in the formulas; a newline too many would be a hundredth
    assert merged["flops"]["total"] == pytest.approx(merged["flops_measured"], rel=1e-3)
    assert 1 <= merged["tokens"]["separators"] < FRAMES * POOLED
    clip = write_video(tmp_path / "clip.mp4", synthetic_clip(24, 60, 80), fps=8)
    asked = ("ask", clip, "What moves?", "--model", str(converted["grid"]), "--frames", str(FRAMES), "--json")
    done = CliRunner().invoke(app, [*asked, "--config", "holimerge-25", "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["cases"]["holimerge-25"]
    assert (told["tokens"]["features"], told["tokens"]["entering"], told["tokens"]["text"]) == (54, 14, text)


def without(*names: str) -> Any:
    return lambda weights: [weights.pop(name) for name in names]


def reshaped(weights: dict[str, Tensor]) -> None:
    weights["model.image_newline"] = torch.zeros(WIDTH + 1)


PROJECTOR = [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
PREFIX = "model.vision_tower.vision_tower.vision_model.encoder.layers."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlavaLlamaForCausalLM"]}, r"LlavaLlamaForCausalLM.*only checkpoints of LlavaQwenForCausa"),
        ({"architectures": None, "model_type": "llava_video"}, "model_type 'llava_video'; only checkpoints of"),
        ({"hidden_size": None, "rope_theta": None}, r"config\.json: lacks hidden_size, rope_theta"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode is 'max'; supported: average"),
        ({"mm_spatial_pool_mode": "bilinear"}, r"'bilinear'; supported: average; the authors' .* --pool average"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride is 4; supported: 2, nothing"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; supported: mlp2x_gelu"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
        ({"add_faster_video": True}, "add_faster_video is True"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_newline_position": "no_token"}, "mm_newline_position 'no_token' is not valid; valid: grid, frame, one_"),
        ({"mm_vision_tower": "openai/clip", "vision_config": None}, "mm_vision_tower 'openai/clip' is not known; know"),
        ({"vision_config": None}, "the weights hold 3 layers of the vision tower google/siglip.*, 26 are expected"),
        (
            {"vocab_size": 260},
            "no room in the vocabulary: with <image> and <video> the tokenizer has 261 tokens, .* 260",
        ),
        (
            without("model.norm.weight", "lm_head.weight"),
            r"weights lack .*lm_head\.weight.*model\.norm\.weight|lack .*",
        ),
        (without(PREFIX + "1.layer_norm1.weight"), "hold 2 layers of the vision tower"),
        (lambda weights: weights.update({"model.faster_token": torch.ones(2)}), r"hold unknown model\.faster_token$"),
        (reshaped, r"model\.image_newline has shape \[33\]; by config\.json it has \[32\]"),
    ],
)
def test_what_cannot_be_converted_is_named(parts: Parts, tmp_path: Path, changes: Any, message: str) -> None:
    weights = parts.their_weights()
    if callable(changes):
        changes(weights)
    source = write_theirs(tmp_path / "source", weights, **({} if callable(changes) else changes))
    with pytest.raises(ValueError, match=message):
        convert_llava_video(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_files_that_are_missing_or_in_the_way_are_named(parts: Parts, tmp_path: Path) -> None:
    source, target = write_theirs(tmp_path / "source", parts.their_weights()), tmp_path / "target"

    def fails(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            convert_llava_video(source, target)

    with pytest.raises(FileNotFoundError, match=r"gone: no such folder; download .*`hf download lmms-lab/LLaVA-Video"):
        convert_llava_video(tmp_path / "gone", target)
    for option in ({"newline": "row"}, {"pool": "max"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}.* is not valid; valid: "):
            convert_llava_video(source, target, **option)
    target.mkdir()
    (target / "mine").write_text("precious")
    fails(FileExistsError, "target: exists and is not an empty folder")
    assert (target / "mine").read_text() == "precious"
    (target / "mine").unlink()
    whole = (source / SHARDS[1]).read_bytes()
    (source / SHARDS[1]).write_bytes(whole[:100])
    fails(ValueError, r"model-00002-of-00002\.safetensors: cannot be read .* downloaded whole\?")
    (source / SHARDS[1]).unlink()
    fails(FileNotFoundError, r"index\.json: names files that are not there: model-00002-of-00002\.safetensors")
    (source / INDEX).write_text("{}")
    fails(ValueError, r"index\.json: has no weight_map")
    (source / INDEX).unlink()
    fails(FileNotFoundError, r"neither model\.safetensors nor")
    (source / "pytorch_model-00001-of-00001.bin").write_bytes(b"pickle")
    fails(ValueError, r"pickles \(pytorch_model-00001-of-00001\.bin\), which can run code")
    (source / "config.json").write_text("[")
    fails(ValueError, r"config\.json: is no JSON object")
    (source / "config.json").unlink()
    fails(FileNotFoundError, r"config\.json: no such file")
    assert list(target.iterdir()) == []


def test_a_failed_write_leaves_nothing(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(convert, "_preprocessor", full)
    with pytest.raises(OSError, match="no space"):
        convert_llava_video(published, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_the_command_converts_and_explains(published: Path, parts: Parts, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> Any:
        return CliRunner().invoke(app, ["convert-llava-video", *map(str, arguments)])

    source = write_theirs(tmp_path / "source", parts.their_weights(), mm_spatial_pool_mode="bilinear")
    refused = run(source, tmp_path / "target")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "error: " in refused.stderr
    assert "--pool average" in refused.stderr
    done = run(source, tmp_path / "target", "--newline", "frame", "--pool", "average", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["folder"], told["newline"]) == (str(tmp_path / "target"), "frame")
    assert AutoConfig.from_pretrained(tmp_path / "target").video_newline == "frame"
    assert "newline: grid" in run(published, tmp_path / "other").stdout
    with pytest.raises(TypeError, match=r"model_type 'llava' \(for .*LLaVA-Video run `holimerge convert-llava-video`"):
        load(source)


def test_the_class_is_imported_only_when_a_checkpoint_needs_it(converted: dict[str, Path]) -> None:
    code = (
        "import sys, holimerge, holimerge.inputs, holimerge.preprocess\n"
        "from holimerge.eval.load import read_config\n"
        "assert 'holimerge.llava_video' not in sys.modules\n"
        f"print(read_config({str(converted['grid'])!r}).video_newline)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "grid\n", done.stderr
