"""Question and video to model inputs: equal to transformers' processors, accepted by the models, clear on mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_processors import run_real
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from holimerge.inputs import DEFAULT_TEMPLATES, build_inputs, collate, load_chat_template
from holimerge.preprocess import Settings, default_settings
from holimerge.video import Video, read_video, synthetic_clip

FAMILIES = ("llava_onevision", "qwen2_5_vl")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
TEXT_ONLY = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}{% endfor %}"  # as Qwen2's own
OTHER_TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}Q: {{ p['text'] }}{% endif %}{% endfor %}{% endfor %} A:"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A toy tokenizer that loses nothing: one token a byte, and the families' special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    toy = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|endoftext|>", eos_token="<|im_end|>")  # noqa: S106
    toy.add_special_tokens({"additional_special_tokens": SPECIAL})
    return toy


@pytest.fixture(scope="module")
def configs(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    def token(text: str) -> int:
        return tokenizer.convert_tokens_to_ids(text)

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    siglip = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    siglip |= {"num_attention_heads": 2, "image_size": 42, "patch_size": 14}  # 3 x 3 patches, pooled to 2 x 2
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return {
        "llava_onevision": LlavaOnevisionConfig(
            vision_config=siglip,
            text_config=text | {"model_type": "qwen2"},
            image_token_id=token("<image>"),
            video_token_id=token("<video>"),
            image_grid_pinpoints=[[42, 42]],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        "qwen2_5_vl": Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text | {"rope_parameters": rope},
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        ),
    }


def settings_for(family: str, configs: dict[str, Any]) -> Settings:
    found = default_settings(family, configs[family])
    return found if family == "llava_onevision" else replace(found, min_pixels=28 * 28, max_pixels=12 * 28 * 28)


def clip(frames: int, total: int = 60, fps: float | None = 30.0, height: int = 60, width: int = 100) -> Video:
    video = read_video(synthetic_clip(total, height, width), frames=frames, source_fps=fps)
    return replace(video, source="clip")


QUESTIONS = ["What happens?", "Wie viele Personen sind im Bild? 几个人?\nOne number."]


def scenarios() -> dict[str, tuple[list[tuple[str, list[Video]]], str | None]]:
    """Name -> (questions with their videos, chat template)."""
    return {
        "one": ([(QUESTIONS[0], [clip(4)])], None),
        "odd frames, variable rate": ([(QUESTIONS[1], [clip(5, 50, 12.5)])], None),
        "no clock": ([(QUESTIONS[0], [clip(4, fps=None)])], None),
        "two videos": ([(QUESTIONS[0], [clip(4), clip(4, 20, 10.0)])], None),
        "text only": ([(QUESTIONS[1], [])], None),
        "batch": ([(QUESTIONS[0], [clip(4)]), (QUESTIONS[1], [clip(4, 20, 10.0)]), ("And?", [])], None),
        "ragged batch": ([(QUESTIONS[1], [clip(4), clip(4)]), (QUESTIONS[0], [clip(4)])], None),
        "other template": ([(QUESTIONS[0], [clip(4)])], OTHER_TEMPLATE),
    }


def ours_for(family: str, name: str, configs: dict[str, Any], tokenizer: Any) -> dict[str, torch.Tensor]:
    questions, template = scenarios()[name]
    template = template.replace("<|video_pad|>", "<video>") if template and family == FAMILIES[0] else template
    rows = [
        build_inputs(
            question,
            videos,
            config=configs[family],
            tokenizer=tokenizer,
            settings=settings_for(family, configs),
            chat_template=template,
        )
        for question, videos in questions
    ]
    return collate(rows, tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory, configs: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> dict[str, dict[str, torch.Tensor]]:
    work = tmp_path_factory.mktemp("processors")
    tokenizer.save_pretrained(work / "tokenizer")
    jobs = {}
    for family in FAMILIES:
        settings = settings_for(family, configs)
        values: dict[str, Any] = {"size": {"height": 42, "width": 42}}
        if family == "qwen2_5_vl":
            values = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
        for name, (questions, template) in scenarios().items():
            template = template or DEFAULT_TEMPLATES[family]
            videos = [video for _, some in questions for video in some]
            jobs[f"{family} {name}"] = {
                "kind": "inputs",
                "model_type": family,
                "settings": values,
                "tokenizer": str(work / "tokenizer"),
                "patches_per_frame": 9,
                "chat_template": template.replace("<|video_pad|>", "<video>") if family == FAMILIES[0] else template,
                "questions": [(question, len(some)) for question, some in questions],
                "frames": [torch.from_numpy(video.frames) for video in videos],
                "clocks": [(v.total_frames, v.fps, v.indices.tolist() if v.fps else None) for v in videos],
            }
    return run_real(jobs, work)


@pytest.mark.parametrize("name", list(scenarios()))
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_equal_the_real_processor(
    real: dict[str, dict[str, torch.Tensor]], configs: dict[str, Any], tokenizer: Any, family: str, name: str
) -> None:
    ours, theirs = ours_for(family, name, configs, tokenizer), real[f"{family} {name}"]
    assert ours.keys() == theirs.keys() - {"video_metadata"}
    for key, value in ours.items():
        assert value.shape == theirs[key].shape, key
        if value.is_floating_point():
            assert value.dtype == theirs[key].dtype
            assert (value - theirs[key]).abs().max() <= 1e-6, key
        else:
            assert torch.equal(value, theirs[key].long()), key


@pytest.mark.parametrize("name", list(scenarios()))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_models_take_the_inputs(configs: dict[str, Any], tokenizer: Any, family: str, name: str) -> None:
    """Placeholder counts match the model's features (it raises otherwise), and a row does not feel its padding."""
    torch.manual_seed(0)
    cls = LlavaOnevisionForConditionalGeneration if family == FAMILIES[0] else Qwen2_5_VLForConditionalGeneration
    model = cls(configs[family]).eval()
    inputs = ours_for(family, name, configs, tokenizer)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert logits.isfinite().all()
    if name == "batch":
        alone = build_inputs(
            QUESTIONS[0],
            clip(4),
            config=configs[family],
            tokenizer=tokenizer,
            settings=settings_for(family, configs),
        )
        with torch.no_grad():
            torch.testing.assert_close(model(**alone).logits[0, -1], logits[0, -1], atol=1e-5, rtol=1e-4)


