"""Synthetic videos with known contents: scenes, objects that stay or move, a needle; drawn by whole-number arithmetic.

Everything follows from a seed. Frames are the same bytes on every machine: only integers and exactly rounded
operations (+, -, *, /) touch a pixel, and the random numbers are integers of PCG64.

    story = draw_story(EASY, seed=(2, 17))        # what happens
    frames = render(story)                        # uint8 [T, SIDE, SIDE, 3]
    facts = describe(story)                       # per frame and cell: what stands where

A frame is `SIDE` pixels square; the embedded model sees it as `GRID` x `GRID` cells of `CELL` pixels, one token each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

VERSION = 1  # of the drawing: raised by whoever changes a pixel, so that no cache mixes two
SIDE, CELL = 96, 16
GRID = SIDE // CELL

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
RGB = (
    (214, 40, 40),
    (36, 170, 60),
    (44, 80, 225),
    (236, 212, 46),
    (160, 60, 190),
    (60, 205, 215),
    (248, 248, 248),
    (14, 14, 14),
)
SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "cross",
    "plus",
    "ring",
    "bar",
    "pole",
    "frame",
    "bowl",
    "arrow",
    "hourglass",
)
NEEDLE = len(SHAPES) - 1  # only needles are hourglasses
PLACES = ("forest", "desert", "ocean", "snow", "city", "night", "meadow", "cave")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
REGIONS = tuple(f"{row}-{column}" for row in ROWS for column in COLUMNS)
DIRECTIONS = ("left", "right", "up", "down")
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")

# base color, amplitude of its texture, kind of texture
_GROUND = (
    ((74, 96, 74), 16, "stripes"),
    ((176, 150, 112), 10, "clouds"),
    ((78, 104, 138), 16, "waves"),
    ((196, 202, 208), 8, "clouds"),
    ((122, 122, 126), 18, "grid"),
    ((42, 42, 66), 12, "dots"),
    ((132, 158, 92), 14, "dots"),
    ((96, 74, 62), 16, "slant"),
)


@dataclass(frozen=True)
class World:
    """How hard the videos are. Pairs are inclusive ranges.

    Attributes:
        frames: frames of a video.
        scenes: scenes of a video, each in another place.
        objects: objects of a scene.
        moving: percent of scenes with one moving object.
        coming: percent of the resting objects that appear late or vanish early.
        needle: percent of videos with a needle; it shows for `needle_frames`.
        pan: most pixels that the camera pans over a scene, in each direction.
        zoom: most percent that the ground's texture grows over a scene.
        flow: most pixels a frame that the ground's texture moves by itself.
        twins: percent of objects that share a shape with an object in another scene, in another color.
        noise: half width of the sensor noise, in grey levels.
        off_grid: most pixels that an object stands off the centre of its cell.
    """

    name: str
    frames: tuple[int, int] = (24, 24)
    scenes: tuple[int, int] = (4, 5)
    objects: tuple[int, int] = (2, 5)
    moving: int = 70
    coming: int = 0
    needle: int = 80
    needle_frames: tuple[int, int] = (2, 3)
    pan: int = 0
    zoom: int = 0
    flow: int = 0
    twins: int = 0
    noise: int = 5
    off_grid: int = 3


EASY = World("easy")
HARD = World(
    "hard",
    frames=(24, 32),
    scenes=(4, 5),
    objects=(6, 8),
    moving=80,
    coming=25,
    needle=90,
    needle_frames=(1, 3),
    pan=8,
    zoom=12,
    flow=1,
    twins=40,
    noise=8,
    off_grid=5,
)
WORLDS = {world.name: world for world in (EASY, HARD)}


@dataclass(frozen=True)
class Thing:
    """An object: `x`, `y` is its centre at the scene's first frame, in pixels; it moves `dx`, `dy` in sixteenths of a
    pixel a frame, and shows from `start` up to `stop` (frames of its scene)."""

    shape: int
    color: int
    x: int
    y: int
    size: int
    tint: tuple[int, int, int]
    start: int = 0
    stop: int = 1 << 20
    dx: int = 0
    dy: int = 0

    def at(self, frame: int, scene: Scene) -> tuple[int, int]:
        """Centre in pixels at a frame of its scene, the camera's pan included."""
        shift_x, shift_y = scene.shift(frame)
        return self.x + self.dx * frame // 16 - shift_x, self.y + self.dy * frame // 16 - shift_y

    @property
    def direction(self) -> int | None:
        """Index into `DIRECTIONS`, None at rest."""
        if not (self.dx or self.dy):
            return None
        return STEPS.index((int(np.sign(self.dx)), int(np.sign(self.dy))))


