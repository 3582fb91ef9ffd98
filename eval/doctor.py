"""`holimerge doctor`: what is installed, what this machine can do, and which of it no committed result covers."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from holimerge.planning.device import processor

from .conditions import source_tree, version_of

CORE = ("torch", "transformers", "pydantic", "PyYAML", "numpy", "tokenizers", "safetensors")
OPTIONAL = {
    "accelerate": "device_map, several GPUs",
    "peft": "LoRA models",
    "av": "reading video files: pip install av",
    "pillow": "folders of images",
    "typer": "this command line",
    "rich": "this command line",
    "matplotlib": "pictures: pip install holimerge[viz]",
    "decord2": "video back-end: pip install holimerge[decord]",
    "torchcodec": "video back-end",
    "torchvision": "transformers' own video processors; holimerge does without",
    "flash-attn": "attention implementation: pip install holimerge[flash-attn]",
}


class Line(NamedTuple):
    """One finding. status: ok, missing, warning or untested."""

    section: str
    name: str
    value: str
    status: str = "ok"
    note: str = ""


UNTESTED = "untested here"


def covered() -> list[dict[str, Any]]:
    """The conditions of every committed result (results/*.json of the checkout)."""
    root = source_tree()
    found: list[dict[str, Any]] = []
    for path in sorted((root / "results").glob("*.json")) if root is not None else []:
        try:
            here = json.loads(path.read_text(encoding="utf-8")).get("conditions")
        except (ValueError, AttributeError, OSError):
            continue
        if isinstance(here, dict):
            found.append({**here, "file": path.name})
    return found


def examine(results: list[dict[str, Any]] | None = None) -> list[Line]:
    """Every finding. results: conditions of results, default those of the checkout."""
    results = covered() if results is None else results
    return [
        *_versions(),
        *_devices(results),
        *_attention(results),
        *_video(results),
        *_results(results),
    ]


def as_json(lines: list[Line]) -> dict[str, Any]:
    """Section -> name -> {value, status, note}."""
    found: dict[str, Any] = {}
    for line in lines:
        found.setdefault(line.section, {})[line.name] = {"value": line.value, "status": line.status, "note": line.note}
    return found


def _versions() -> list[Line]:
    import transformers

    from holimerge import __version__
    from holimerge.api import TESTED_TRANSFORMERS

    low, high = TESTED_TRANSFORMERS
    lines = [Line("versions", "holimerge", __version__), Line("versions", "python", platform.python_version())]
    for name in CORE:
        lines.append(Line("versions", name, version_of(name) or "missing", "ok" if version_of(name) else "missing"))
    here = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    inside = tuple(map(int, low.split("."))) <= here <= tuple(map(int, high.split(".")))
    lines.append(
        Line(
            "versions",
            "transformers range",
            f"{low} to {high}",
            "ok" if inside else "warning",
            "" if inside else f"{transformers.__version__} is outside what holimerge was tested with",
        )
    )
    for name, purpose in OPTIONAL.items():
        version = version_of(name)
        lines.append(Line("optional", name, version or "not installed", "ok" if version else "missing", purpose))
    return lines


def _devices(results: list[dict[str, Any]]) -> list[Line]:
    import torch

    def seen(test: Callable[[dict[str, Any]], bool]) -> tuple[str, str]:
        files = [r["file"] for r in results if test(r)]
        return ("ok", f"results/{files[0]}") if files else ("untested", UNTESTED)

    lines = [
        Line("devices", "cpu", f"{processor()}, torch uses {torch.get_num_threads()} thread(s)", *_cpu(results)),
    ]
    status, note = seen(lambda r: r.get("device_type") == "cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        for index in range(count):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            value = f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"
            lines.append(Line("devices", f"cuda:{index}", value, status, note))
    else:
        lines.append(Line("devices", "cuda", "none", "missing" if status == "ok" else status, note))
    several = seen(lambda r: r.get("device_type") == "cuda" and (r.get("devices_used") or 1) > 1)
    lines.append(Line("devices", "several GPUs", f"{count} here", *several))
    graphs = seen(lambda r: bool(r.get("cuda_graphs")))
    lines.append(Line("devices", "recorded decoding steps", "CUDA graphs" if count else "need CUDA", *graphs))
    frames = seen(lambda r: r.get("device_type") == "cuda" and r["file"].startswith("reading-"))
    lines.append(Line("devices", "frames preprocessed on a GPU", "pinned memory" if count else "need CUDA", *frames))
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        lines.append(Line("devices", "mps", "available", *seen(lambda r: r.get("device_type") == "mps")))
    return lines


def _cpu(results: list[dict[str, Any]]) -> tuple[str, str]:
    files = [r["file"] for r in results if r.get("device_type") == "cpu"]
    return ("ok", f"results/{files[0]}") if files else ("ok", "covered by the tests")


def _attention(results: list[dict[str, Any]]) -> list[Line]:
    measured = {str(r.get("attn")) for r in results}
    lines = [
        Line("attention", "sdpa", "available", "ok", "covered by the tests"),
        Line("attention", "eager", "available", "ok", "covered by the tests"),
    ]
    flash = _importable("flash_attn")
    tested = "flash_attention_2" in measured
    lines.append(
        Line(
            "attention",
            "flash_attention_2",
            "importable" if flash is None else f"not importable ({flash})",
            "ok" if flash is None and tested else "untested" if not tested else "missing",
            "" if tested else UNTESTED,
        )
    )
    return lines


def _video(results: list[dict[str, Any]]) -> list[Line]:
    measured = {str(r.get("video_backend")) for r in results}
    why = _importable("av")
    if why is None:
        lines = [Line("video", "pyav", "importable", "ok", "covered by the tests")]
    else:
        lines = [Line("video", "pyav", f"not importable ({why})", "missing", "pip install av")]
    for name, module in (("decord", "decord"), ("torchcodec", "torchcodec.decoders")):
        why = _importable(module)
        value = "importable" if why is None else f"not importable ({why})"
        tested = name in measured
        lines.append(Line("video", name, value, "ok" if tested else "untested", "" if tested else UNTESTED))
    why = _importable("torchvision")
    lines.append(
        Line("video", "torchvision", "importable" if why is None else f"not importable ({why})", "ok", "not needed")
    )
    return lines


def _results(results: list[dict[str, Any]]) -> list[Line]:
    return [
        Line("results", r["file"], f"{r.get('device')}, {r.get('dtype')}", "ok", f"commit {str(r.get('commit'))[:12]}")
        for r in results
    ]


def _importable(module: str) -> str | None:
    """None if a fresh Python imports the module, else why not (an import may crash, so it does not happen here)."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return "not installed"
    code = f"import {module}"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1][:100] if lines else f"exit {done.returncode}"


def doctor_table(lines: list[Line]) -> Any:
    """The findings as a rich table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="holimerge doctor", title_justify="left")
    for name in ("", "what", "found", "note"):
        table.add_column(name, overflow="fold")
    colours = {"ok": "green", "missing": "dim", "warning": "yellow", "untested": "yellow"}
    section = ""
    for line in lines:
        if section and line.section != section:
            table.add_section()
        shown = Text(line.value, style="" if line.status == "ok" else colours[line.status])
        note = Text(line.note, style=colours[line.status] if line.status != "ok" else "dim")
        table.add_row(line.section if line.section != section else "", line.name, shown, note)
        section = line.section
    return table


def results_folder() -> Path | None:
    """Where committed results lie, or None outside a checkout."""
    root = source_tree()
    return None if root is None else root / "results"
