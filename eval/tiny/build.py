"""From trained weights to a checkpoint folder that `from_pretrained` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .architecture import tiny_config
from .language import tokenizer
from .world import SIDE


def write_checkpoint(model: Any, folder: Path) -> None:
    """Write config, bf16 weights, tokenizer and processor files in the Hugging Face layout."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }
    image = {**pixels, "image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": [[SIDE, SIDE]]}
    video = {**pixels, "video_processor_type": "LlavaOnevisionVideoProcessor"}
    tokens = (SIDE // 16) ** 2
    joint = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": tokens,
        "vision_feature_select_strategy": "full",
    }
    for name, content in (
        ("preprocessor_config.json", image),
        ("video_preprocessor_config.json", video),
        ("processor_config.json", joint),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tiny_model() -> Any:
    """An untrained model of `tiny_config`, seeded by torch's global generator."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(tiny_config())
