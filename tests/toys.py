"""Tiny random models of the real Hugging Face classes, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

VIDEO, IMAGE, PAD, VISION_START, VISION_END = 90, 91, 0, 92, 93
FAMILIES = ["llava_onevision", "qwen2_5_vl"]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 4096,
}


def llava_config(**text: Any) -> LlavaOnevisionConfig:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 4,
        "vision_use_head": False,
    }  # 7 x 7 patches, pooled to 4 x 4 tokens: an odd side, as 27 is
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT, **text},
        video_token_id=VIDEO,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[28, 28]],
        tie_word_embeddings=False,
    )


def qwen_config(**text: Any) -> Qwen2_5_VLConfig:
    vision = {
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 4,
        "intermediate_size": 40,
        "out_hidden_size": text.get("hidden_size", TEXT["hidden_size"]),
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [2],
        "tokens_per_second": 2,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope, **text},
        video_token_id=VIDEO,
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


def make_model(
    family: str,
    *,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gain: float = 1.0,
    **text: Any,
) -> Any:
    """A tiny model of a family with random weights, large enough for scores to differ."""
    torch.manual_seed(seed)
    if family == "llava_onevision":
        model = LlavaOnevisionForConditionalGeneration._from_config(llava_config(**text), attn_implementation=attn)
    else:
        model = Qwen2_5_VLForConditionalGeneration._from_config(qwen_config(**text), attn_implementation=attn)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 or "newline" in name:
                # wider layers get smaller weights, so that activations keep their size
                p.copy_(torch.randn(p.shape) * 0.12 * (32 / max(32, p.shape[-1])) ** 0.5)
                if "language_model" in name:
                    p.mul_(gain)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    # a random model would otherwise write placeholders, which no forward without a cache can read back
    model.generation_config.suppress_tokens = [VIDEO, IMAGE, VISION_START, VISION_END]
    return model.to(dtype).eval()


def make_pixels(frames: int, height: int, width: int, seed: int) -> torch.Tensor:
    """[T, 3, H, W]: two still scenes with a moving square and little noise, so that some tokens are static."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, 3, height, width, generator=g)
    video = scenes[(torch.arange(frames) * 2) // max(frames, 1)].clone()
    for t in range(frames):
        x = (3 * t) % max(1, width - 8)
        video[t, :, 4:12, x : x + 8] = torch.randn(3, 8, 8, generator=g)
    return video + 0.01 * torch.randn(video.shape, generator=g)


def qwen_patches(video: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Flat patches as Qwen's processor lays them out, and the grid (t, h, w) in patches."""
    t, c, h, w = video.shape
    gt, gh, gw = t // 2, h // 4, w // 4
    x = video.view(gt, 2, c, gh // 2, 2, 4, gw // 2, 2, 4)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(gt * gh * gw, c * 2 * 16), [gt, gh, gw]


def tokens_of(family: str, video: torch.Tensor) -> int:
    """Placeholders of a video (its newline included)."""
    if family == "llava_onevision":
        return video.shape[0] * 16 + 1
    return (video.shape[0] // 2) * (video.shape[2] // 8) * (video.shape[3] // 8)


def make_video(family: str, *, frames: int = 6, side: tuple[int, int] = (24, 32), seed: int = 0) -> torch.Tensor:
    height, width = (28, 28) if family == "llava_onevision" else side
    return make_pixels(frames, height, width, seed)


def build(
    family: str,
    rows: list[list[Any]],
    *,
    dtype: torch.dtype = torch.float32,
    side: str = "left",
) -> dict[str, torch.Tensor]:
    """A batch. Each row lists ints (text tokens), videos [T, 3, H, W] and ("image", [3, H, W])."""
    sequences, videos, images = [], [], []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids.append(part)
            elif isinstance(part, tuple):
                images.append(part[1])
                if family == "llava_onevision":
                    # 7 x 7 patches; the anyres grid of one tile adds a second copy with a newline per row
                    ids += [IMAGE] * (49 + 7 * 8)
                else:
                    ids += [VISION_START] + [IMAGE] * (part[1].shape[1] // 8 * part[1].shape[2] // 8) + [VISION_END]
            else:
                videos.append(part)
                count = tokens_of(family, part)
                ids += [VIDEO] * count if family == "llava_onevision" else [VISION_START, *[VIDEO] * count, VISION_END]
        sequences.append(ids)
    width = max(map(len, sequences))

    def padded(ids: list[int], fill: int) -> list[int]:
        rest = [fill] * (width - len(ids))
        return rest + ids if side == "left" else ids + rest

    inputs = {
        "input_ids": torch.tensor([padded(s, PAD) for s in sequences]),
        "attention_mask": torch.tensor([padded([1] * len(s), 0) for s in sequences]),
    }
    if family == "llava_onevision":
        if videos:
            inputs["pixel_values_videos"] = torch.stack(videos).to(dtype)
        if images:
            inputs["pixel_values"] = torch.stack([torch.stack([x, x]) for x in images]).to(dtype)
            inputs["image_sizes"] = torch.tensor([[28, 28]] * len(images))
    else:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        if videos:
            patches, grids = zip(*map(qwen_patches, videos), strict=True)
            inputs["pixel_values_videos"] = torch.cat(patches).to(dtype)
            inputs["video_grid_thw"] = torch.tensor(grids)
            inputs["second_per_grid_ts"] = torch.tensor([1.0] * len(videos))
        if images:
            patches, grids = zip(*(qwen_patches(torch.stack([x, x])) for x in images), strict=True)
            inputs["pixel_values"] = torch.cat(patches).to(dtype)
            inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def prompt(family: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    """One row: text, a video, text."""
    dtype = kwargs.pop("dtype", torch.float32)
    return build(family, [[5, 6, 7, make_video(family, **kwargs), 11, 12, 13]], dtype=dtype)
