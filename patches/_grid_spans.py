"""Attention of a tower's windows and frames in one call for all of one length, where transformers makes one call each.

The stock attention hands a flash implementation every row and the marks of the spans, and calls any other once per
span. Inside our own call its configuration therefore names an implementation of ours, which counts as flash by its
name; it batches the spans and calls the user's (sdpa or eager). Other threads and the user's own calls see the
configuration as it is.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from holimerge.attention import logits_at_once
from holimerge.encoder.tower import Hooks, Tower
from holimerge.spans import Batches

NAME = "holimerge_spans_as_flash"
_MOST = 65535  # kernels count the batch in a dimension of their launch that goes no further
_NAMING = threading.Lock()
_CALL: ContextVar[BatchedAttention | None] = ContextVar("holimerge_batched_attention", default=None)


class _Config:
    """An attention's configuration, which names our implementation to a call that batches spans right now."""

    __slots__ = ("_holimerge_real", "_holimerge_users")

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_holimerge_real", real)
        object.__setattr__(self, "_holimerge_users", 0)

    @property
    def _attn_implementation(self) -> Any:
        call = _CALL.get()
        return self._holimerge_real._attn_implementation if call is None or call.now is None else NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_holimerge_real"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._holimerge_real, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:  # of a model in whose tower another thread is
        return copy.deepcopy(self._holimerge_real, memo)

    def __reduce__(self) -> Any:
        return copy.copy, (self._holimerge_real,)


class BatchedAttention:
    """One call of a tower.

    now: the spans of the attention that runs, until it has attended; None where it runs as it is.
    """

    def __init__(self, tower: Tower, mode: str) -> None:
        """mode: "stock", "batched", or "auto" for batched on a GPU."""
        # run again in the backward pass, outside of our call, blocks would not find what they had saved
        again = any(block.training and getattr(block, "gradient_checkpointing", False) for block in tower.blocks)
        self.attentions = [] if mode == "stock" or again else [a for a in tower.attentions if _known(a)]
        self.spans, self.mode = tower.spans, mode
        self.now: Batches | None = None

    def hooks(self) -> Hooks:
        """For `holimerge.capture.captured`."""
        return [(attention, "arguments", self._entering(attention)) for attention in self.attentions]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Inside the block the attentions' configurations may name our implementation, to this call alone."""
        if not self.attentions:
            yield
            return
        AttentionInterface.register(NAME, _attend)
        with _NAMING:
            configs = [_hold(attention) for attention in self.attentions]
        token = _CALL.set(self)
        try:
            yield
        finally:
            _CALL.reset(token)
            with _NAMING:
                for attention, config in zip(self.attentions, configs, strict=True):
                    _release(attention, config)

    def _entering(self, attention: Any) -> Any:
        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            self.now = None
            rows, ends = args[0] if args else kwargs.get("hidden_states"), kwargs.get("cu_seqlens")
            if rows is None or ends is None or (self.mode == "auto" and rows.device.type != "cuda"):
                return args, kwargs
            if attention.config._attn_implementation not in ("sdpa", "eager"):
                return args, kwargs
            self.now = self.spans.batches(ends, rows.device)
            return args, {**kwargs, "max_seqlen": self.now.longest}  # or it would ask the device

        return enter


def _known(attention: Any) -> bool:
    """Whether an attention finds its implementation the way that all of them do."""
    module = sys.modules[type(attention).__module__]
    return "config" in vars(attention) and all(
        hasattr(module, name) for name in ("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward")
    )


def _hold(attention: Any) -> _Config:
    config = attention.__dict__["config"]
    if type(config) is not _Config:
        config = attention.__dict__["config"] = _Config(config)
    object.__setattr__(config, "_holimerge_users", config._holimerge_users + 1)
    return config


def _release(attention: Any, config: _Config) -> None:
    object.__setattr__(config, "_holimerge_users", config._holimerge_users - 1)
    if not config._holimerge_users and attention.__dict__.get("config") is config:
        attention.__dict__["config"] = config._holimerge_real


@torch.compiler.disable  # the numbers of every video would make a new graph
def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers. query, key, value: [1, heads, S, d]; returns [1, S, heads, d']."""
    call = _CALL.get()
    if call is None or call.now is None:
        raise RuntimeError(f"{NAME} is no implementation to ask for: it works inside a patched model's own calls")
    batches, call.now = call.now, None  # from here on the configuration names the user's implementation
    source, implementation = sys.modules[type(module).__module__], module.config._attn_implementation
    attend = source.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, source.eager_attention_forward)
    given = {k: v for k, v in kwargs.items() if k not in _MARKS}
    if given.get("dropout"):
        batches = batches.in_turn()  # the same random numbers as the stock calls
    fused = implementation == "sdpa" and _is_fused(query, key, value)

    def most(length: int) -> int:
        return _MOST if fused else logits_at_once(query.shape[1] * length * length, query.device)

    def spans(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = attend(module, q, k, v, attention_mask=attention_mask, **given)[0]
        return output

    return batches.attend(spans, tuple(x[0].transpose(0, 1) for x in (query, key, value)), most)[None], None


_MARKS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "max_seqlen")


def _is_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether sdpa has a kernel that holds no logits, so that any number of spans fits."""
    if query.device.type != "cuda":
        return query.device.type == "cpu"
    backends = torch.backends.cuda
    asked = backends.SDPAParams(query, key, value, None, 0.0, False, False)
    return bool(backends.can_use_flash_attention(asked) or backends.can_use_efficient_attention(asked))
