"""Recording what a call launches on a GPU as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from threading import Lock, get_ident
from typing import Any

import torch

Recorder = Callable[[Callable[[], Any], torch.device], tuple[Callable[[], None], Any]]


_RECORDING = Lock()


@cache
def _stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """Where a thread records: cuBLAS keeps a workspace for each stream, which graphs recorded there share, so that they
    must not run at the same time."""
    return torch.cuda.Stream(device)


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
    stream = stream or _stream(device, get_ident())
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
