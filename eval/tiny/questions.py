"""Questions about synthetic videos: four one-word options each, and what can be excluded without understanding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
        makers = _MAKERS[category](story)
        chosen = rng.permutation(len(makers))[:each]
        drawn = [makers[int(i)](rng) for i in chosen]
        if category in categories:
            found.extend(drawn)
    return found


Maker = Callable[[np.random.Generator], Question]


def _cast(story: Story) -> list[tuple[int, Scene, Thing]]:
    return [(index, scene, thing) for index, scene in enumerate(story.scenes) for thing in scene.things]


def _plain(story: Story) -> list[tuple[int, Scene, Thing]]:
    return [row for row in _cast(story) if row[2].shape != NEEDLE]


def _region(scene: Scene, thing: Thing) -> str | None:
    """Where an object stands as long as it shows; None if that changes."""
    found = set()
    for frame in range(thing.start, min(thing.stop, scene.frames)):
        x, y = thing.at(frame, scene)
        if not (0 <= x < SIDE and 0 <= y < SIDE):
            return None
        found.add(y // (2 * CELL) * 3 + x // (2 * CELL))
    return REGIONS[found.pop()] if len(found) == 1 and thing.direction is None else None


def _build(
    rng: np.random.Generator,
    category: str,
    text: str,
    answer: str,
    evidence: tuple[int, Thing | tuple[int, int] | None],
    present: Iterable[str],
    words: Sequence[str],
    banned: Iterable[str] = (),
) -> Question:
    """Options: the answer, then what occurs in the video, then other words; shuffled."""
    here = set(present) | {answer}
    ban = set(banned) | {answer}
    near = [word for word in words if word in here - ban]
    far = [word for word in words if word not in here | ban]
    others = [near[i] for i in rng.permutation(len(near))] + [far[i] for i in rng.permutation(len(far))]
    options = [answer, *others[:3]]
    options = [options[i] for i in rng.permutation(4)]
    scene, thing = evidence
    return Question(
        category,
        text,
        tuple(options),
        options.index(answer),
        (scene, (thing.shape, thing.color) if isinstance(thing, Thing) else thing),
        tuple(option in here for option in options),
    )


def _name(rng: np.random.Generator, story: Story, thing: Thing, color: bool | None = None) -> str:
    """ "the cross" where that is enough (half the time), else "the red cross"."""
    alone = sum(other.shape == thing.shape for _, _, other in _cast(story)) == 1
    if alone and (color is False or (color is None and rng.integers(2))):
        return f"the {SHAPES[thing.shape]}"
    return f"the {COLORS[thing.color]} {SHAPES[thing.shape]}"


def _what(story: Story) -> list[Maker]:
    cast = _plain(story)
    colors = [COLORS[thing.color] for _, _, thing in _cast(story)]
    shapes = [SHAPES[thing.shape] for _, _, thing in cast]
    makers: list[Maker] = []
    for at, scene, thing in cast:
        seen = (at, thing)
        color, shape, place = COLORS[thing.color], SHAPES[thing.shape], PLACES[scene.place]
        if shapes.count(shape) == 1:
            makers.append(
                lambda rng, s=shape, c=color, e=seen: _build(
                    rng, "what", f"what color is the {s} ?", c, e, colors, COLORS
                )
            )
        elif sum(other.shape == thing.shape for other in scene.things) == 1:
            makers.append(
                lambda rng, s=shape, c=color, p=place, e=seen: _build(
                    rng, "what", f"what color is the {s} in the {p} ?", c, e, colors, COLORS
                )
            )
        if sum(other.color == thing.color for other in scene.things) == 1:
            makers.append(
                lambda rng, s=shape, c=color, p=place, e=seen: _build(
                    rng, "what", f"what shape is the {c} object in the {p} ?", s, e, shapes, SHAPES[:NEEDLE]
                )
            )
    return makers


def _needle(story: Story) -> list[Maker]:
    cast = _cast(story)
    colors = [COLORS[thing.color] for _, _, thing in cast]
    places = [PLACES[scene.place] for scene in story.scenes]
    makers: list[Maker] = []
    for at, scene, thing in cast:
        if thing.shape == NEEDLE:
            seen, color, place = (at, thing), COLORS[thing.color], PLACES[scene.place]
            makers.append(
                lambda rng, c=color, e=seen: _build(
                    rng, "needle", "what color is the hourglass ?", c, e, colors, COLORS
                )
            )
            makers.append(
                lambda rng, p=place, e=seen: _build(
                    rng, "needle", "in which place is the hourglass ?", p, e, places, PLACES
                )
            )
    return makers


def _count(story: Story) -> list[Maker]:
    makers: list[Maker] = []
    counts = [len(scene.things) for scene in story.scenes]
    for at, (scene, count) in enumerate(zip(story.scenes, counts, strict=True)):
        if any(thing.shape == NEEDLE for thing in scene.things):
            continue
        text = f"how many objects are in the {PLACES[scene.place]} ?"

        def make(rng: np.random.Generator, at: int = at, count: int = count, text: str = text) -> Question:
            low = max(1, count - int(rng.integers(4)))
            window = NUMBERS[low : low + 4]
            return _build(rng, "count", text, NUMBERS[count], (at, None), [NUMBERS[c] for c in counts], window)

        makers.append(make)
    return makers


def _order(story: Story) -> list[Maker]:
    """First and last: one option of the first (last) scene, the others of other scenes."""
    makers: list[Maker] = []
    by_scene = [{SHAPES[t.shape] for t in scene.things if t.shape != NEEDLE} for scene in story.scenes]
    for word, edge in (("first", 0), ("last", len(by_scene) - 1)):
        others = set().union(*(shapes for i, shapes in enumerate(by_scene) if i != edge))
        for shape in sorted(by_scene[edge] - others):
            rest = sorted(others - by_scene[edge])
            if len(rest) >= 3:
                text = f"which object comes {word} ?"
                makers.append(
                    lambda rng, s=shape, r=rest, t=text, e=edge: _build(rng, "order", t, s, (e, ANY), r, [*r, s])
                )
    return makers


def _scene(story: Story) -> list[Maker]:
    places = [PLACES[scene.place] for scene in story.scenes]
    return [
        lambda rng, t=thing, s=scene, i=at: _build(
            rng, "scene", f"in which place is {_name(rng, story, t)} ?", PLACES[s.place], (i, t), places, PLACES
        )
        for at, scene, thing in _plain(story)
    ]


def _where(story: Story) -> list[Maker]:
    regions = [(at, thing, _region(scene, thing)) for at, scene, thing in _plain(story)]
    present = [region for _, _, region in regions if region]
    return [
        lambda rng, t=thing, r=region, i=at: _build(
            rng, "where", f"where is {_name(rng, story, t)} ?", r, (i, t), present, REGIONS
        )
        for at, thing, region in regions
        if region
    ]


def _direction(story: Story) -> list[Maker]:
    movers = [(at, thing, thing.direction) for at, _, thing in _plain(story) if thing.direction is not None]
    present = [DIRECTIONS[direction] for _, _, direction in movers]
    return [
        lambda rng, t=thing, d=direction, i=at: _build(
            rng,
            "direction",
            f"which way does {_name(rng, story, t)} move ?",
            DIRECTIONS[d],
            (i, t),
            present,
            DIRECTIONS,
        )
        for at, thing, direction in movers
    ]


def _next(story: Story) -> list[Maker]:
    places = [PLACES[scene.place] for scene in story.scenes]
    makers: list[Maker] = []
    for at, (before, after) in enumerate(zip(places, places[1:], strict=False)):
        for word, named, answer in (("after", before, after), ("before", after, before)):
            text = f"which place comes {word} the {named} ?"
            makers.append(
                lambda rng, t=text, a=answer, n=named, i=at: _build(
                    rng, "next", t, a, (i + 1, None), [p for p in places if p != n], PLACES, banned=[n]
                )
            )
    return makers


_MAKERS: dict[str, Callable[[Story], list[Maker]]] = {
    "what": _what,
    "needle": _needle,
    "count": _count,
    "order": _order,
    "scene": _scene,
    "where": _where,
    "direction": _direction,
    "next": _next,
}
