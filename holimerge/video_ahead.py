"""Work in threads ahead of the one that takes its results, in order.

Whoever takes the results sees what a plain loop would have given: the same values, the same order, and the error of the
first place that failed, after everything before it. Threads end before the generator does, however it ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Group = Sequence[tuple[int, Any]]  # (place in the order, what to do) for each result
Reader = Callable[[Group], Iterator[tuple[int, T]]]
MOST_THREADS = 8


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(
    groups: Sequence[Group],
    reader: Callable[[threading.Event], AbstractContextManager[Reader[T]]],
    *,
    threads: int,
    window: int,
) -> Iterator[T]:
    """Results of all groups in the order of their places, worked out by threads.

    Args:
        groups: pieces of work, in order; together their places are 0, 1, 2, ... A group is done by one thread.
        reader: opened once in each thread, it gives (place, result) for a group. The event asks it to stop early.
        threads: how many.
        window: results that may be done and not taken; a thread further ahead waits.

    Yields:
        the results.

    Raises:
        whatever a reader raised for the place that is due.
    """
    state = _Shared[T](groups, window)

    def work() -> None:
        due = state.take()
        try:
            if due is None:
                return
            with reader(state.stop) as read:
                while due is not None:
                    for place, result in read(due):
                        state.put(place, result)
                        if state.stop.is_set():
                            return
                    state.fail(due, RuntimeError("a reader gave too few results"))  # nothing, if it gave them all
                    due = state.take()
        except BaseException as error:  # raised again by the one who takes the results
            state.fail(due or (), error)

    workers = [threading.Thread(target=work, name="holimerge-decode", daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for place in range(sum(len(group) for group in groups)):
            yield state.get(place)
    finally:
        state.end()
        for worker in workers:
            if worker.ident is not None:  # the system may have refused to start it
                worker.join()


class _Shared(Generic[T]):
    """What the threads know of each other."""

    def __init__(self, groups: Sequence[Group], window: int) -> None:
        self.stop = threading.Event()
        self._groups, self._window = iter(groups), window
        self._changed = threading.Condition()
        self._done: dict[int, T] = {}
        self._failed: dict[int, BaseException] = {}
        self._due = 0  # the place that is wanted next

    def take(self) -> Group | None:
        with self._changed:
            return None if self.stop.is_set() else next(self._groups, None)

    def put(self, place: int, result: T) -> None:
        with self._changed:
            # The thread with the due place never waits here, and groups are taken in order: no deadlock.
            self._changed.wait_for(lambda: self.stop.is_set() or place < self._due + self._window)
            self._done[place] = result
            self._changed.notify_all()

    def fail(self, group: Group, error: BaseException) -> None:
        with self._changed:
            for place, _ in group:
                if place >= self._due and place not in self._done:
                    self._failed[place] = error
            self._changed.notify_all()

    def get(self, place: int) -> T:
        with self._changed:
            self._due = place
            self._changed.notify_all()
            self._changed.wait_for(lambda: place in self._done or place in self._failed)
            if place in self._failed:
                raise self._failed[place]
            return self._done.pop(place)

    def end(self) -> None:
        with self._changed:
            self.stop.set()
            self._changed.notify_all()
