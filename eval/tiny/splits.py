"""Which videos and questions belong to training, development and test; and what the benchmark asks."""

from __future__ import annotations

from typing import Literal

from .questions import Question, ask
from .world import HARD, Story, World, draw_story

WORLD: World = HARD
SEED = 20261121
# Training draws from (seed, 1, ...) and (seed, 2, ...), with any number of further entries.
SPLITS = {"dev": 3, "test": 4}
SIZES = {"dev": 100, "test": 500}
# Asked by the benchmark; what the embedded model did not learn is left out and listed in its card.
LEARNED = ("what", "needle", "order", "scene", "where", "direction", "next")
EACH = 1

Split = Literal["dev", "test"]


def story_of(split: Split, index: int, world: World = WORLD) -> Story:
    """A video of a split.

    Raises:
        ValueError: an unknown split, or an index out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r}; valid: {', '.join(SPLITS)}")
    if not 0 <= index < SIZES[split]:
        raise ValueError(f"index: {index}; the {split} split has {SIZES[split]} videos")
    return draw_story(world, (SEED, SPLITS[split], index))


def questions_of(story: Story) -> list[Question]:
    """What the benchmark asks about a video."""
    return ask(story, each=EACH, categories=LEARNED)
