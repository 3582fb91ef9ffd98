"""Discovery: a method, a family or a preset exists because its file exists; nothing else lists them."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import resources
from types import ModuleType


def nearest(word: object, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `choices`, or a full stop when none is near."""
    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else "."


# Model types that look as if they could be patched, and why they are not.
REFUSED = {
    "qwen2_5_omni": "patch its thinker: patch_model(model.thinker, cfg); the talker reads hidden states of every token",
    "qwen3_omni_moe": "its thinker is not supported yet",
    "perception_lm": "it encodes videos and images by one function that does not say which it was given",
    "video_llava": "its frames are tokens of an image encoder of their own; not supported",
    "llava": "the lmms-lab LLaVA-Video checkpoints are converted by `holimerge convert-llava-video`; other models of "
    "this type take no videos",
}


@cache
def _modules(package: str) -> tuple[str, ...]:
    found = importlib.import_module(package)
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(found.__path__) if m.name != "base" and not m.name.startswith("_"))
    )


def list_methods() -> list[str]:
    """Names of the reduction methods (`method:` in a config), one file each in `holimerge/methods/`."""
    return list(_modules("holimerge.methods"))


def list_families() -> list[str]:
    """Model types that can be patched (`model.config.model_type`), one file each in `patches/`."""
    return list(_modules("holimerge.patches"))


def list_presets() -> list[str]:
    """Names of the shipped presets, one YAML file each in `configs/`."""
    files = resources.files("holimerge.configs").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The YAML text of a shipped preset."""
    return resources.files("holimerge.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _load(package: str, kind: str, name: str, choices: list[str]) -> ModuleType:
    if name not in choices:
        raise ValueError(f"unknown {kind} {name!r}{nearest(name, choices)} Valid: {', '.join(choices)}")
    return importlib.import_module(f"{package}.{name}")


def method_module(name: str) -> ModuleType:
    """The module of a method; ValueError naming the valid ones if there is none of that name."""
    return _load("holimerge.methods", "method", name, list_methods())


def family_module(model_type: str) -> ModuleType:
    """The module of a model family; ValueError naming the valid ones if there is none of that name."""
    return _load("holimerge.patches", "model family", model_type, list_families())
