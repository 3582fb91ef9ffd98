"""A stand-in for CUDA graphs on a CPU: tensor operations are written down while they run, and done again from the list.

As on a GPU nothing of Python runs again, every result lands where the recorded one lies, recording itself changes
nothing, and what asks the device for a value cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# no CUDA graph can hold them: the host would have to wait for a number, or for a shape
ASKS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "repeat_interleave", "lift_fresh"}


class Recording(TorchDispatchMode):
    """Inside the block operations are written down; `undo` takes back what they wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        flags = name in ("index", "index_put_") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]
        )
        if name in ASKS or flags:
            raise RuntimeError(f"{name}: operation not permitted while recording")
        for given, said in zip(args, func._schema.arguments, strict=False):
            if said.alias_info is not None and said.alias_info.is_write:
                self._before.append((given, given.clone()))
        out = func(*args, **kwargs)
        self.done.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for tensor, value in reversed(self._before):
            tensor.copy_(value)

    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            aliases = [x.alias_info for x in func._schema.returns if x.alias_info is not None]
            if any(not x.is_write for x in aliases) and _is_view(out, args):
                continue
            again = func(*args, **kwargs)
            if any(x.is_write for x in aliases):
                continue  # in place
            for old, new in [(out, again)] if isinstance(out, Tensor) else zip(out, again, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


def _is_view(out: Any, args: tuple[Any, ...]) -> bool:
    """Whether results lie in what was given: `reshape`, whole in inference mode, may copy or not."""
    places = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    outs = [out] if isinstance(out, Tensor) else out
    return all(x.untyped_storage().data_ptr() in places for x in outs if isinstance(x, Tensor))


def record_cpu(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """What `record_cuda` does, on a CPU."""
    recording = Recording()
    with recording:
        output = run()
    recording.undo()
    return recording.replay, output
