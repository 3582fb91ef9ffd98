"""patch_model, unpatch_model, merging, last_report."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from .config import Config, load_config
from .handle import Handle
from .registry import REFUSED, family_module, list_families
from .report import Report

TESTED_TRANSFORMERS = ("5.16", "5.23")

ModelT = TypeVar("ModelT", bound=nn.Module)
ConfigLike = str | os.PathLike[str] | Mapping[str, Any] | Config


def _inner_model(model: Any) -> Any:
    """The Hugging Face model inside torch.compile's and PEFT's wrappers."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def _handle(model: Any) -> Handle | None:
    return getattr(_inner_model(model), "__dict__", {}).get("_holimerge_handle")


@cache
def _check_version() -> None:
    low, high = (Version(v) for v in TESTED_TRANSFORMERS)
    here = Version(transformers.__version__)
    if not low.release <= here.release[:2] <= high.release:
        warnings.warn(
            f"holimerge was tested with transformers {low} to {high}; this is {here}. "
            "If results look wrong, compare with an unpatched run.",
            stacklevel=3,
        )


def _reset_dynamo() -> None:
    # A model compiled before keeps running its old graph, without our hooks: silently wrong. Nothing has been compiled
    # if dynamo was never imported.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def patch_model(model: ModelT, cfg: ConfigLike) -> ModelT:
    """Make a Hugging Face video LLM merge redundant video tokens.

    Args:
        model: a model of a supported family (`list_families()`), also dispatched by accelerate or wrapped by PEFT. Only
            this instance changes. A model that is patched already gets the new configuration instead of the old.
        cfg: a preset's name (`list_presets()`), a path to a YAML file, a dict, or a `Config`.

    Returns:
        the same object.

    Raises:
        TypeError: the model's family is not supported (the message lists those that are), or not by this transformers.
        ConfigError: the configuration is wrong, or cannot be used with this model. Nothing is changed then.

    A call of the patched model raises a ValueError, and the next call is as if it had not been, for a video without a
    frame, for sizes of videos that are missing, for placeholders in another row than their video, and for a video of
    whose features some are NaN or infinite (nothing can be chosen among them). A method that chooses nothing
    (`keep_all`) gives what the stock model makes of such a video.
    """
    config = load_config(cfg)
    inner = _inner_model(model)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if not isinstance(inner, PreTrainedModel) or model_type not in list_families() or not inner.can_generate():
        what = type(inner).__name__ + (f" (model_type {model_type!r})" if model_type else "")
        if model_type in REFUSED:
            raise TypeError(f"cannot patch {what}: {REFUSED[model_type]}")
        raise TypeError(
            f"cannot patch {what}; supported are the generating models of these families: {', '.join(list_families())}"
        )
    _check_version()
    family = family_module(str(model_type)).FAMILY
    if Version(transformers.__version__).release < Version(family.since).release:
        raise TypeError(
            f"cannot patch {type(inner).__name__}: {model_type} needs transformers {family.since} or newer; "
            f"this is {transformers.__version__}"
        )
    handle = Handle(inner, family, config)  # refuses before anything is touched
    old = _handle(model)
    if old is not None:
        old.detach()
    handle.attach()
    _reset_dynamo()
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model`: the model computes, looks and saves as before it was patched. Returns the same object.

    Finish a conversation before unpatching: a cache filled while patched holds fewer tokens than its caller counts.

    Raises:
        ValueError: the model is not patched.
    """
    handle = _handle(model)
    if handle is None:
        raise ValueError(f"this {type(model).__name__} is not patched")
    handle.detach()
    _reset_dynamo()
    return model


@contextmanager
def merging(model: ModelT, cfg: ConfigLike) -> Iterator[ModelT]:
    """`with merging(model, cfg):` patches inside the block; afterwards the model is as before (patched or not)."""
    old = _handle(model)
    patch_model(model, cfg)
    try:
        yield model
    finally:
        if old is None:
            if _handle(model) is not None:  # unless the block did it
                unpatch_model(model)
        else:
            patch_model(model, old.config)


def last_report(model: nn.Module) -> Report:
    """What the last forward of this thread did: tokens by video, milliseconds by stage.

    After `generate` it tells about the prompt; decoding steps leave the report as it is.

    Raises:
        ValueError: the model is not patched.
        RuntimeError: no forward has run since it was patched.
    """
    handle = _handle(model)
    if handle is None:
        raise ValueError(f"this {type(model).__name__} is not patched")
    return handle.report
