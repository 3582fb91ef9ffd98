"""A question and its videos to model inputs: prompt, placeholder tokens, pixels. No torchvision, no processor class.

`build_inputs` gives for LLaVA-OneVision and Qwen2.5-VL what their transformers processors give for the same frames
(compared in `tests/test_inputs.py`), and the like for LLaVA-Video; `collate` joins several questions into one
left-padded batch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .preprocess import LLAVA, Settings, model_file
from .video import Video

FAMILIES = ("llava_onevision", "llava_video", "qwen2_5_vl")

# The prompts that the published checkpoints' templates give; used where neither a file nor the tokenizer has one.
DEFAULT_TEMPLATES = {
    "llava_onevision": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} "
        "{% for part in message['content'] if part['type'] == 'video' %}<video>{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "qwen2_5_vl": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
DEFAULT_TEMPLATES["llava_video"] = DEFAULT_TEMPLATES["llava_onevision"]


def load_chat_template(folder_or_id: str | os.PathLike[str], **hub: Any) -> str | None:
    """Read a checkpoint's chat template: chat_template.json (the older file wins, as in transformers) or .jinja.

    Args:
        folder_or_id: a local folder or a hub id.
        **hub: revision, cache_dir, token, local_files_only for the hub.

    Returns:
        the Jinja template, or None if the checkpoint has neither file.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the hub cannot be reached or has no such model.
        ValueError: chat_template.json is no JSON or lacks its key.
    """
    if (path := model_file(folder_or_id, "chat_template.json", **hub)) is not None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: has no chat template ({error!r})") from error
    path = model_file(folder_or_id, "chat_template.jinja", **hub)
    return None if path is None else path.read_text(encoding="utf-8")


def build_inputs(
    question: str,
    video: Video | Sequence[Video],
    *,
    config: Any,
    tokenizer: Any,
    settings: Settings,
    chat_template: str | None = None,
    system: str | None = None,
    answer_prefix: str = "",
    pixels: Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Build the inputs of one question about one video, several, or none.

    The prompt is a system turn if one is given (without one, Qwen2.5-VL's template puts its own there), one user turn,
    videos first, then the question, then the start of the answer, with `answer_prefix` as its first words. The template
    is `chat_template`, else the tokenizer's if it can show a video, else `DEFAULT_TEMPLATES`. Each placeholder grows to
    the tokens its video will have: LLaVA-OneVision T ceil(h/2) ceil(w/2) + 1 (the newline), with h x w patches a
    frame; LLaVA-Video as `holimerge.llava_video.layout_of` says; Qwen2.5-VL t h w / merge_size^2.

    Args:
        question: the text, in any language; must not contain the model's own placeholder tokens.
        video: one `Video`, or a list of them (empty: text only). The LLaVA families need equally many frames in each.
        config: the model's config (`model.config`).
        tokenizer: the model's tokenizer.
        settings: from `preprocess.load_preprocessor`.
        chat_template: Jinja text, usually from `load_chat_template`.
        system: text of the system turn; None leaves it to the template.
        answer_prefix: words the answer begins with, for instance "Best Option: ("; tokenised together with the prompt.
        pixels: of each video, from `holimerge.reading.read_pixels`; None preprocesses the frames here.

    Returns:
        int64 input_ids and attention_mask `[1, L]`; with videos also pixel_values_videos, float32: LLaVA
        `[V, T, 3, h, w]`; Qwen2.5-VL `[S, C]` with video_grid_thw int64 `[V, 3]` and second_per_grid_ts float32 `[V]`
        (seconds; 24 frames a second are assumed for a video without a clock). Qwen2.5-VL always gets mm_token_type_ids
        int64 `[1, L]` (0 text, 2 video).

    Raises:
        TypeError: `video` is not made of `Video`s.
        ValueError: another model family; settings, tokenizer or template that do not fit the model; a template that
            shows no system turn; a placeholder token inside the question, the system text or the prefix;
            LLaVA videos of unequal length; pixels of another number of videos.
    """
    family = config.model_type
    if family not in FAMILIES or settings.model_type != family:
        raise ValueError(
            f"model_type {family!r} with settings for {settings.model_type!r}: inputs are built for "
            f"{', '.join(FAMILIES)}, each with its own settings"
        )
    videos = [video] if isinstance(video, Video) else list(video)
    if not all(isinstance(v, Video) for v in videos):
        raise TypeError("video must be a Video from holimerge.video.read_video, or a list of them")
    _check_sizes(config, settings)
    ids = _prompt_ids(question, len(videos), config, tokenizer, chat_template, system, answer_prefix)
    if pixels is None:
        pixels = [settings.pixels(v.frames) for v in videos]
    elif len(pixels) != len(videos):
        raise ValueError(f"pixels: of {len(pixels)} videos, but there are {len(videos)} videos")
    if family in LLAVA:
        if len({p["pixel_values_videos"].shape for p in pixels}) > 1:
            counts = ", ".join(str(len(v.frames)) for v in videos)
            raise ValueError(f"{family} takes videos of equally many frames in one call, got {counts} frames")
        lengths = [_llava_tokens(config, p["pixel_values_videos"].shape[1]) for p in pixels]
    else:
        lengths = [int(p["video_grid_thw"].prod()) // settings.merge_size**2 for p in pixels]

    expanded: list[int] = []
    remaining = iter(lengths)
    for token in ids:
        expanded.extend([token] * next(remaining) if token == config.video_token_id else [token])
    input_ids = torch.tensor([expanded], dtype=torch.int64, device="cpu")
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (input_ids == config.video_token_id).long() * 2
    if videos:
        for key, alone in pixels[0].items():  # a single video's are handed on: they may have been encoded already
            inputs[key] = alone if len(pixels) == 1 else torch.cat([p[key] for p in pixels])
        if family == "qwen2_5_vl":
            steps = [settings.temporal_patch_size / _sampled_rate(v) for v in videos]
            inputs["second_per_grid_ts"] = torch.tensor(steps, dtype=torch.float32, device="cpu")
    return inputs


def collate(rows: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Join the inputs of several questions of one model into a left-padded batch.

    Args:
        rows: results of `build_inputs`, `[1, L_i]` each; rows with and without videos may mix.
        pad_token_id: the token that fills the left of shorter rows.

    Returns:
        the same keys: input_ids, attention_mask (0 on padding) and mm_token_type_ids (0 on padding) `[B, max L]`;
        pixels and grids one after another in row order.

    Raises:
        ValueError: no rows; rows of different model families; LLaVA videos of unequal length.
    """
    if not rows:
        raise ValueError("collate needs at least one row")
    if len({"mm_token_type_ids" in row for row in rows}) > 1:
        raise ValueError("the rows come from different model families: some have mm_token_type_ids, some have not")
    width = max(row["input_ids"].shape[1] for row in rows)
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    batch: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        parts = [row[key] for row in rows if key in row]
        if key in fills:
            parts = [torch.nn.functional.pad(p, (width - p.shape[1], 0), value=fills[key]) for p in parts]
        elif len({p.shape[1:] for p in parts}) > 1:
            shapes = ", ".join(str(list(p.shape)) for p in parts)
            raise ValueError(f"{key} of shapes {shapes} cannot share a batch: sample equally many frames of each video")
        batch[key] = torch.cat(parts)
    return batch


def _llava_tokens(config: Any, frames: int) -> int:
    """Placeholders of a video of so many frames, newlines included."""
    if config.model_type == "llava_video":
        from .llava_video import layout_of  # only here: it brings transformers' classes

        return len(layout_of(config, frames))
    side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    return frames * side * side + 1


def _check_sizes(config: Any, settings: Settings) -> None:
    """The preprocessor must make frames of the size the vision tower was built for."""
    vision = config.vision_config
    if config.model_type in LLAVA:
        pairs: dict[str, tuple[Any, Any]] = {"size": (settings.size, (vision.image_size, vision.image_size))}
    else:
        pairs = {
            "patch_size": (settings.patch_size, vision.patch_size),
            "temporal_patch_size": (settings.temporal_patch_size, vision.temporal_patch_size),
            "merge_size": (settings.merge_size, vision.spatial_merge_size),
        }
    for name, (ours, model) in pairs.items():
        if ours != model:
            raise ValueError(
                f"preprocessor settings ({settings.source}) have {name}={ours}, the model's vision tower needs "
                f"{model}: use dataclasses.replace(settings, {name}={model})"
            )


def _prompt_ids(
    question: str,
    count: int,
    config: Any,
    tokenizer: Any,
    chat_template: str | None,
    system: str | None,
    answer_prefix: str,
) -> list[int]:
    """Render and tokenise the prompt, with one placeholder token for each of `count` videos."""
    vocabulary = len(tokenizer)
    if not 0 <= config.video_token_id < vocabulary:
        raise ValueError(f"the model's video token is {config.video_token_id}, the tokenizer has {vocabulary} tokens")
    placeholder = tokenizer.convert_ids_to_tokens(config.video_token_id)
    image_id = getattr(config, "image_token_id", None)
    image = tokenizer.convert_ids_to_tokens(image_id) if image_id is not None and image_id < vocabulary else None
    for name, words in (("question", question), ("system text", system or ""), ("answer prefix", answer_prefix)):
        for token in (placeholder, image):
            if token and token in words:
                raise ValueError(f"the {name} contains {token!r}, which stands for pictures in this model; remove it")
    if chat_template is None:
        own = getattr(tokenizer, "chat_template", None)
        own = own.get("default") if isinstance(own, dict) else own
        if own is not None and placeholder in _rendered("?", 1, tokenizer, own, quiet=True):
            chat_template = own
        else:  # many language models' own templates know text only
            chat_template = DEFAULT_TEMPLATES[config.model_type]
    text = _rendered(question, count, tokenizer, chat_template, system) + answer_prefix
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = list(tokenizer(text, add_special_tokens=not starts)["input_ids"])
    if ids.count(config.video_token_id) != count:
        raise ValueError(
            f"the prompt has {ids.count(config.video_token_id)} tokens {placeholder!r} (id {config.video_token_id}) "
            f"for {count} videos; give the model's own chat_template and tokenizer. The prompt was: {text!r}"
        )
    return ids


def _rendered(
    question: str, count: int, tokenizer: Any, template: str, system: str | None = None, quiet: bool = False
) -> str:
    """The prompt of one user turn; with `quiet`, "" where the template cannot render it."""
    content: list[dict[str, str]] = [{"type": "video"} for _ in range(count)]
    content.append({"type": "text", "text": question})
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template's Jinja code raises
        if quiet:
            return ""
        shown = f"a user turn with {count} videos" + (" after a system turn" if system is not None else "")
        raise ValueError(f"the chat template cannot show {shown}: {error}") from error
    if system is not None and system.strip() not in text:
        raise ValueError(f"the chat template does not show the system turn {system!r}; put it into the question")
    return text


def _sampled_rate(video: Video) -> float:
    """Sampled frames a second, as transformers' `VideoMetadata.sampled_fps` defines it."""
    if not video.fps:
        return 24.0
    return len(video.frames) / video.total_frames * video.fps if video.total_frames else video.fps
