"""Decoding steps as CUDA graphs, for patched models and others.

A decoding step of a model of 28 layers is some thousand kernels, and the host needs longer to launch them one by one
than a GPU to run them, whatever the cache holds. With a static cache every step does the same at the same addresses, so
that it can be recorded once and replayed by one launch. `generate` has a place for a compiled step; here it gets one
that is recorded instead, which takes as long as one step and not minutes. A graph lives for one call of `generate`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from .api import _inner_model
from .call import STEPS, Wrapped
from .recording import Recorder, record_cuda, watched

_LOG = logging.getLogger("holimerge")
ModelT = TypeVar("ModelT", bound=nn.Module)


class Steps:
    """The decoding steps of one call of `generate`: the first runs as it is, the second is recorded, all are replayed.

    A step that differs from the recorded one in more than its tensors' values runs as it is.
    """

    def __init__(self, model: Any, record: Recorder) -> None:
        self.model, self._record = model, record
        self._first: Any = None
        self._replay: Callable[[], None] | None = None
        self._given: dict[str, Any] = {}
        self._output: Any = None

    def __call__(self, **inputs: Any) -> Any:
        types, ids = inputs.get("mm_token_type_ids"), inputs.get("input_ids")
        if types is not None and ids is not None and types.shape[1] > ids.shape[1] == 1:
            inputs["mm_token_type_ids"] = types[:, -1:]  # older transformers hands over all of them, one more each step
        kind = _kind(inputs)
        if kind is None or kind != self._first:
            self._first = self._first or kind
            return self.model(**inputs)
        if self._replay is None:
            self._given = _map(torch.clone, inputs)
            try:
                self._replay, self._output = self._record(lambda: self.model(**self._given), self.model.device)
            except RuntimeError as error:
                raise RuntimeError(
                    f"a decoding step of this {type(self.model).__name__} cannot be recorded as a CUDA graph "
                    f"({str(error).splitlines()[0]}); leave the block of `graphed`"
                ) from error
        else:
            _fill(self._given, inputs)
        self._replay()
        output = type(self._output)()
        for name, value in self._output.items():
            output[name] = _map(torch.clone, value)  # the next step overwrites what it is copied from
        return output


def _kind(inputs: Mapping[str, Any]) -> Any:
    """What must be the same for a recorded step to do; None where this is no decoding step over a static cache."""
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.shape[1] != 1 or not recordable(cache):
        return None
    if inputs.get("mm_encoder_outputs") is not None:  # the end of a prompt that comes in chunks
        return None
    return _map(lambda x: (x.shape, x.dtype, x.device), {**inputs, "past_key_values": id(cache)})


def recordable(cache: Any) -> bool:
    """Whether every layer of this cache writes to places that stay where they are."""
    layers = getattr(cache, "layers", None) or []
    return len(layers) > 0 and not cache.offloading and all(type(layer) is StaticLayer for layer in layers)


def _map(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with its tensors changed, in dicts and tuples too."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {name: _map(change, x) for name, x in value.items()}
    return tuple(_map(change, x) for x in value) if type(value) is tuple else value


def _fill(old: Any, new: Any) -> None:
    """Write the tensors of `new` into those of `old`, in dicts and tuples too."""
    if isinstance(new, Tensor):
        old.copy_(new)
    elif type(new) is dict:
        for name, value in new.items():
            _fill(old[name], value)
    elif type(new) is tuple:
        for before, value in zip(old, new, strict=True):
            _fill(before, value)


class Block:
    """One block of `graphed`: whether it lasts, and the thread that opened it."""

    def __init__(self) -> None:
        self.active, self.thread = True, get_ident()


class _Graphed:
    """What stands in for three methods of a model inside a block of `graphed`."""

    def __init__(self, model: Any, record: Recorder, block: Block) -> None:
        self.model, self.record, self.block = model, record, block

    def __deepcopy__(self, memo: dict[int, Any]) -> _Graphed:
        twin = memo[id(self)] = _Graphed(copy.deepcopy(self.model, memo), self.record, self.block)
        return twin  # ends with the block of the original

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.block.active:  # a patch of the block, or a copy, may still lead here
            return original(*args, **kwargs)
        given = kwargs.get("generation_config") or self.model.generation_config
        if kwargs.get("compile_config") is not None or getattr(given, "compile_config", None) is not None:
            raise ValueError("compile_config: inside `graphed` steps are recorded, not compiled; leave one of them out")
        chunk = kwargs.get("prefill_chunk_size") or getattr(given, "prefill_chunk_size", None)
        if chunk == 1:
            raise ValueError(
                "prefill_chunk_size=1: inside `graphed` a prompt's chunks of one token look like steps of an answer; "
                "use larger chunks"
            )
        if any(watched(module) for module in self.model.modules()):
            _LOG.warning("graphed: hooks of your own watch this model, and a replayed step would not call them: eager")
            return original(*args, **{**kwargs, "disable_compile": True})
        self.model.__dict__.pop("_previous_max_cache_length", None)  # for graphs to be used again: these are not
        token = STEPS.set(Steps(self.model, self.record))
        try:
            return original(*args, **kwargs)
        finally:
            STEPS.reset(token)

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return STEPS.get() or original(*args, **kwargs)

    def asked(self, original: Callable[..., Any], model_kwargs: Any, *args: Any, **kwargs: Any) -> bool:
        if STEPS.get() is None:
            return bool(original(model_kwargs, *args, **kwargs))
        cache = model_kwargs.get("past_key_values")
        if not recordable(cache):
            if get_ident() != self.block.thread:
                return False  # another thread's call knows nothing of the block
            kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
            raise ValueError(
                f"graphed: a {type(cache).__name__} ({', '.join(kinds) or 'empty'}) does not stay in place; pass "
                "cache_implementation='static', or leave the block"
            )
        return True


@contextlib.contextmanager
def graphed(model: ModelT, *, record: Recorder | None = None) -> Iterator[ModelT]:
    """Inside the block `generate` with a static cache replays its decoding steps, each with one launch.

        with holimerge.graphed(model):
            model.generate(**inputs, cache_implementation="static", max_new_tokens=256)

    Answers are those of the same call outside. Beams and assistants run as they do outside, and so does a model that
    hooks of your own watch, since a replayed step calls none. A static cache takes the
    memory of the whole answer from the start, but not that of what a patched model left out.

    Args:
        model: of transformers, on one CUDA device, patched or not.
        record: how a step is recorded; `record_cuda` if not given.

    Raises:
        ValueError: the model is not on one CUDA device; in `generate`: a cache that does not stay in place (dynamic,
            sliding windows, linear layers), a `compile_config`, or chunks of one token.
        RuntimeError: in `generate`: a step does what no graph can hold.
    """
    inner: Any = _inner_model(model)
    devices = {p.device for p in inner.parameters()}
    if record is None and (len(devices) != 1 or next(iter(devices)).type != "cuda"):
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"graphed: CUDA graphs need a model on one CUDA device; this one is on {where}")
    graph = _Graphed(inner, record or record_cuda, Block())
    runs = {"generate": graph.generate, "get_compiled_call": graph.step, "_valid_auto_compile_criteria": graph.asked}
    before = {name: inner.__dict__[name] for name in runs if name in inner.__dict__}
    ours = {name: Wrapped(getattr(inner, name), run) for name, run in runs.items()}
    inner.__dict__.update(ours)
    try:
        yield model
    finally:
        graph.block.active = False
        for name, function in ours.items():
            if inner.__dict__.get(name) is function:
                del inner.__dict__[name]
                inner.__dict__.update({name: before[name]} if name in before else {})
