"""Milliseconds by stage, without stopping the device: CUDA events are read only when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
            self._host[name] = self._host.get(name, 0.0) - time.perf_counter()

    def stop(self, name: str, device: torch.device) -> None:
        """End the stage of that name that was started last."""
        if device.type == "cuda":
            for stage, _, end in reversed(self._events):
                if stage == name:
                    end.record(torch.cuda.current_stream(device))
                    return
        else:
            self._host[name] += time.perf_counter()

    def milliseconds(self) -> dict[str, float]:
        """Stage name -> ms. Waits for the device if a stage has not finished."""
        total = {name: seconds * 1000 for name, seconds in self._host.items()}
        for name, begin, end in self._events:
            end.synchronize()
            total[name] = total.get(name, 0.0) + begin.elapsed_time(end)
        return total
