"""What both halves of the training share: optimizers, the learning rate's course, checkpoints without pickle."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Optimizers:
    """Muon for the matrices inside, AdamW for embeddings, norms, biases and heads."""

    def __init__(self, modules: Iterable[nn.Module], *, muon: float, adamw: float, decay: float = 0.01) -> None:
        inner: list[nn.Parameter] = []
        outer: list[nn.Parameter] = []
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    hidden = parameter.ndim == 2 and not any(part in name for part in ("embed", "head"))
                    (inner if hidden else outer).append(parameter)
        self.parts = (
            torch.optim.Muon(inner, lr=muon, momentum=0.95, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=adamw, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.peaks = (muon, adamw)
        self.parameters = [*inner, *outer]

    def step(self, loss: Tensor, rate: float) -> float:
        """One step at `rate` times the peak learning rates; gives the norm of the gradient."""
        for part, peak in zip(self.parts, self.peaks, strict=True):
            part.zero_grad(set_to_none=True)
            for group in part.param_groups:
                group["lr"] = peak * rate
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        if math.isfinite(norm):
            for part in self.parts:
                part.step()
        return norm


def rate_at(progress: float, *, warm: float = 0.02, fall: float = 0.3) -> float:
    """Share of the peak learning rate: linear warm-up, level, then a straight fall to 2 % over the last `fall`."""
    if progress < warm:
        return (progress + 0.002) / (warm + 0.002)
    return max(0.02, min(1.0, (1 - progress) / fall))


def part_of(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries `name.*`, without the name."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def save(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "weights.draft"
    meta = {"state": json.dumps(state)}
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, draft, metadata=meta)
    os.replace(draft, folder / "weights.safetensors")


def restore(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last checkpoint, or None."""
    from safetensors import safe_open

    path = folder / "weights.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        state = json.loads((file.metadata() or {})["state"])
        return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118


class Log:
    """One JSON line per report, on the file and on the screen; `earlier` are the seconds of runs before this one."""

    def __init__(self, path: Path, earlier: float = 0.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.begin = path, time.perf_counter() - earlier

    @property
    def seconds(self) -> float:
        """Time spent so far, in all runs."""
        return time.perf_counter() - self.begin

    def __call__(self, **values: Any) -> None:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({**rounded, "s": round(self.seconds)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
