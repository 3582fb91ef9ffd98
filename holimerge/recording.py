"""Recording what a call launches on a GPU as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from threading import Lock, local
from typing import Any

import torch
from torch import nn

Recorder = Callable[[Callable[[], Any], torch.device], tuple[Callable[[], None], Any]]
_RECORDING = Lock()
_STREAMS = local()
_QUIET = ("transformers.", "holimerge.", "accelerate.")  # whose hooks do the same each time


def watched(module: nn.Module) -> bool:
    """Whether a hook of somebody's own is on a module: nothing calls it when a graph is replayed."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not (getattr(hook, "__module__", None) or "").startswith(_QUIET) for hook in hooks)


def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where this thread records: cuBLAS keeps a workspace for each stream, which graphs recorded there share, so that
    they should not run at the same time. (torch's streams come from a ring of 32.)"""
    streams: dict[torch.device, torch.cuda.Stream] = _STREAMS.__dict__.setdefault("by_device", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def record_cuda(
    run: Callable[[], Any], device: torch.device, stream: torch.cuda.Stream | None = None
) -> tuple[Callable[[], None], Any]:
    """Record what `run` launches on the device; it must have run before. Nothing is computed.

    Args:
        run: waits for nothing.
        stream: to record on; that of the thread if not given. What is recorded on one stream may only run in turns.

    Returns:
        a function that does it all, and what `run` returned, whose tensors that function fills.
    """
    stream = stream or _stream(device)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # not `torch.cuda.graph`: it gives the allocator's memory back, which the next prompt would have to ask for again
    with _RECORDING, torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_stream(current)
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
        try:
            output = run()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(stream)
    return graph.replay, output
