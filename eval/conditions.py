"""Under which conditions a number was measured: machine, versions, commit. No number without them."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from holimerge.planning.device import processor

PACKAGES = ("torch", "transformers", "accelerate", "peft", "av", "numpy", "pydantic", "tokenizers")


def version_of(package: str) -> str | None:
    """An installed distribution's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_tree() -> Path | None:
    """The checkout this package runs from, or None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def commit() -> str | None:
    """The checkout's commit, `-dirty` if files differ from it; None without git or checkout."""
    root, git = source_tree(), shutil.which("git")
    if root is None or git is None:
        return None
    lines = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", ":!results")):
        done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            return None
        lines.append(done.stdout.strip())
    return lines[0] + ("-dirty" if lines[1] else "")


def conditions(device: Any = "cpu", **more: Any) -> dict[str, Any]:
    """Machine, versions and commit, ready for JSON, with whatever else the caller knows (dtype, seed, repeats)."""
    import torch

    device = torch.device(device)
    cuda = device.type == "cuda"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "device_type": device.type,
        "devices": torch.cuda.device_count() if cuda else 1,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": None if load is None else round(load, 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **more,
    }
