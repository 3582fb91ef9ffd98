"""The embedded model's card, written from the records of its training and evaluation and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .questions import CATEGORIES
from .splits import LEARNED, WORLD

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(folder: Path) -> None:
    """Write README.md beside training.json and evaluation.json."""
    (folder / "README.md").write_text(card(folder), encoding="utf-8")


def card(folder: Path) -> str:
    """The model card, Markdown."""
    from jinja2 import Environment, StrictUndefined

    training, evaluation = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("training", "evaluation")
    )
    task = evaluation["tasks"]["synthetic"]
    page = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)  # noqa: S701  (Markdown)
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        training={"note": None, **training},
        evaluation=evaluation,
        configs=task["configs"],
        whole=task["configs"]["unpatched"],
        videos=len(set(task["samples"]["video_id"])),
        questions=len(task["samples"]["id"]),
        missed=[gate for gate in evaluation["gates"] if not gate["met"]],
        unlearned=[category for category in CATEGORIES if category not in LEARNED],
        world=WORLD,
        interval=_interval,
    )


def _interval(found: dict[str, Any]) -> str:
    return f"{found['percent']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"
