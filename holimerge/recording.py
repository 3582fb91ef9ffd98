"""Recording what a call launches on a GPU as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import torch

Recorder = Callable[[Callable[[], Any], torch.device], tuple[Callable[[], None], Any]]


_RECORDING = Lock()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are recorded: one stream a device, since cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


def record_cuda(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Record what `run` launches on the device; it must have run before. Nothing is computed.

    Returns:
        a function that does it all, and what `run` returned, whose tensors that function fills.
    """
    graph, stream, current = torch.cuda.CUDAGraph(), _stream(device), torch.cuda.current_stream(device)
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