@dataclass(frozen=True)
class Scene:
    """Frames between two cuts, in one place. `pan`, `flow`: sixteenths of a pixel a frame."""

    place: int
    frames: int
    things: tuple[Thing, ...]
    texture: int
    tint: tuple[int, int, int]
    pan: tuple[int, int] = (0, 0)
    zoom: int = 0
    flow: tuple[int, int] = (0, 0)

    def shift(self, frame: int) -> tuple[int, int]:
        """How far the camera has panned, in pixels."""
        return self.pan[0] * frame // 16, self.pan[1] * frame // 16


@dataclass(frozen=True)
class Story:
    """A video before it is drawn."""

    world: World
    seed: tuple[int, ...]
    scenes: tuple[Scene, ...]

    @property
    def frames(self) -> int:
        return sum(scene.frames for scene in self.scenes)


def draw_story(world: World, seed: tuple[int, ...]) -> Story:
    """Draw what happens in a video.

    Args:
        world: how hard.
        seed: whole numbers, not negative; the same give the same video.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    total = _between(rng, world.frames)
    count = min(_between(rng, world.scenes), total)
    # every scene at least two thirds of an equal share, cuts at random
    least = max(1, total * 2 // (3 * count))
    cuts = np.sort(rng.integers(0, total - least * count + 1, size=count - 1))
    lengths = np.diff(np.concatenate([[0], cuts, [total - least * count]])) + least
    places = rng.permutation(len(PLACES))[:count]
    pairs = set[tuple[int, int]]()
    fresh = list(rng.permutation(NEEDLE))
    needle_in = int(rng.integers(count)) if _chance(rng, world.needle) else -1
    scenes = [
        _draw_scene(rng, world, int(place), int(length), pairs, fresh, index == needle_in)
        for index, (place, length) in enumerate(zip(places, lengths, strict=True))
    ]
    return Story(world, tuple(seed), tuple(scenes))


def _draw_scene(
    rng: np.random.Generator,
    world: World,
    place: int,
    frames: int,
    pairs: set[tuple[int, int]],
    fresh: list[int],
    needle: bool,
) -> Scene:
    """One scene; `pairs` are the (shape, color) taken so far in the video, `fresh` the shapes not yet seen."""
    count = _between(rng, world.objects)
    free = np.ones((GRID, GRID), dtype=bool)
    things: list[Thing] = []
    pan = (0, 0)
    if world.pan and _chance(rng, 50):
        pan = tuple(int(v) for v in rng.integers(-world.pan, world.pan + 1, size=2) * 16 // max(1, frames))  # type: ignore[assignment]
    if count and _chance(rng, world.moving) and frames >= 3:
        direction = int(rng.integers(4))
        (sx, sy), lane = STEPS[direction], int(rng.integers(GRID))
        # two and a half cells at least, over the scene; its whole lane is taken
        reach = CELL * 5 // 2 + int(rng.integers(CELL))
        begin = int(rng.integers(CELL // 2, SIDE - reach - CELL // 2 + 1))
        begin = begin if sx + sy > 0 else SIDE - 1 - begin
        across = lane * CELL + CELL // 2
        x, y = (begin, across) if sx else (across, begin)
        speed = reach * 16 // max(1, frames - 1)
        if sx:
            free[lane, :] = False
        else:
            free[:, lane] = False
        things.append(_draw_thing(rng, world, x, y, pairs, fresh, dx=sx * speed, dy=sy * speed))
    while len(things) < count and free.any():
        row, column = (int(v) for v in np.argwhere(free)[rng.integers(int(free.sum()))])
        free[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] &= (
            world.objects[1] > 5
        )  # apart, if there is room
        free[row, column] = False
        x, y = (_centre(rng, world, cell) for cell in (column, row))
        start, stop = 0, 1 << 20
        if _chance(rng, world.coming) and frames >= 4:
            start, stop = (frames // 2, stop) if _chance(rng, 50) else (0, frames // 2)
        things.append(_draw_thing(rng, world, x, y, pairs, fresh, start=start, stop=stop))
    if needle and free.any():
        row, column = (int(v) for v in np.argwhere(free)[rng.integers(int(free.sum()))])
        shows = min(_between(rng, world.needle_frames), frames)
        start = int(rng.integers(frames - shows + 1))
        x, y = (_centre(rng, world, cell) for cell in (column, row))
        star = _draw_thing(rng, world, x, y, pairs, fresh, start=start, stop=start + shows, shape=NEEDLE)
        things.append(star)
    flow = tuple(int(v) for v in rng.integers(-16 * world.flow, 16 * world.flow + 1, size=2)) if world.flow else (0, 0)
    return Scene(
        place,
        frames,
        tuple(things),
        texture=int(rng.integers(1 << 30)),
        tint=_tint(rng, 8),
        pan=pan,
        zoom=int(rng.integers(world.zoom + 1)) if world.zoom else 0,
        flow=flow,  # type: ignore[arg-type]
    )


def _draw_thing(
    rng: np.random.Generator,
    world: World,
    x: int,
    y: int,
    pairs: set[tuple[int, int]],
    fresh: list[int],
    shape: int | None = None,
    **motion: int,
) -> Thing:
    """An object whose (shape, color) is new in the video; a twin repeats a shape, the others take a new one."""
    color = int(rng.integers(len(COLORS)))
    if shape is None:
        twin = (_chance(rng, world.twins) and pairs) or not fresh
        shape = int(rng.integers(NEEDLE)) if twin else int(fresh.pop())
        while (shape, color) in pairs:
            shape, color = (int(rng.integers(NEEDLE)) if twin else shape), int(rng.integers(len(COLORS)))
    pairs.add((shape, color))
    return Thing(shape, color, x, y, size=13 + int(rng.integers(3)), tint=_tint(rng, 10), **motion)


def _centre(rng: np.random.Generator, world: World, cell: int) -> int:
    return cell * CELL + CELL // 2 + int(rng.integers(-world.off_grid, world.off_grid + 1))


def _tint(rng: np.random.Generator, width: int) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(-width, width + 1, size=3))
    return red, green, blue


def _between(rng: np.random.Generator, pair: tuple[int, int]) -> int:
    return int(rng.integers(pair[0], pair[1] + 1))


def _chance(rng: np.random.Generator, percent: int) -> bool:
    return bool(rng.integers(100) < percent)


def render(story: Story) -> NDArray[np.uint8]:
    """Draw the frames of a video, uint8 `[T, SIDE, SIDE, 3]` RGB."""
    noise = np.random.default_rng(np.random.SeedSequence((*story.seed, 99)))
    parts = []
    for scene in story.scenes:
        ground = _ground(scene)
        for frame in range(scene.frames):
            picture = _look(ground, scene, frame)
            for thing in scene.things:
                if thing.start <= frame < thing.stop:
                    _paint(picture, thing, *thing.at(frame, scene))
            width = story.world.noise
            if width:
                picture += noise.integers(-width, width + 1, size=picture.shape, dtype=np.int32)
            parts.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(parts)


_MARGIN = 48


def _ground(scene: Scene) -> NDArray[np.int32]:
    """The texture of a place, larger than a frame, int32 `[SIDE + 2 margins, ..., 3]`."""
    base, depth, kind = _GROUND[scene.place]
    rng = np.random.default_rng(np.random.SeedSequence(scene.texture))
    side = SIDE + 2 * _MARGIN
    y, x = np.mgrid[0:side, 0:side].astype(np.int32)
    x, y = x + int(rng.integers(64)), y + int(rng.integers(64))
    if kind == "stripes":
        wave = _triangle(x, 12) + _triangle(x * 3 + y, 40) // 2
    elif kind == "waves":
        wave = _triangle(y + _triangle(x, 32) // 6, 14)
    elif kind == "grid":
        wave = np.where((x % 16 < 2) | (y % 16 < 2), 60, -20)
    elif kind == "slant":
        wave = _triangle(x + y, 18)
    elif kind == "dots":
        wave = np.where((x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 7, 100, -20)
    else:
        coarse = rng.integers(-60, 61, size=(side // 16 + 2, side // 16 + 2)).astype(np.int32)
        i, j, a, b = y[:, 0] // 16 - y[0, 0] // 16, x[0] // 16 - x[0, 0] // 16, y % 16, x % 16
        top = coarse[i][:, j] * (16 - b) + coarse[i][:, j + 1] * b
        low = coarse[i + 1][:, j] * (16 - b) + coarse[i + 1][:, j + 1] * b
        wave = (top * (16 - a) + low * a) // 256
    shade = wave * depth // 60
    return np.asarray(base, np.int32) + np.asarray(scene.tint, np.int32) + shade[:, :, None].astype(np.int32)


def _triangle(value: NDArray[np.int32], period: int) -> NDArray[np.int32]:
    """A wave between -60 and 60."""
    phase = value % period
    return np.abs(phase * 2 - period) * 120 // period - 60


def _look(ground: NDArray[np.int32], scene: Scene, frame: int) -> NDArray[np.int32]:
    """What the camera sees of the ground at a frame."""
    shift_x, shift_y = scene.shift(frame)
    x = _MARGIN + shift_x + scene.flow[0] * frame // 16
    y = _MARGIN + shift_y + scene.flow[1] * frame // 16
    x, y = (min(max(v, 0), 2 * _MARGIN) for v in (x, y))
    if scene.zoom == 0:
        return ground[y : y + SIDE, x : x + SIDE].copy()
    seen = SIDE * 1000 // (1000 + scene.zoom * 10 * frame // max(1, scene.frames - 1))
    index = np.arange(SIDE) * seen // SIDE + (SIDE - seen) // 2
    return ground[y + index][:, x + index].copy()


def _paint(picture: NDArray[np.int32], thing: Thing, x: int, y: int) -> None:
    """Draw an object over a picture, in place; what lies outside is cut off."""
    cover = _cover(thing.shape, thing.size)
    side = cover.shape[0]
    left, top = x - side // 2, y - side // 2
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIDE), min(top + side, SIDE)
    if x0 >= x1 or y0 >= y1:
        return
    part = cover[y0 - top : y1 - top, x0 - left : x1 - left, None]
    color = np.clip(np.asarray(RGB[thing.color], np.int32) + np.asarray(thing.tint, np.int32), 0, 255)
    view = picture[y0:y1, x0:x1]
    view += (color - view) * part // 16


@lru_cache(maxsize=256)
def _cover(shape: int, size: int) -> NDArray[np.int32]:
    """How much of each pixel a shape covers, in sixteenths, int32 `[size, size]`; 4 x 4 points a pixel."""
    fine = np.arange(4 * size)
    # coordinates in thousandths of half the size
    axis = (2 * fine + 1 - 4 * size) * 1000 // (4 * size)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    r2, a, b = u * u + v * v, np.abs(u), np.abs(v)
    inside = {
        "circle": r2 < 900**2,
        "square": (a < 780) & (b < 780),
        "triangle": (v > -850) & (v < 800) & (2 * a < v + 950),
        "diamond": a + b < 1000,
        "cross": (np.abs(a - b) < 330) & (a < 920) & (b < 920),
        "plus": ((a < 280) | (b < 280)) & (a < 950) & (b < 950),
        "ring": (r2 < 950**2) & (r2 > 520**2),
        "bar": (b < 330) & (a < 980),
        "pole": (a < 330) & (b < 980),
        "frame": (np.maximum(a, b) < 900) & (np.maximum(a, b) > 480),
        "bowl": (r2 < 950**2) & (v > -50),
        "arrow": ((v > -950) & (v < 0) & (a < v + 950)) | ((v >= 0) & (v < 950) & (a < 260)),
        "hourglass": (a < b + 120) & (b < 930),
    }[SHAPES[shape]]
    return inside.reshape(size, 4, size, 4).sum(axis=(1, 3)).astype(np.int32)


@dataclass(frozen=True)
class Facts:
    """What stands where. `shape`, `color`: int64 `[T, GRID, GRID]`, -1 where no object has its centre in the cell;
    `direction`: the same, -1 at rest; `place`, `scene`, `count`: int64 `[T]` (objects in the whole scene, needles not
    counted)."""

    shape: NDArray[np.int64]
    color: NDArray[np.int64]
    direction: NDArray[np.int64]
    place: NDArray[np.int64]
    scene: NDArray[np.int64]
    count: NDArray[np.int64]


def describe(story: Story) -> Facts:
    """The contents of every frame of a video, cell by cell."""
    size = (story.frames, GRID, GRID)
    facts = Facts(*(np.full(size, -1) for _ in range(3)), *(np.zeros(story.frames, np.int64) for _ in range(3)))
    at = 0
    for index, scene in enumerate(story.scenes):
        for frame in range(scene.frames):
            facts.place[at], facts.scene[at] = scene.place, index
            facts.count[at] = sum(thing.shape != NEEDLE for thing in scene.things)
            for thing in scene.things:
                x, y = thing.at(frame, scene)
                if thing.start <= frame < thing.stop and 0 <= x < SIDE and 0 <= y < SIDE:
                    cell = (at, y // CELL, x // CELL)
                    facts.shape[cell], facts.color[cell] = thing.shape, thing.color
                    facts.direction[cell] = -1 if thing.direction is None else thing.direction
            at += 1
    return facts


def shorter(world: World, frames: tuple[int, int], scenes: tuple[int, int]) -> World:
    """The same world with shorter videos, for the first steps of training."""
    return replace(world, frames=frames, scenes=scenes)
