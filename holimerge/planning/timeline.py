"""Stages from steps: a host that issues work and a device that does it, one behind the other.

On a CPU both are the same and times add up. On a GPU the host runs ahead while the device is busy, and the device idles
where launching takes longer than the work; a stage takes about the larger of the two, and where the host waits for the
device it has no head start afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Work of one stage that is issued together.

    device: ms that it keeps the device busy. host: ms to issue it. waits: the host then waits until all is done.
    """

    stage: str
    device: float
    host: float = 0.0
    waits: bool = False


def by_stage(steps: Iterable[Step], stages: Iterable[str]) -> dict[str, float]:
    """Milliseconds of every stage as the device sees them: from the end of the work before it to the end of its own.

    They add up to the end of the last step, and their sum never falls when a step gets longer.
    """
    ms = dict.fromkeys(stages, 0.0)
    issued = done = 0.0  # when the host has issued, and the device finished, everything so far
    for step in steps:
        issued += step.host
        ended = max(done + step.device, issued)
        ms[step.stage] += ended - done
        done = ended
        if step.waits:
            issued = done
    return ms
