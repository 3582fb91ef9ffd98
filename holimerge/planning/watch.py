"""Clocks of the micro-benchmark: what a call takes on a CPU, and how long it keeps a GPU busy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..timing import now

PASSES = 3  # over all sizes; the median of the passes counts
SAMPLE_MS = 4.0  # a sample repeats what is shorter
QUEUED_MS = 0.5  # the same on a GPU, whose events are exact
QUEUED_CALLS = 20  # at most: what a device has in its queue is bounded
PLUG_EDGE = 4096  # of the matrices whose product keeps a device busy meanwhile
MOST_PLUGS = 16  # to begin with
_TRIES = 4


class Mark(Protocol):
    """An event on a device's queue, as `torch.cuda.Event` is one."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Queue:
    """Times work as if issuing it took no time: it waits on the device behind plugs until all of it is issued.

    plug: keeps the device busy for a while. mark: makes an event.
    """

    def __init__(self, plug: Callable[[], Any], mark: Callable[[], Mark]) -> None:
        self.plug, self.mark = plug, mark
        self.plugs = 1
        plug()
        begin, end = mark(), mark()
        begin.record()
        plug()
        end.record()
        end.synchronize()
        self.plug_ms = begin.elapsed_time(end)

    def busy(self, call: Callable[[], Any], times: int) -> float:
        """Milliseconds that one of `times` calls keeps the device busy; no call may wait for the device."""
        plugs = min(self.plugs, MOST_PLUGS)
        for _ in range(_TRIES):
            begin, end = self.mark(), self.mark()
            first = now()
            for _ in range(plugs):
                self.plug()
            start = now()
            begin.record()
            for _ in range(times):
                call()
            issued = (now() - start) * 1000
            late = begin.query()  # the plugs were done before the last call was issued
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end)
            if not late or took > 2 * issued:  # the device never waited
                break
            lead = max(self.plug_ms - (start - first) * 1000 / plugs, self.plug_ms / 10, 1e-3)  # of each plug
            plugs = max(plugs, math.ceil(1.5 * issued / lead)) + 1
        self.plugs = plugs
        return took / times


def queue_of(device: torch.device) -> Queue | None:
    """The queue of a CUDA device; None for a device that works while it is called."""
    if device.type != "cuda":
        return None
    left, right, out = (torch.ones(PLUG_EDGE, PLUG_EDGE, device=device, dtype=torch.bfloat16) for _ in range(3))
    return Queue(lambda: torch.mm(left, right, out=out), lambda: torch.cuda.Event(enable_timing=True))


class Watch:
    """Times calls on a device, in passes over all of them, so that a busy second spoils one sample and not a size.

    queue: measure by it how long the device is busy; None: the host's clock, the device's work included.
    """

    def __init__(self, device: torch.device, queue: Queue | None = None) -> None:
        self.device, self.queue = device, queue
        self.calls: dict[Any, Callable[[], Any]] = {}

    def once(self, call: Callable[[], Any], times: int) -> float:
        """Milliseconds of one of `times` calls."""
        if self.queue is not None:
            return self.queue.busy(call, times)
        return self.whole(call, times)

    def whole(self, call: Callable[[], Any], times: int = 1) -> float:
        """The same by the host's clock, from a device at rest to a device at rest."""
        self.wait()
        begin = now()
        for _ in range(times):
            call()
        self.wait()
        return (now() - begin) * 1000 / times

    def wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize(self.device)

    def add(self, name: Any, call: Callable[[], Any]) -> float:
        """Note a call and run it once; returns about how long it takes."""
        call()
        self.calls[name] = call
        return self.once(call, 1)

    def medians(self, passes: int | None = None) -> dict[Any, float]:
        """Milliseconds of every call that was added; forgets them."""
        enough, most = (SAMPLE_MS, 200) if self.queue is None else (QUEUED_MS, QUEUED_CALLS)
        times = {
            name: min(most, max(1, math.ceil(enough / max(1e-3, self.once(call, 1)))))
            for name, call in self.calls.items()
        }
        samples: dict[Any, list[float]] = {name: [] for name in self.calls}
        for _ in range(PASSES if passes is None else passes):
            for name, call in self.calls.items():
                samples[name].append(self.once(call, times[name]))
        self.calls.clear()
        return {name: statistics.median(found) for name, found in samples.items()}

    def room(self) -> float:
        """Bytes that a measurement may take of the device."""
        return torch.cuda.mem_get_info(self.device)[0] / 2 if self.device.type == "cuda" else math.inf
