"""The benchmarks: one file each, found by its name; nothing else lists them."""

from __future__ import annotations

import importlib
import pkgutil

from holimerge.registry import nearest

from .base import Task

__all__ = ["get_task", "list_tasks"]


def list_tasks() -> list[str]:
    """Names of the benchmarks (`--tasks`), one file each in `eval/tasks/`."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base" and not m.name.startswith("_"))


def get_task(name: str) -> Task:
    """The benchmark of a name; ValueError naming the valid ones if there is none."""
    valid = list_tasks()
    if name not in valid:
        raise ValueError(f"unknown task {name!r}{nearest(name, valid)} Valid: {', '.join(valid)}")
    task = importlib.import_module(f"{__name__}.{name}").TASK
    assert isinstance(task, Task), f"{name}.py must define TASK = Task(...)"
    assert task.name == name, f"{name}.py calls its task {task.name!r}"
    return task
