"""A checkpoint, from a folder or the hub, ready to be asked about a video; no torchvision, no processor class."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from holimerge.registry import list_families

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """model, tokenizer, and the settings and chat template that `holimerge.inputs.build_inputs` takes."""

    model: Any
    tokenizer: Any
    settings: Any
    chat_template: str | None


def read_config(model_id_or_path: str | os.PathLike[str]) -> Any:
    """The checkpoint's config, without its weights.

    Raises:
        FileNotFoundError: no such folder, or none with a config.json.
        TypeError: the model's family is not supported; the message lists those that are, and for checkpoints of the
            LLaVA-NeXT code names the command that converts them.
        OSError: the hub cannot be reached or has no such model.
    """
    from transformers import AutoConfig, PreTrainedConfig

    text = os.fspath(model_id_or_path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        text = str(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: the folder has no config.json, so it holds no model")
    elif text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{text}: no such folder with a model")
    # The raw file first: a model_type that transformers does not know is still ours to explain.
    raw, _ = PreTrainedConfig.get_config_dict(text)
    kind = raw.get("model_type")
    if kind not in list_families():
        hint = ""
        if kind in ("llava", "llava_qwen"):
            hint = (
                " (for lmms-lab's LLaVA-Video run `holimerge convert-llava-video` first; "
                "the other lmms-lab checkpoints have llava-hf conversions)"
            )
        raise TypeError(
            f"{model_id_or_path}: cannot load model_type {kind!r}{hint}; "
            f"supported families: {', '.join(list_families())}"
        )
    if kind == "llava_video":
        importlib.import_module("holimerge.llava_video")  # tells the Auto classes of it
    return AutoConfig.from_pretrained(text)


def read_settings(model_id_or_path: str | os.PathLike[str], config: Any) -> Any:
    """The checkpoint's preprocessor settings, without its weights; raises what `load_preprocessor` raises."""
    from holimerge.preprocess import load_preprocessor

    return load_preprocessor(_source(model_id_or_path), config.model_type, config)


def _source(model_id_or_path: str | os.PathLike[str]) -> str:
    folder = Path(model_id_or_path).expanduser()
    return str(folder) if folder.is_dir() else os.fspath(model_id_or_path)


def load(
    model_id_or_path: str | os.PathLike[str],
    *,
    device_map: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    settings: Any = None,
) -> Loaded:
    """Load a checkpoint through the Auto classes.

    Args:
        model_id_or_path: a hub id, or a folder with config, weights and tokenizer.
        device_map: accelerate's, for instance "auto", "cuda:0", "cpu"; None is "auto" where there is a CUDA device.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None leaves transformers' choice.
        settings: from `read_settings`, where they have been read already.

    Raises:
        ValueError: another dtype, or files that cannot be used.
        FileNotFoundError, TypeError, OSError: as in `read_config`; nothing has been loaded then.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from holimerge.inputs import load_chat_template

    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; valid: {', '.join(DTYPES)}")
    config = read_config(model_id_or_path)
    source = _source(model_id_or_path)
    settings = settings or read_settings(model_id_or_path, config)
    template = load_chat_template(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    if device_map is not None:
        options["device_map"] = device_map
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model = AutoModelForImageTextToText.from_pretrained(source, config=config, **options)
    return Loaded(model.eval(), tokenizer, settings, template)


def first_device(device_map: str | None) -> str:
    """Where `load` puts the vision tower, as far as it can be told before the weights are there; else "cpu"."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda:0"
    return device_map if device_map.startswith("cuda") else "cpu"


def to_model(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Inputs on the model's device, pixels in its dtype."""
    moved = {key: value.to(model.device) for key, value in inputs.items()}
    if "pixel_values_videos" in moved:
        moved["pixel_values_videos"] = moved["pixel_values_videos"].to(model.dtype)
    return moved
