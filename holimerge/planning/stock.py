"""The stages of a model that is not patched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..api import _inner_model
from ..registry import family_module
from ..timing import StageClock


@contextmanager
def watched(model: Any) -> Iterator[StageClock]:
    """Time vision and prefill of an unpatched model inside the block; afterwards it is as it was.

    model: of a supported family, also wrapped as the public functions take it.
    """
    inner = _inner_model(model)
    family = family_module(inner.config.model_type).FAMILY
    core, language_model = family.core(inner), family.language_model(inner)
    clock = StageClock()
    stock = core.get_video_features
    own = core.__dict__.get("get_video_features")  # somebody else's replacement, which stays

    @functools.wraps(stock)
    def timed(*args: Any, **kwargs: Any) -> Any:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with clock.stage("vision", next(tensors).device):
            return stock(*args, **kwargs)

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:  # decoding steps are not the prefill
            clock.start("prefill", kwargs["inputs_embeds"].device)

    def end(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            clock.stop("prefill", kwargs["inputs_embeds"].device, output[0].device)

    hooks = [
        language_model.register_forward_pre_hook(begin, with_kwargs=True),
        language_model.register_forward_hook(end, with_kwargs=True),
    ]
    core.__dict__["get_video_features"] = timed
    try:
        yield clock
    finally:
        del core.__dict__["get_video_features"]
        if own is not None:
            core.__dict__["get_video_features"] = own
        for hook in hooks:
            hook.remove()
