"""Bytes of the tensors that are alive at once, where no allocator counts them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all of them, each counted once."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once, on any device.

    peak: bytes, valid after the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs or {})) if isinstance(x, Tensor)}
        output = func(*args, **(kwargs or {}))
        for x in tree_iter(output):
            if isinstance(x, Tensor):
                self._made(x, given)
        return output

    def _made(self, x: Tensor, given: set[int]) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in given:  # a view, or written in place
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
