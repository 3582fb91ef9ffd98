"""Counting the FLOPs that really run, to check the analytic ones (`holimerge.cost`, convention `exact`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _counter() -> FlopCounterMode:
    # On the CPU sdpa dispatches an operator that torch's registry does not know: attention would count as nothing.
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def count_flops(fn: Callable[[], object]) -> int:
    """FLOPs (multiply-adds times two) of all matrix products, convolutions and attentions while `fn()` runs.

    Works for CPU, CUDA and meta tensors, sdpa and eager attention, without gradients. Kernels outside torch (the
    flash-attn package) are not seen.
    """
    with torch.no_grad(), _counter() as counter:
        fn()
    return counter.get_total_flops()


def count_flops_by_module(fn: Callable[[], object], model: nn.Module) -> dict[str, int]:
    """The same, by module of `model` (its qualified name; a module includes its children). Modules without FLOPs are
    left out, and work that runs outside of any module's forward is in the entry ``""``, the total."""
    with torch.no_grad(), _counter() as counter:
        fn()
    root = type(model).__name__
    found = {"": counter.get_total_flops()}
    for name, operators in counter.get_flop_counts().items():
        if name.startswith(f"{root}."):
            found[name.removeprefix(f"{root}.")] = sum(operators.values())
    return found
