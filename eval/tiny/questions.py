"""Questions about synthetic videos: four one-word options each, and what can be excluded without understanding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .world import (
    CELL,
    COLORS,
    DIRECTIONS,
    NEEDLE,
    NUMBERS,
    PLACES,
    REGIONS,
    SHAPES,
    SIDE,
    Scene,
    Story,
    Thing,
)

ANY = (-1, -1)
CATEGORIES = ("what", "needle", "count", "order", "scene", "where", "direction", "next")


@dataclass(frozen=True)
class Question:
    """A question with one-word options.

    Attributes:
        category: one of `CATEGORIES`.
        text: plain words.
        options: four different words.
        answer: index of the right one.
        evidence: where the answer is seen: index of the scene, and the (shape, color) of the object,
            `ANY` for each of its objects, None for all of it.
        possible: options left to someone who knows everything that occurs in the video, but not what goes together;
            a place that the question itself names is left out.
    """

    category: str
    text: str
    options: tuple[str, ...]
    answer: int
    evidence: tuple[int, tuple[int, int] | None]
    possible: tuple[bool, ...]

    @property
    def elimination(self) -> float:
        """Chance of the right answer by elimination alone: 1 / number of possible options."""
        return 1 / sum(self.possible)


def ask(story: Story, *, each: int = 1, categories: Sequence[str] = CATEGORIES) -> list[Question]:
    """Draw questions about a video; the same story gives the same questions.

    Args:
        story: from `draw_story`.
        each: at most so many questions of each category.
        categories: which.

    Returns:
        questions in the order of `CATEGORIES`; a category that the video cannot serve is left out.

    Raises:
        ValueError: an unknown category.
    """
    if unknown := set(categories) - set(CATEGORIES):
        raise ValueError(f"categories: {', '.join(sorted(unknown))}; valid: {', '.join(CATEGORIES)}")
    rng = np.random.default_rng(np.random.SeedSequence((*story.seed, 77)))
    found = []
    for category in CATEGORIES:
        drafts = _DRAFTS[category](story)
        chosen = rng.permutation(len(drafts))[:each]
        drawn = [_finish(rng, story, category, drafts[int(i)]) for i in chosen]
        if category in categories:
            found.extend(drawn)
    return found


@dataclass(frozen=True)
class _Draft:
    """A question before chance chose its options.

    text: with "{}" where `thing` is to be named. evidence: as in `Question`. present: words that are true of something
    in the video; words: all that could be asked of; banned: never an option.
    """

    text: str
    answer: str
    evidence: tuple[int, tuple[int, int] | None]
    present: Sequence[str]
    words: Sequence[str]
    banned: tuple[str, ...] = ()
    thing: Thing | None = None


def _finish(rng: np.random.Generator, story: Story, category: str, draft: _Draft) -> Question:
    """Options: the answer, then what occurs in the video, then other words; shuffled."""
    text = draft.text if draft.thing is None else draft.text.format(_name(rng, story, draft.thing))
    words = draft.words
    if category == "count":  # four numbers in a row
        low = max(1, NUMBERS.index(draft.answer) - int(rng.integers(4)))
        words = NUMBERS[low : low + 4]
    here, ban = {*draft.present, draft.answer}, {*draft.banned, draft.answer}
    near = [word for word in words if word in here - ban]
    far = [word for word in words if word not in here | ban]
    others = [near[i] for i in rng.permutation(len(near))] + [far[i] for i in rng.permutation(len(far))]
    options = [draft.answer, *others[:3]]
    options = [options[i] for i in rng.permutation(4)]
    possible = tuple(option in here for option in options)
    return Question(category, text, tuple(options), options.index(draft.answer), draft.evidence, possible)


class _Part(NamedTuple):
    """An object and the scene it is in."""

    at: int
    scene: Scene
    thing: Thing

    @property
    def evidence(self) -> tuple[int, tuple[int, int]]:
        return self.at, (self.thing.shape, self.thing.color)


def _cast(story: Story) -> list[_Part]:
    return [_Part(index, scene, thing) for index, scene in enumerate(story.scenes) for thing in scene.things]


def _plain(story: Story) -> list[_Part]:
    return [part for part in _cast(story) if part.thing.shape != NEEDLE]


def _places(story: Story) -> list[str]:
    return [PLACES[scene.place] for scene in story.scenes]


def _colors(story: Story) -> list[str]:
    return [COLORS[part.thing.color] for part in _cast(story)]


def _name(rng: np.random.Generator, story: Story, thing: Thing) -> str:
    """ "the cross" where that is enough (half the time), else "the red cross"."""
    alone = sum(part.thing.shape == thing.shape for part in _cast(story)) == 1
    if alone and rng.integers(2):
        return f"the {SHAPES[thing.shape]}"
    return f"the {COLORS[thing.color]} {SHAPES[thing.shape]}"


def _what(story: Story) -> list[_Draft]:
    colors, shapes = _colors(story), [SHAPES[part.thing.shape] for part in _plain(story)]
    drafts = []
    for part in _plain(story):
        thing, others, place = part.thing, part.scene.things, PLACES[part.scene.place]
        color, shape = COLORS[thing.color], SHAPES[thing.shape]
        if shapes.count(shape) == 1:
            drafts.append(_Draft(f"what color is the {shape} ?", color, part.evidence, colors, COLORS))
        elif sum(other.shape == thing.shape for other in others) == 1:
            drafts.append(_Draft(f"what color is the {shape} in the {place} ?", color, part.evidence, colors, COLORS))
        if sum(other.color == thing.color for other in others) == 1:
            text = f"what shape is the {color} object in the {place} ?"
            drafts.append(_Draft(text, shape, part.evidence, shapes, SHAPES[:NEEDLE]))
    return drafts


def _needle(story: Story) -> list[_Draft]:
    drafts = []
    for part in _cast(story):
        if part.thing.shape == NEEDLE:
            color, place, name = COLORS[part.thing.color], PLACES[part.scene.place], SHAPES[NEEDLE]
            drafts += [
                _Draft(f"what color is the {name} ?", color, part.evidence, _colors(story), COLORS),
                _Draft(f"in which place is the {name} ?", place, part.evidence, _places(story), PLACES),
            ]
    return drafts


def _count(story: Story) -> list[_Draft]:
    counts = [NUMBERS[len(scene.things)] for scene in story.scenes]
    return [
        _Draft(f"how many objects are in the {PLACES[scene.place]} ?", count, (index, None), counts, NUMBERS)
        for index, (scene, count) in enumerate(zip(story.scenes, counts, strict=True))
        if all(thing.shape != NEEDLE for thing in scene.things)
    ]


def _order(story: Story) -> list[_Draft]:
    """First and last: one option of the first (last) scene, the others of other scenes."""
    drafts = []
    by_scene = [{SHAPES[t.shape] for t in scene.things if t.shape != NEEDLE} for scene in story.scenes]
    for word, edge in (("first", 0), ("last", len(by_scene) - 1)):
        others = set().union(*(shapes for index, shapes in enumerate(by_scene) if index != edge))
        rest = sorted(others - by_scene[edge])
        for shape in sorted(by_scene[edge] - others):
            if len(rest) >= 3:
                drafts.append(_Draft(f"which object comes {word} ?", shape, (edge, ANY), rest, [*rest, shape]))
    return drafts


def _scene(story: Story) -> list[_Draft]:
    return [
        _Draft(
            "in which place is {} ?", PLACES[part.scene.place], part.evidence, _places(story), PLACES, thing=part.thing
        )
        for part in _plain(story)
    ]


def _region(scene: Scene, thing: Thing) -> str | None:
    """Where an object stands as long as it shows; None if that changes."""
    found = set()
    for frame in range(thing.start, min(thing.stop, scene.frames)):
        x, y = thing.at(frame, scene)
        if not (0 <= x < SIDE and 0 <= y < SIDE):
            return None
        found.add(y // (2 * CELL) * 3 + x // (2 * CELL))
    return REGIONS[found.pop()] if len(found) == 1 and thing.direction is None else None


def _where(story: Story) -> list[_Draft]:
    regions = [(part, _region(part.scene, part.thing)) for part in _plain(story)]
    present = [region for _, region in regions if region]
    return [
        _Draft("where is {} ?", region, part.evidence, present, REGIONS, thing=part.thing)
        for part, region in regions
        if region
    ]


def _direction(story: Story) -> list[_Draft]:
    movers = [(part, DIRECTIONS[part.thing.direction]) for part in _plain(story) if part.thing.direction is not None]
    present = [direction for _, direction in movers]
    return [
        _Draft("which way does {} move ?", direction, part.evidence, present, DIRECTIONS, thing=part.thing)
        for part, direction in movers
    ]


def _next(story: Story) -> list[_Draft]:
    places = _places(story)
    drafts = []
    for index, (before, after) in enumerate(pairwise(places)):
        for word, named, answer in (("after", before, after), ("before", after, before)):
            others = [place for place in places if place != named]
            text = f"which place comes {word} the {named} ?"
            drafts.append(_Draft(text, answer, (index + 1, None), others, PLACES, banned=(named,)))
    return drafts


_DRAFTS: dict[str, Callable[[Story], list[_Draft]]] = {
    "what": _what,
    "needle": _needle,
    "count": _count,
    "order": _order,
    "scene": _scene,
    "where": _where,
    "direction": _direction,
    "next": _next,
}