def test_the_prompts_read_as_published(configs: dict[str, Any], tokenizer: Any) -> None:
    llava = ours_for("llava_onevision", "one", configs, tokenizer)["input_ids"][0]
    tokens = 4 * 2 * 2 + 1  # four frames of 3 x 3 patches pooled to 2 x 2, and the newline
    assert tokenizer.decode(llava) == (
        "<|im_start|>user " + "<video>" * tokens + "\nWhat happens?<|im_end|><|im_start|>assistant\n"
    )
    qwen = ours_for("qwen2_5_vl", "one", configs, tokenizer)
    t, h, w = qwen["video_grid_thw"][0].tolist()
    assert t == 2
    assert tokenizer.decode(qwen["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|video_pad|>" * (t * h * w // 4)
        + "<|vision_end|>What happens?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert qwen["second_per_grid_ts"].tolist() == [1.0]  # 4 frames of a 2 s clip, joined in pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_system_turn_and_answer_prefix(configs: dict[str, Any], tokenizer: Any, family: str) -> None:
    common: dict[str, Any] = {"config": configs[family], "settings": settings_for(family, configs)}
    common["tokenizer"] = tokenizer

    def build(**extra: Any) -> tuple[str, list[int]]:
        ids = build_inputs("Hm?", clip(2), **common, **extra)["input_ids"][0]
        return tokenizer.decode(ids), ids.tolist()

    plain, system = build()[0], "Watch every detail."
    text, ids = build(system=system, answer_prefix="Best Option: (")
    own = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" * (family == "qwen2_5_vl")
    start = {
        "llava_onevision": f"<|im_start|>system \n{system}<|im_end|>",
        "qwen2_5_vl": f"<|im_start|>system\n{system}<|im_end|>\n",
    }[family]
    assert plain.startswith(own)
    assert text == start + plain.removeprefix(own) + "Best Option: ("  # its own system turn is replaced, not joined
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]  # prefix and prompt are one text
    assert build(answer_prefix="(")[0] == plain + "("
    assert build(system=None, answer_prefix="")[0] == plain
    placeholder = tokenizer.convert_ids_to_tokens(configs[family].video_token_id)
    for extra in ({"system": placeholder}, {"answer_prefix": placeholder}):
        with pytest.raises(ValueError, match=f"the {next(iter(extra))[:6]}.* contains .*remove it"):
            build(**extra)
    deaf = "{% for m in messages if m['role'] == 'user' %}" + placeholder + "{{ m['content'][-1]['text'] }}{% endfor %}"
    assert build(chat_template=deaf)[0].endswith("Hm?")
    with pytest.raises(ValueError, match="does not show the system turn"):
        build(chat_template=deaf, system=system)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + deaf
    with pytest.raises(ValueError, match=r"after a system turn.*no system"):
        build(chat_template=refusing, system=system)


def test_left_padding_and_token_types(configs: dict[str, Any], tokenizer: Any) -> None:
    batch = ours_for("qwen2_5_vl", "batch", configs, tokenizer)
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (padding.int().diff(dim=1) <= 0).all()  # padding only on the left
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()
    is_video = batch["input_ids"] == configs["qwen2_5_vl"].video_token_id
    assert torch.equal(batch["mm_token_type_ids"], is_video.long() * 2)


def test_where_the_template_comes_from(configs: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    family = "qwen2_5_vl"
    common = {"config": configs[family], "settings": settings_for(family, configs), "tokenizer": tokenizer}

    def prompt(template: str | None) -> str:
        return tokenizer.decode(build_inputs("Hm", clip(2), chat_template=template, **common)["input_ids"][0])

    try:
        tokenizer.chat_template = OTHER_TEMPLATE
        assert prompt(None).endswith("Q: Hm A:")
        tokenizer.chat_template = {"default": OTHER_TEMPLATE, "rag": TEXT_ONLY}
        assert prompt(None).endswith("Q: Hm A:")
        tokenizer.chat_template = TEXT_ONLY  # knows no videos: as LLaVA-OneVision's tokenizer
        assert prompt(None).startswith("<|im_start|>system\nYou are a helpful assistant.")
        assert prompt("X<|video_pad|>Y") == "X" + "<|video_pad|>" * prompt(None).count("<|video_pad|>") + "Y"
        with pytest.raises(ValueError, match="chat template"):
            prompt(TEXT_ONLY)
    finally:
        tokenizer.chat_template = None

    assert load_chat_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load_chat_template(tmp_path) == "jinja"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load_chat_template(tmp_path) == "json"
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(ValueError, match=r"chat_template\.json"):
        load_chat_template(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_chat_template(tmp_path / "nowhere")


@pytest.mark.parametrize("family", FAMILIES)
def test_mistakes(configs: dict[str, Any], tokenizer: Any, family: str) -> None:
    settings = settings_for(family, configs)
    common: dict[str, Any] = {"config": configs[family], "settings": settings, "tokenizer": tokenizer}
    placeholder = tokenizer.convert_ids_to_tokens(configs[family].video_token_id)
    with pytest.raises(ValueError, match="remove it"):
        build_inputs(f"What is {placeholder}?", clip(2), **common)
    with pytest.raises(TypeError, match="read_video"):
        build_inputs("?", [np.zeros((2, 8, 8, 3), np.uint8)], **common)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"2 tokens .* for 1 videos"):
        build_inputs("?", clip(2), chat_template=placeholder * 2, **common)
    other = configs[FAMILIES[1 - FAMILIES.index(family)]]
    with pytest.raises(ValueError, match="its own settings"):
        build_inputs("?", clip(2), **(common | {"config": other}))
    wrong = {"size": (84, 84)} if family == "llava_onevision" else {"patch_size": 7}
    with pytest.raises(ValueError, match=r"dataclasses\.replace\(settings"):
        build_inputs("?", clip(2), **(common | {"settings": replace(settings, **wrong)}))
    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="tokenizer has 1 tokens"):
        build_inputs("?", clip(2), **(common | {"tokenizer": small}))
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)


def test_what_cannot_share_a_call(configs: dict[str, Any], tokenizer: Any) -> None:
    rows = {}
    for family in FAMILIES:
        common: dict[str, Any] = {
            "config": configs[family],
            "settings": settings_for(family, configs),
            "tokenizer": tokenizer,
        }
        rows[family] = [build_inputs("?", clip(count), **common) for count in (2, 4)]
        if family == "llava_onevision":
            with pytest.raises(ValueError, match="equally many frames in one call, got 2, 4"):
                build_inputs("?", [clip(2), clip(4)], **common)
            with pytest.raises(ValueError, match="sample equally many frames"):
                collate(rows[family], 0)
        else:
            assert len(build_inputs("?", [clip(2), clip(4)], **common)["video_grid_thw"]) == 2
            assert len(collate(rows[family], 0)["video_grid_thw"]) == 2
    with pytest.raises(ValueError, match="different model families"):
        collate([rows["llava_onevision"][0], rows["qwen2_5_vl"][0]], 0)
