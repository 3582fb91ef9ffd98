"""The synthetic world: the same on every machine, and its questions true of what is drawn."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holimerge.eval.tasks import get_task
from holimerge.eval.tasks.synthetic import write_story
from holimerge.eval.tiny.questions import CATEGORIES, Question, ask
from holimerge.eval.tiny.splits import LEARNED, SIZES, questions_of, story_of
from holimerge.eval.tiny.world import (
    CELL,
    COLORS,
    DIRECTIONS,
    EASY,
    GRID,
    HARD,
    NEEDLE,
    NUMBERS,
    PLACES,
    REGIONS,
    RGB,
    SHAPES,
    SIDE,
    WORLDS,
    Story,
    describe,
    draw_story,
    render,
    shorter,
)

SEEDS = st.integers(0, 2**31)


@pytest.mark.parametrize(("name", "digest"), [("easy", "2ea05579c3aacc42"), ("hard", "f44f622b26f0c5e1")])
def test_frames_are_the_same_bytes_everywhere(name: str, digest: str) -> None:
    frames = render(draw_story(WORLDS[name], (5, 6)))
    assert frames.dtype == np.uint8
    assert frames.shape[1:] == (SIDE, SIDE, 3)
    # whoever changes a pixel raises world.VERSION, so that cached videos are not mixed
    assert hashlib.sha256(frames.tobytes()).hexdigest()[:16] == digest


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([EASY, HARD, shorter(EASY, (3, 8), (1, 3))]))
def test_stories_keep_their_worlds_bounds(seed: int, world) -> None:
    story = draw_story(world, (seed,))
    assert story == draw_story(world, (seed,))
    assert world.frames[0] <= story.frames <= world.frames[1]
    assert world.scenes[0] <= len(story.scenes) <= world.scenes[1]
    assert len({scene.place for scene in story.scenes}) == len(story.scenes)
    cast = [thing for scene in story.scenes for thing in scene.things]
    assert len({(t.shape, t.color) for t in cast}) == len(cast)  # every (shape, color) is one object
    assert sum(t.shape == NEEDLE for t in cast) <= 1
    for scene in story.scenes:
        assert scene.frames >= 1
        plain = [t for t in scene.things if t.shape != NEEDLE]
        assert len(plain) <= world.objects[1]
        for thing in scene.things:
            shown = min(thing.stop, scene.frames) - thing.start
            assert shown >= 1
            if thing.shape == NEEDLE:
                assert shown <= world.needle_frames[1]
            if thing.direction is not None:
                far = thing.at(scene.frames - 1, scene)
                assert abs(far[0] - thing.x) + abs(far[1] - thing.y) >= CELL + CELL // 2 - 2 * world.pan


def test_an_object_is_drawn_where_the_facts_say() -> None:
    """The middle of a full shape shows the object's color, as the sensor and the tint allow."""
    full = {SHAPES.index(name) for name in ("circle", "square", "diamond", "cross", "plus", "bar", "pole")}
    checked = 0
    for seed in range(12):
        story = draw_story(EASY, (seed,))
        frames, facts, at = render(story), describe(story), 0
        for scene in story.scenes:
            for frame in range(scene.frames):
                for thing in scene.things:
                    x, y = thing.at(frame, scene)
                    if thing.start <= frame < thing.stop and thing.shape in full and 0 <= x < SIDE and 0 <= y < SIDE:
                        cell = (at, y // CELL, x // CELL)
                        if (facts.shape[cell], facts.color[cell]) != (thing.shape, thing.color):
                            continue  # a moving object passes over it
                        far = np.abs(frames[at, y, x].astype(int) - RGB[thing.color]).max()
                        assert far <= 10 + EASY.noise + 1
                        checked += 1
                at += 1
    assert checked > 300


def oracle_answer(story: Story, question: Question) -> str:
    """The answer read from the facts, cell by cell, by the words of the question alone."""
    facts, words = describe(story), question.text.removesuffix(" ?").split()
    named = {
        kind: [list(names).index(w) for w in words if w in names]
        for kind, names in (("shape", SHAPES), ("color", COLORS), ("place", PLACES))
    }
    match = facts.shape >= 0
    if named["shape"]:
        match &= facts.shape == named["shape"][0]
    if named["color"]:
        match &= facts.color == named["color"][0]
    if named["place"]:
        match &= (facts.place == named["place"][0])[:, None, None]
    places = [PLACES[facts.place[facts.scene == i][0]] for i in range(facts.scene.max() + 1)]
    if question.category == "next":
        step = 1 if "after" in words else -1
        return places[places.index(PLACES[named["place"][0]]) + step]
    if question.category == "count":
        return NUMBERS[facts.count[facts.place == named["place"][0]][0]]
    if question.category == "order":
        edge = 0 if "first" in words else facts.scene.max()
        inside = {SHAPES[s] for s in facts.shape[facts.scene == edge].ravel() if s >= 0}
        (only,) = [option for option in question.options if option in inside]
        return only
    frame, row, column = (part for part in np.nonzero(match))
    assert len(frame), question
    if "color" in words:
        (value,) = set(facts.color[match])
        return COLORS[value]
    if "shape" in words:
        (value,) = set(facts.shape[match])
        return SHAPES[value]
    if question.category == "where":
        (region,) = set(row // 2 * 3 + column // 2)
        return REGIONS[region]
    if question.category == "direction":
        (value,) = set(facts.direction[match])
        return DIRECTIONS[value]
    (value,) = set(facts.place[frame])
    return PLACES[value]


@pytest.mark.parametrize("world", [EASY, HARD], ids=lambda w: w.name)
def test_answers_are_what_the_facts_say(world) -> None:
    asked = Counter[str]()
    for seed in range(60):
        story = draw_story(world, (seed, 3))
        for question in ask(story, each=3):
            if covered(story, question):
                continue
            assert question.options[question.answer] == oracle_answer(story, question), (seed, question)
            asked[question.category] += 1
    assert set(asked) == set(CATEGORIES)
    assert min(asked.values()) >= 30


def covered(story: Story, question: Question) -> bool:
    """An object that pans out of the picture or lies under another is not in the facts of every frame."""
    scene, thing = question.evidence
    if thing is None:
        return False
    facts = describe(story)
    inside = facts.scene == scene
    return thing != (-1, -1) and not ((facts.shape == thing[0]) & (facts.color == thing[1]))[inside].any()


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([EASY, HARD]))
def test_questions_are_well_formed(seed: int, world) -> None:
    story = draw_story(world, (seed,))
    questions = ask(story, each=2)
    assert questions == ask(story, each=2)
    for q in questions:
        assert len(set(q.options)) == 4
        assert q.possible[q.answer]  # elimination never excludes the truth
        assert 0.25 <= q.elimination <= 1
        assert not {q.options[q.answer]} & set(q.text.split())  # the question does not say its answer
    assert [q.category for q in questions] == sorted((q.category for q in questions), key=CATEGORIES.index)


def test_the_place_of_the_answer_is_no_hint() -> None:
    places = Counter[int]()
    for seed in range(150):
        places.update(q.answer for q in ask(draw_story(EASY, (seed, 8)), each=1))
    share = max(places.values()) / sum(places.values())
    assert share < 0.30


def test_every_word_is_known_to_the_tokenizer() -> None:
    from holimerge.eval.tiny.language import INDEX, encode, tokenizer

    words = tokenizer()
    for seed in range(40):
        for q in ask(draw_story(HARD, (seed,)), each=3):
            assert words(q.text).input_ids == encode(q.text)
            assert words(q.text[0].upper() + q.text[1:].replace(" ?", "?")).input_ids == encode(q.text)
            assert all(words(option).input_ids == [INDEX[option]] for option in q.options)


def test_splits_are_apart_and_bounded() -> None:
    assert SIZES["test"] >= 500
    assert story_of("dev", 0) != story_of("test", 0)
    with pytest.raises(ValueError, match="valid: dev, test"):
        story_of("train", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="500 videos"):
        story_of("test", 500)
    with pytest.raises(ValueError, match=r"categories: size; valid: what"):
        ask(story_of("dev", 0), categories=["size"])


def test_the_task_lists_every_question_without_drawing_a_video(tmp_path) -> None:
    task = get_task("synthetic")
    loaded = task.load(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len({s.id for s in loaded.samples}) == len(loaded.samples)
    assert len({s.video_id for s in loaded.samples}) == SIZES["test"]
    assert {s.category for s in loaded.samples} == set(LEARNED)
    assert task.load(tmp_path / "other").revision == loaded.revision
    first = [s for s in loaded.samples if s.video_id == loaded.samples[0].video_id]
    assert [s.question for s in first] == [q.text for q in questions_of(story_of("test", 0))]
    assert task.headline([]) == {}
    some = [{"category": c, "correct": r} for c, r in (("what", True), ("what", True), ("next", False))]
    assert task.headline(some) == {"mean_of_categories": 50.0, "accuracy": pytest.approx(200 / 3)}


def test_a_video_file_shows_the_story(tmp_path) -> None:
    from holimerge.video import read_video

    story = story_of("dev", 1)
    write_story(tmp_path / "new" / "a.mp4", story)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.mp4"]
    video = read_video(tmp_path / "new" / "a.mp4", frames=64)
    assert len(video.frames) == story.frames
    assert np.abs(np.asarray(video.frames).astype(int) - render(story)).mean() < 6


def test_preparing_twice_writes_once(tmp_path) -> None:
    task = get_task("synthetic")
    sample = task.load(tmp_path).samples[0]
    assert task.prepare is not None
    task.prepare(sample)
    assert sample.video is not None
    before = sample.video.stat().st_mtime_ns
    task.prepare(sample)
    assert sample.video.stat().st_mtime_ns == before


def test_cells_cover_the_picture() -> None:
    assert GRID * CELL == SIDE
