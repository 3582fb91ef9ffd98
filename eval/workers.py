"""Several processes on one run: who I am, who does what, and waiting for the others without waiting for ever.

`accelerate launch --multi_gpu --num_processes N -m holimerge.eval ...` and `torchrun --nproc-per-node N` start the
processes and tell them their rank by the environment. (`accelerate launch --cpu` starts one process, whatever the
number; `--multi_gpu` also works on a machine without a GPU.) Each process answers every N-th video and writes a file of
its own; process 0 reads all of them. So the processes talk once, at the start, and nothing hangs when one dies later:
the launcher ends the others, and where there is no launcher process 0 gives up after a time without any new answer.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from .records import Key, read_records, record_files

STALL_SECONDS = 1800.0
_JOIN_SECONDS = 600.0


class Worker(NamedTuple):
    """One process of a run of `size`. local: its number on this machine, for the choice of a GPU."""

    rank: int = 0
    size: int = 1
    local: int = 0


def this_worker() -> Worker:
    """From RANK, WORLD_SIZE and LOCAL_RANK; without them the only one.

    Raises:
        ValueError: values that make no sense.
    """
    texts = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if texts[0] is None or texts[1] is None:
        return Worker()
    try:
        rank, size, local = int(texts[0]), int(texts[1]), int(texts[2] or texts[0])
    except ValueError:
        rank, size, local = -1, 0, 0
    if not 0 <= rank < size:
        raise ValueError(
            f"RANK={texts[0]}, WORLD_SIZE={texts[1]}: start the processes by accelerate launch or torchrun"
        )
    return Worker(rank, size, local)


def agreed(worker: Worker, prepare: Callable[[], None]) -> None:
    """Process 0 runs `prepare`; the others wait for it and stop if it failed.

    Raises:
        whatever `prepare` raises, in process 0.
        ValueError: in the others, if process 0 failed or did not come.
    """
    if worker.size == 1:
        prepare()
        return
    import torch
    from torch import distributed

    wait = datetime.timedelta(seconds=_JOIN_SECONDS)
    distributed.init_process_group("gloo", rank=worker.rank, world_size=worker.size, timeout=wait)
    try:
        state = torch.zeros(1)
        if worker.rank == 0:
            try:
                prepare()
                state += 1
            finally:
                distributed.broadcast(state, 0)
            return
        try:
            distributed.broadcast(state, 0)
        except RuntimeError as error:
            raise ValueError(f"process {worker.rank}: process 0 did not come ({error})") from error
        if not state:
            raise ValueError(f"process {worker.rank}: process 0 refused to begin, its message says why")
    finally:
        distributed.destroy_process_group()


def wait_for_all(folder: Path, keys: Collection[Key], say: Callable[[int], None], stall: float = STALL_SECONDS) -> None:
    """Wait until every key has its record in some process's file.

    Args:
        folder: of the run, the same for all processes.
        keys: what there has to be.
        say: told how many are still missing, now and then.
        stall: seconds without any new byte after which the others count as dead.

    Raises:
        TimeoutError: nothing came for so long; answers that are there stay, so the run can be resumed.
    """
    seen, since, pause = -1, time.monotonic(), 0.05
    while True:
        size = 0
        for path in record_files(folder):
            try:
                size += path.stat().st_size
            except FileNotFoundError:
                continue
        if size != seen:
            missing = set(keys) - read_records(folder).keys()
            if not missing:
                return
            say(len(missing))
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > stall:
            raise TimeoutError(
                f"{len(missing)} answers of the other processes are missing and none came for {stall:.0f} s: one of "
                "them has died or hangs. What is answered is kept: start again with --resume"
            )
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)
