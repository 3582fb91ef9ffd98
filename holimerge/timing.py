"""Milliseconds by stage, without stopping the device: CUDA events are read only when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_HOST: ContextVar[Callable[[], float]] = ContextVar("holimerge_host_clock", default=time.perf_counter)


def now() -> float:
    """Seconds of the host's clock: the wall clock, if `reading` says nothing else."""
    return _HOST.get()()


def quiet_clock(device: torch.device) -> Callable[[], float]:
    """The clock least disturbed by others on the machine: one thread on a CPU works as long as its process runs.

    Without other load it shows what the wall clock shows. Several threads or another device need the wall clock.
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@contextmanager
def reading(clock: Callable[[], float]) -> Iterator[None]:
    """Inside the block the host's times are read from `clock`."""
    token = _HOST.set(clock)
    try:
        yield
    finally:
        _HOST.reset(token)


class StageClock:
    """Adds up the time of named stages. On CUDA two events a stage, elsewhere the host's clock."""

    def __init__(self) -> None:
        self._host: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Time the block; its work may still be running on the device when the block ends."""
        self.start(name, device)
        try:
            yield
        finally:
            self.stop(name, device)

    def start(self, name: str, device: torch.device) -> None:
        """Begin a stage that `stop` ends elsewhere."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            self._events.append((name, event, torch.cuda.Event(enable_timing=True)))
        else:
            self._host[name] = self._host.get(name, 0.0) - now()

    def stop(self, name: str, device: torch.device, last: torch.device | None = None) -> None:
        """End the stage of that name that was started last. last: the device that finishes it, if that is another."""
        if device.type == "cuda":
            if last is not None and last.type == "cuda" and last != device:
                torch.cuda.current_stream(device).wait_stream(torch.cuda.current_stream(last))
            for stage, _, end in reversed(self._events):
                if stage == name:
                    end.record(torch.cuda.current_stream(device))
                    return
        else:
            self._host[name] += now()

    def milliseconds(self) -> dict[str, float]:
        """Stage name -> ms. Waits for the device if a stage has not finished."""
        total = {name: seconds * 1000 for name, seconds in self._host.items()}
        for name, begin, end in self._events:
            end.synchronize()
            total[name] = total.get(name, 0.0) + begin.elapsed_time(end)
        return total
