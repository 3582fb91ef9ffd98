"""Hooks that live for one call and see only the call that set them, so that threads sharing a model do not mix."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_REGISTERING = threading.Lock()  # torch numbers hooks without one
_OWNER: ContextVar[object] = ContextVar("holimerge_capture_owner", default=None)


class StopForward(Exception):  # noqa: N818  (it is control flow, no error)
    """Ends a stock forward early, once it has handed over the tensor we need."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def first_argument(arguments: dict[str, Any], *names: str) -> str:
    """The first of `names` among the arguments (transformers renamed some).

    Raises:
        ValueError: none of them is there.
    """
    found = next((name for name in names if arguments.get(name) is not None), None)
    if found is None:
        given = ", ".join(sorted(name for name, value in arguments.items() if value is not None))
        raise ValueError(f"{' or '.join(names)} is missing; the model was given {given}")
    return found


@contextmanager
def captured(hooks: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[dict[str, Any]]:
    """Watch modules during a block.

    Args:
        hooks: (module, kind, what): "out" stores the module's output under the name `what`; "in" stores its keyword
            arguments; "pre" calls what(first argument) before the module runs; "replace" calls what(first argument,
            output), whose result replaces the output; "swap" replaces the first argument by what(it); "arguments"
            replaces all of them by what(positional, keyword).

    Yields:
        the stored values by name.
    """
    owner, got = object(), dict[str, Any]()
    handles = []

    def mine() -> bool:
        return _OWNER.get() is owner

    def add(module: nn.Module, kind: str, what: Any) -> None:
        def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args[0] if args else next(iter(kwargs.values()))

        def out(_m: nn.Module, _args: Any, output: Any) -> None:
            if mine():
                got[what] = output

        # A thread that is inside the module while another removes its hook calls that hook without keyword arguments.
        def into(_m: nn.Module, _args: Any, kwargs: dict[str, Any] | None = None) -> None:
            if mine():
                got[what] = kwargs

        def pre(_m: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
            if mine():
                what(first(args, kwargs or {}))

        def swap(_m: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
            if not mine():
                return None
            kwargs = kwargs or {}
            value = what(first(args, kwargs))
            if args:
                return (value, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): value}

        def arguments(_m: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
            return what(args, kwargs or {}) if mine() else None

        def replace(_m: nn.Module, args: Any, output: Any) -> Any:
            return what(output) if mine() else None

        chosen: dict[str, Callable[[], Any]] = {
            "out": lambda: module.register_forward_hook(out),
            "in": lambda: module.register_forward_pre_hook(into, with_kwargs=True),
            "pre": lambda: module.register_forward_pre_hook(pre, with_kwargs=True),
            "swap": lambda: module.register_forward_pre_hook(swap, with_kwargs=True),
            "arguments": lambda: module.register_forward_pre_hook(arguments, with_kwargs=True),
            "replace": lambda: module.register_forward_hook(replace),
        }
        handles.append(chosen[kind]())

    token = _OWNER.set(owner)
    try:
        with _REGISTERING:
            for module, kind, what in hooks:
                add(module, kind, what)
        yield got
    finally:
        with _REGISTERING:
            for handle in handles:
                handle.remove()
        _OWNER.reset(token)
