"""What a model looks like from outside: a patch that is undone leaves all of it as it was."""

from __future__ import annotations

from typing import Any

HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
    "_state_dict_hooks": (),
    "_state_dict_pre_hooks": (),
    "_load_state_dict_pre_hooks": (),
    "_load_state_dict_post_hooks": (),
}


def fingerprint(model: Any) -> dict[str, Any]:
    """Classes, `__dict__` keys and callables, hooks in order with their flags, state_dict keys, configurations.

    Hooks are compared as callables, not by their running number: a hook that was removed and set again is the same.
    Run a stock forward first: transformers sets hooks of its own on the first one.
    """
    modules = {}
    for name, module in model.named_modules():
        here: dict[str, Any] = {"class": type(module), "keys": sorted(vars(module))}
        here["callables"] = {k: v for k, v in vars(module).items() if callable(v)}
        for kind, flags in HOOKS.items():
            hooks = vars(module)[kind]
            here[kind] = [(hook, *(number in vars(module)[flag] for flag in flags)) for number, hook in hooks.items()]
            for flag in flags:
                here[flag] = len(vars(module)[flag])  # no flag stays behind without its hook
        modules[name] = here
    return {
        "modules": modules,
        "order": list(modules),
        "state": list(model.state_dict()),
        "config": model.config.to_json_string(),
        "generation": model.generation_config.to_json_string(),
    }


def hook_count(model: Any) -> int:
    """Forward hooks of all modules together."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
