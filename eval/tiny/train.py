"""`make train-tiny`: train the embedded model from nothing, with one seed, and write its checkpoint.

Tower and LLM learn side by side in two processes, since they share a fixed code for what is seen; then the LLM goes on
with the tower's own tokens. A run that was killed goes on from its last checkpoint when the same command is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from holimerge.eval.conditions import conditions

from . import CHECKPOINT
from .build import tiny_model, write_checkpoint
from .optimize import part_of, restore
from .train_language import Phase, train_language
from .train_vision import Tower, train_vision
from .world import EASY, HARD, shorter

SEED = 20261121
VISION_STEPS = 2600
SHORT = shorter(EASY, (3, 8), (1, 3))
MORE = (("what", 6), ("next", 5), ("needle", 2), ("where", 2), ("scene", 2), ("direction", 2))
# Three quarters of the steps after the first stretch see videos of full length.
PHASES = (
    Phase(450, ((SHORT, 100),), tokens=1200, real=False, fall=0.01),
    Phase(1600, ((SHORT, 25), (EASY, 35), (HARD, 40)), tokens=2600, real=False, fall=0.1),
    Phase(1200, ((SHORT, 15), (EASY, 30), (HARD, 55)), tokens=2600, real=False, fall=0.1, look=0.6, more=MORE),
    Phase(
        1000,
        ((SHORT, 10), (EASY, 35), (HARD, 55)),
        tokens=2600,
        real=True,
        muon=1.5e-3,
        look=0.4,
        more=(*MORE, ("order", 6)),
    ),
)
SYMBOLIC = 3  # phases that need no tower


def load_tower(model: Any, folder: Path) -> Tower:
    """The trained tower and projector, put into `model`."""
    tower = Tower(model)
    found = restore(folder)
    if found is None:
        raise FileNotFoundError(f"{folder}: no trained tower; train the part 'vision' first")
    for name, module in (("vision_tower", tower.vision), ("projector", tower.projector)):
        module.load_state_dict(part_of(found[0], name))
    return tower


def train_part(part: str, folder: Path, scale: float = 1.0, device: str = "cpu") -> Any:
    """Train "vision", "language" (about the code) or "join" (about the tower's tokens); gives the model.

    scale: of the number of steps, for tests.
    """
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = tiny_model().to(device)
    phases = [Phase(**{**vars(phase), "steps": max(1, round(phase.steps * scale))}) for phase in PHASES]
    if part == "vision":
        train_vision(model, folder / "vision", seed=SEED, steps=max(1, round(VISION_STEPS * scale)))
    else:
        tower = load_tower(model, folder / "vision") if part == "join" else None
        phases = phases if part == "join" else phases[:SYMBOLIC]
        train_language(model, folder / "language", phases, seed=SEED, tower=tower)
    return model


def train(folder: Path, target: Path, scale: float = 1.0, device: str = "cpu") -> None:
    """The whole training; the checkpoint goes to `target`, logs and intermediate states to `folder`."""
    command = [sys.executable, "-m", __spec__.name, "--work", str(folder), "--scale", str(scale), "--device", device]
    parts = [subprocess.Popen([*command, "--part", part]) for part in ("vision", "language")]  # noqa: S603
    if sum(part.wait() != 0 for part in parts):
        raise SystemExit("a part of the training failed; see its message above")
    model = train_part("join", folder, scale, device)
    seconds = {name: restore(folder / name)[1]["seconds"] for name in ("vision", "language")}  # type: ignore[index]
    write_checkpoint(model, target)
    record = {
        "command": "make train-tiny",
        "seed": SEED,
        "conditions": conditions(device, dtype="float32"),
        "minutes": {name: round(value / 60, 1) for name, value in seconds.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    (target / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="checkpoints and logs of the training")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="where the finished checkpoint goes")
    parser.add_argument("--part", choices=("vision", "language", "join"), help="train only this part")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument("--device", default="cpu", help="cpu, or for instance cuda")
    chosen = parser.parse_args()
    if chosen.part:
        train_part(chosen.part, chosen.work, chosen.scale, chosen.device)
    else:
        train(chosen.work, chosen.output, chosen.scale, chosen.device)


if __name__ == "__main__":
    main()
