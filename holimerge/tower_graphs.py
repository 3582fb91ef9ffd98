"""CUDA graphs of a vision tower: what launching its kernels costs the host is paid once for each shape of input.

Once fewer tokens enter the LLM, launching the tower takes longer than computing it on a fast GPU. The kernels and their
order are those of the eager call, so that the result is the same.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .recording import record_cuda, watched

WARM_UP = 2  # eager calls before a capture: kernels are chosen and workspaces made in them
MOST = 4  # graphs kept; each holds the memory of one call


class _Graph:
    """One captured call: the tensors it reads, and what it gives."""

    def __init__(
        self, call: Callable[[Mapping[str, Any]], Any], arguments: Mapping[str, Any], turns: dict[Any, Any]
    ) -> None:
        self.inputs = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
        given = {**arguments, **self.inputs}
        self.device = next(iter(self.inputs.values())).device
        if self.device not in turns:
            turns[self.device] = torch.cuda.Stream(self.device), torch.cuda.Event()
        side, self.done = turns[self.device]
        self._replay, (self.tensors, self.more) = record_cuda(lambda: call(given), self.device, side)

    def replay(self, arguments: Mapping[str, Any]) -> tuple[list[Tensor | None], Any]:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)  # what another thread's stream began: they share memory
        for name, x in self.inputs.items():
            x.copy_(arguments[name], non_blocking=True)
        self._replay()
        copies = [None if x is None else x.clone() for x in self.tensors]
        self.done.record(stream)
        return copies, self.more


class Graphs:
    """The graphs of one patched model; they go with its patch."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._turns: dict[Any, Any] = {}  # by device: the stream that graphs are recorded on, and the end of the last

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        from copy import deepcopy

        return Graphs(deepcopy(self.tower, memo))  # graphs name the memory of this one

    def clear(self) -> None:
        """Give the graphs' memory back."""
        with self._lock:
            while self._known:
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, oldest = self._known.popitem(last=False)
        oldest.done.synchronize()  # its memory is free only when no stream uses it any more

    def run(
        self,
        call: Callable[[Mapping[str, Any]], tuple[list[Tensor | None], Any]],
        arguments: Mapping[str, Any],
        also: Hashable = None,
    ) -> tuple[list[Tensor | None], Any]:
        """`call(arguments)`, replayed where it can be.

        Args:
            call: gives tensors that depend on `arguments` and the tower's weights alone, and something that depends on
                the shapes alone; it must not wait for the device.
            arguments: by name; the tensors among them may have other values next time.
            also: what else decides the kernels or that something.

        Returns:
            what `call` gives; tensors of its own.

        Raises:
            RuntimeError: CUDA cannot capture this call.
        """
        first = next((x for x in arguments.values() if isinstance(x, Tensor)), None)
        if first is None or not _on_gpu(first) or torch.is_grad_enabled():
            return call(arguments)
        with self._lock:
            key = self._key(arguments, also)
            if key is None:
                return call(arguments)
            if key not in self._known:
                for _ in range(WARM_UP):
                    call(arguments)
                while len(self._known) >= MOST:
                    self._forget_oldest()
                self._known[key] = self._captured(call, arguments)
            self._known.move_to_end(key)
            return self._known[key].replay(arguments)

    def _captured(self, call: Callable[[Mapping[str, Any]], Any], arguments: Mapping[str, Any]) -> _Graph:
        try:
            return _Graph(call, arguments, self._turns)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graph: this vision tower cannot be captured ({str(error).splitlines()[0]}); leave cuda_graph "
                "out of the configuration"
            ) from error

    def _key(self, arguments: Mapping[str, Any], also: Hashable) -> Hashable | None:
        """Everything on which the kernels depend: shapes, plain arguments, where the weights lie, modes.

        None where a call does more than launch the same kernels: hooks of others, weights that move, adapters that are
        switched, compiled modules, autocast (which casts weights once and forgets them).
        """
        if torch.is_autocast_enabled("cuda"):
            return None
        places: list[int] = []
        left: list[nn.Module] = [self.tower]
        while left:  # several times faster than `parameters()`, at every prompt
            module = left.pop()
            own = {"_hf_hook", "forward"} & module.__dict__.keys()  # accelerate's, or somebody's
            if own or watched(module) or module._compiled_call_impl is not None:
                return None
            if type(module).__module__.startswith("peft."):
                return None
            places.append(id(type(module)))
            for tensors in (module._parameters, module._buffers):
                places += [0 if x is None else x.data_ptr() for x in tensors.values()]
            left += [m for m in module._modules.values() if m is not None]
        shapes = tuple(
            (name, tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else (name, repr(x))
            for name, x in sorted(arguments.items())
        )
        attention = getattr(getattr(self.tower, "config", None), "_attn_implementation", None)
        modes = (self.tower.training, torch.is_inference_mode_enabled(), attention)
        return shapes, tuple(places), modes, also


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()
