"""Prompts and answer readings of the three protocols, pinned word for word; subtitles at the sampled frames only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import benchmark_fixtures as make
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holimerge.eval.protocols import (
    PROTOCOLS,
    chosen,
    drawn,
    first_letter,
    lettered,
    marked_letter,
    named_option,
    ranked_letter,
    standing_letter,
)
from holimerge.eval.subtitles import Line, lines_at, lmms_texts, read_subtitles
from holimerge.eval.tasks import get_task
from holimerge.eval.tasks.base import Sample

# --- reading answers --------------------------------------------------------------------------------------------------

# What lmms-eval's own functions gave for these texts (0.3.0 and 0.7.3 run side by side), "?" where they draw at random:
# Video-MME and MLVU in 0.3.0; the same in 0.7.3 with A to D; LongVideoBench; MVBench; EgoSchema (both versions agree).
MEASURED = [
    ("Answer: C", "A", "C", "A", "C", "C"),
    ("Based on the video, the answer is C", "B", "C", "B", "C", "C"),
    ("Best option: (D", "B", "D", "D", "D", "D"),
    ("Decorations: (C)", "D", "C", "D", "C", "C"),
    ("B", "B", "B", "B", "B", "B"),
    ("B.", "B", "B", "B", "B", "B"),
    ("(B)", "B", "B", "B", "B", "B"),
    ("B. text", "B", "B", "B", "B", "B"),
    ("The best answer is B", "B", "B", "B", "B", "B"),
    ("The best option is D", "D", "D", "D", "D", "D"),
    ("Best answer: C", "B", "C", "C", "C", "C"),
    ("The answer is (C) because A is wrong", "C", "A", "C", "C", "C"),
    ("(A) is wrong, so (D).", "A", "D", "A", "A", "A"),
    ("I choose B", "B", "B", "B", "B", "B"),
    ("D) a dog", "D", "D", "D", "D", "?"),
    ("a", "", "", "?", "A", "?"),
    ("b) no", "", "", "?", "B", "?"),
    ("The man is walking.", "", "", "?", "", "?"),
    ("A man walks a Dog.", "A", "A", "A", "A", "A"),
    ("", "", "", "?", "", "?"),
    ("   ", "", "", "?", "", "?"),
    ("Both B and C", "B", "C", "B", "B", "B"),
    ("C: it is A", "C", "C", "C", "C", "A"),
    ("Answer the Door: E", "A", "D", "A", "E", "E"),
    ("정답은 B", "B", "B", "B", "B", "B"),
    ("1,000 (C)", "C", "C", "C", "C", "C"),
    ("E.", "", "", "E", "E", "E"),
    ("Option E", "", "", "E", "E", "E"),
    ("My answer is c", "", "", "?", "C", "?"),
    ("BCD", "B", "D", "B", "", "D"),
    ("The person puts D down.", "D", "D", "D", "D", "D"),
    ("b. text", "", "", "?", "B", "?"),
    ("the cat. (b)", "", "", "?", "B", "?"),
    ("e", "", "", "?", "E", "?"),
    ("she is going to join a race there soon", "", "", "?", "A", "?"),
]
EGO_OPTIONS = ["A. Dogs run.", "B. cat", "C. a race", "D. Bananas", "E. g"]


@pytest.mark.parametrize(("text", "old", "new", "long_video", "mvbench", "ego"), MEASURED)
def test_readings_equal_those_of_lmms_eval(
    text: str, old: str, new: str, long_video: str, mvbench: str, ego: str
) -> None:
    assert (first_letter(text, "ABCD") or "") == old
    assert (ranked_letter(text, "ABCD") or "") == new
    assert (first_letter(text, "ABCDE", joined=False) or "?") == long_video
    assert (standing_letter(text) or "") == mvbench
    assert (marked_letter(text, EGO_OPTIONS) or "?") == ego


def sample(task: str = "videomme", **changes: Any) -> Sample:
    """A made-up question with four options."""
    values: dict[str, Any] = {
        "id": "1-1",
        "video": None,
        "video_id": "v",
        "question": "What colour is the door?",
        "options": ("Red", "Blue", "Green", "White"),
        "answer": 1,
        "category": "c",
    }
    return Sample(**values | changes)


DOCUMENTED = [  # text, official, lmms_eval_0_3, lmms_eval_0_7
    ("Answer: C", 2, 0, 2),
    ("Based on the video, the answer is C", 2, 1, 2),
    ("Best option: (D", 3, 1, 3),
    ("Decorations: (C)", 2, 3, 2),
    ("B", 1, 1, 1),
    ("B.", 1, 1, 1),
    ("(B)", 1, 1, 1),
    ("B. text", 1, 1, 1),
    ("It is unclear.", None, None, None),
    ("", None, None, None),
]


@pytest.mark.parametrize("task", ["videomme", "videomme_w_subtitle", "mlvu_dev", "custom"])
@pytest.mark.parametrize("case", DOCUMENTED, ids=[case[0] for case in DOCUMENTED])
def test_the_documented_cases(task: str, case: tuple[str, int | None, int | None, int | None]) -> None:
    extract = get_task(task).extract
    assert extract is not None
    text, *expected = case
    found = [extract(text, sample(), protocol, 0) for protocol in PROTOCOLS]
    assert [f.choice for f in found] == expected
    assert all(not f.fallback and f.counted for f in found)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("b", 1),
        ("(b).", 1),
        ("B) Blue", 1),
        ("**C**", 2),
        ("blue", 1),
        ("The door is green.", 2),
        ("A blue door", 1),  # an article, then an option's text
        ("A Red", 0),
        ("A man walks by", None),
        ("A is correct", 0),
        ("The answer is a mystery", None),
        ("B or C", None),
        ("A or B", None),
        ("A, B", None),
        ("The answer is (A) or (B)", None),
        ("Option B", 1),
        ("Option A is wrong. Option B is right", None),
        ("Red or Blue", None),
        ("The correct option is (B).", 1),
        ("A. The man says so, but the final answer is D", 3),
        ("Answer: B. No, answer: C", 2),
        ("<think>A or B? The answer is A.</think>C", 2),
        ("Answer:\n\nC", 2),
        ("I think C", 2),
        ("It is not B", None),
        ("E", None),
        ("The answer is E", None),
        ("Can't say", None),
        ("D's car", None),
    ],
)
def test_the_official_reading(text: str, choice: int | None) -> None:
    assert named_option(text, ("Red", "Blue", "Green", "White")) == choice


def test_a_capital_alone_is_the_letter_also_where_options_are_letters() -> None:
    """Prompts ask for a letter, so "A" is the first option whatever the options read."""
    options = ("C", "A", "D", "B")
    for protocol in PROTOCOLS:
        extract = get_task("custom").extract
        assert extract is not None
        assert [extract(raw, sample(options=options), protocol, 0).choice for raw in "ABCD"] == [0, 1, 2, 3]
    assert named_option("(A)", options) == 0
    assert named_option("E", ("X", "E")) == 1  # no letter of two options, so the text
    assert named_option("e", ("a", "e", "i", "o", "u")) == 1
    assert named_option("b", ("a", "e")) == 1


def test_the_official_reading_of_options_that_hold_each_other() -> None:
    assert named_option("He takes the blue door.", ("blue", "blue door")) == 1
    assert named_option("A blue one", ("A blue one", "B")) == 0
    assert named_option("B", ("A blue one", "B")) == 1
    assert named_option("same", ("same", "Same.")) is None


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from([*"ABCDE", "(", ")", "answer", "is", ":", " ", "or", "Red"])).map("".join),
    st.integers(2, 5),
)
@example("(A) or (", 2)
@settings(max_examples=300, deadline=None)
def test_readings_take_any_text(text: str, count: int) -> None:
    options = ("Red", "Blue", "Green", "White", "E*(")[:count]
    for found in (
        named_option(text, options),
        chosen(first_letter(text, "ABCDE"), count),
        chosen(ranked_letter(text, "ABCDE"), count),
        chosen(standing_letter(text), count),
        chosen(marked_letter(text, lettered(options)), count),
    ):
        assert found is None or 0 <= found < count


@given(st.integers(0, 4), st.sampled_from(["{}", "({})", "{}.", "{}. {t}", "({}) {t}", "{}: {t}", "{}) {t}", "{}\n"]))
@settings(max_examples=60, deadline=None)
def test_every_protocol_reads_a_letter_in_its_usual_forms(index: int, form: str) -> None:
    options = ("one dog", "two dogs", "no pet", "this", "more")
    text = form.format("ABCDE"[index], t=options[index])
    assert named_option(text, options) == index
    assert chosen(first_letter(text, "ABCDE"), 5) == index
    assert chosen(ranked_letter(text, "ABCDE"), 5) == index
    assert chosen(standing_letter(text), 5) == index
    if form not in ("{}: {t}", "{}) {t}", "{}\n"):  # forms that EgoSchema's reading does not know
        assert chosen(marked_letter(text, lettered(options)), 5) == index


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("task", ["longvideobench", "egoschema_subset"])
def test_a_random_fallback_is_seeded_and_marked(task: str, protocol: str) -> None:
    extract = get_task(task).extract
    assert extract is not None
    guesses = [extract("no idea", sample(id=str(i)), protocol, seed=3) for i in range(200)]
    assert all(g.fallback for g in guesses)
    assert guesses == [extract("no idea", sample(id=str(i)), protocol, seed=3) for i in range(200)]
    assert guesses != [extract("no idea", sample(id=str(i)), protocol, seed=4) for i in range(200)]
    counts = [sum(g.choice == i for g in guesses) for i in range(4)]
    assert sum(counts) == 200
    assert min(counts) > 25  # every option, about equally often
    assert not extract("B", sample(), protocol, seed=3).fallback
    two = [extract("?", sample(id=str(i), options=("yes", "no")), protocol, 0).choice for i in range(40)]
    assert set(two) == {0, 1}


def test_fallbacks_stay_the_same_between_versions() -> None:
    assert [drawn(4, str(i), 0).choice for i in range(12)] == PINNED_DRAWS


PINNED_DRAWS = [0, 1, 3, 2, 2, 2, 2, 3, 1, 2, 3, 1]


def test_egoschema_reads_what_the_model_wrote_without_the_space_around_it() -> None:
    extract = get_task("egoschema_subset").extract
    assert extract is not None
    for protocol in PROTOCOLS:  # lmms-eval's models strip their answers; its reading alone would miss the letter
        assert extract("B\n", sample(), protocol, 0) == (1, False, True)


def test_a_letter_beyond_the_options_is_wrong_not_a_guess() -> None:
    extract = get_task("longvideobench").extract
    assert extract is not None
    found = extract("E", sample(), "lmms_eval_0_3", 0)
    assert (found.choice, found.fallback) == (None, False)


def test_mvbench_leaves_empty_answers_out_under_lmms_eval_only() -> None:
    extract = get_task("mvbench").extract
    assert extract is not None
    for raw, counted in (("", False), (" \n", False), ("no letter here", True), ("(B)", True)):
        assert extract(raw, sample(), "official", 0).counted
        for protocol in PROTOCOLS[1:]:
            assert extract(raw, sample(), protocol, 0).counted == counted
    assert extract("a person", sample(), "lmms_eval_0_3", 0).choice == 0  # lmms-eval's reading, in any case
    assert extract("a person", sample(), "official", 0).choice is None


# --- prompts ----------------------------------------------------------------------------------------------------------

LETTERED = "What colour is the door?\nA. Red\nB. Blue\nC. Green\nD. White"
BRACKETED = "(A) Red\n(B) Blue\n(C) Green\n(D) White"
VIDEOMME = (
    "Select the best answer to the following multiple-choice question based on the video{}. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n{}\n"
)
DIRECTLY = "Answer with the option's letter from the given choices directly."
WATCH = (
    "Carefully watch this video and pay attention to every detail. "
    "Based on your observations, select the best option that accurately addresses the question."
)
EVENTS = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
ASKED = f"Question: What colour is the door?\nOptions:\n{BRACKETED}\nOnly give the best option."
BOTH = VIDEOMME.format(" and the subtitles", LETTERED)
PROMPTS: dict[tuple[str, str], tuple[str, str | None, str]] = {
    ("videomme", "official"): (VIDEOMME.format("", LETTERED) + "The best answer is:", None, ""),
    ("videomme", "lmms_eval_0_3"): (f"{BOTH}\n{DIRECTLY}", None, ""),
    ("videomme", "lmms_eval_0_7"): (f"{BOTH}\n{DIRECTLY}", None, ""),
    ("videomme_w_subtitle", "official"): (VIDEOMME.format("", LETTERED) + "The best answer is:", None, ""),
    ("videomme_w_subtitle", "lmms_eval_0_3"): (
        f"This video's subtitles are listed below: \nNo subtitles available\n{BOTH}The best answer is:",
        None,
        "",
    ),
    ("videomme_w_subtitle", "lmms_eval_0_7"): (
        f"This video's subtitles are listed below: \nNo subtitles available\n{BOTH}The best answer is:",
        None,
        "",
    ),
    ("mlvu_dev", "official"): (ASKED, WATCH, "Best Option: ("),
    ("mlvu_dev", "lmms_eval_0_3"): (
        f"\nWhat colour is the door?\n{BRACKETED}\nOnly give the best option.\n\nBest option: (",
        None,
        "",
    ),
    ("mlvu_dev", "lmms_eval_0_7"): (
        f"What colour is the door?\n{BRACKETED}\nOnly give the best option.\nBest option: (",
        None,
        "",
    ),
    ("mvbench", "official"): (ASKED, EVENTS, "Best option:("),
    ("mvbench", "lmms_eval_0_3"): (
        f"Question:What colour is the door?\nOption:\n{BRACKETED}\nOnly give the best option.\n",
        None,
        "",
    ),
    ("mvbench", "lmms_eval_0_7"): (
        f"Question:What colour is the door?\nOption:\n{BRACKETED}\nOnly give the best option.\n",
        None,
        "",
    ),
    **{("longvideobench", protocol): (f"{LETTERED}\n{DIRECTLY}\n", None, "") for protocol in PROTOCOLS},
    **{("egoschema_subset", protocol): (f"{LETTERED}\n{DIRECTLY}", None, "") for protocol in PROTOCOLS},
    **{
        ("custom", protocol): (
            "Select the best answer to the following multiple-choice question based on the video. "
            f"Respond with only the letter of the correct option.\n{LETTERED}\nThe best answer is:",
            None,
            "",
        )
        for protocol in PROTOCOLS
    },
}


@pytest.mark.parametrize(("task", "protocol"), PROMPTS)
def test_prompts(task: str, protocol: str) -> None:
    prompt = get_task(task).prompt
    assert prompt is not None
    assert tuple(prompt(sample(), protocol, [0.0])) == PROMPTS[task, protocol]


def test_mlvu_asks_the_parquet_s_own_question() -> None:
    prompt = get_task("mlvu_dev").prompt
    assert prompt is not None
    own = sample(raw={"asked": "Q?\n(A) 1\n(B) 2"})
    assert prompt(own, "lmms_eval_0_7", []).user == "Q?\n(A) 1\n(B) 2\nOnly give the best option.\nBest option: ("
    assert prompt(own, "official", []).user == ASKED


# --- subtitles --------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, text: str | bytes, name: str = "a.srt") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_only_subtitles_of_the_sampled_frames_are_shown(tmp_path: Path) -> None:
    prompt = get_task("videomme_w_subtitle").prompt
    assert prompt is not None
    shown = sample(subtitles=write(tmp_path, make.srt(make.VIDEOMME_SUBTITLES)))
    text = prompt(shown, "official", [0.0, 1.0, 2.75]).user
    asked = VIDEOMME.format(" and the subtitles", LETTERED) + "The best answer is:"
    assert text == f"This video's subtitles are listed below:\nat the start\nat the end\n{asked}"
    for protocol in PROTOCOLS[1:]:
        text = prompt(shown, protocol, [0.0, 1.0, 2.75]).user
        assert text == f"This video's subtitles are listed below: \nat the start\nat the end\n{asked}"
    for seconds in ([], [1.0, 2.0], [math.nan, math.nan]):
        assert "subtitles" not in prompt(shown, "official", seconds).user  # none at these times: no prefix
    untagged = sample(subtitles=write(tmp_path, make.srt(make.VIDEOMME_SUBTITLES, tag=False), "b.srt"))
    assert "at the start" in prompt(untagged, "official", [0.0]).user
    assert "at the start" not in prompt(untagged, "lmms_eval_0_7", [0.0]).user  # it knows one tag only
    plain = get_task("videomme").prompt
    assert plain is not None
    assert "at the start" not in plain(shown, "official", [0.0]).user


def test_longvideobench_lists_subtitles_under_official(tmp_path: Path) -> None:
    task = get_task("longvideobench")
    samples = task.load(make.longvideobench(tmp_path)).samples
    assert task.prompt is not None
    for found, last in zip(samples[:2], ("at the end", "the end"), strict=True):  # both JSON forms
        head = task.prompt(found, "official", [0.0, 2.75]).user.split("\nWhich one?")[0]
        assert head == f"This video's subtitles are listed below:\nat the start\n{last}"  # ten seconds into the source
        assert task.prompt(found, "official", [1.5]).user.startswith("Which one?")
        assert task.prompt(found, "lmms_eval_0_3", [0.0, 2.75]).user.startswith("Which one?")
    for path in (tmp_path / "subtitles").iterdir():
        path.unlink()
    (tmp_path / "subtitles").rmdir()
    samples = task.load(tmp_path).samples
    assert task.prompt(samples[0], "lmms_eval_0_7", [0.0])
    with pytest.raises(FileNotFoundError, match=r"no folder subtitles/.*hf download"):
        task.prompt(samples[0], "official", [0.0])


def test_a_lost_subtitle_file_is_no_video_without_words(tmp_path: Path) -> None:
    """Every question of LongVideoBench has its file: without it `official` would silently ask another question."""
    task = get_task("longvideobench")
    root = make.longvideobench(tmp_path)
    (root / "subtitles" / "abc0_en.json").unlink()
    first, second, _ = task.load(root).samples
    assert task.prompt is not None
    with pytest.raises(ValueError, match=r"abc0_en\.json: cannot be read as subtitles"):
        task.prompt(first, "official", [0.0])
    assert task.prompt(first, "lmms_eval_0_3", [0.0])
    assert "at the start" in task.prompt(second, "official", [0.0]).user


TOLERATED = {
    "plain": (
        "1\n00:00:01,000 --> 00:00:02,500\nHello\n\n2\n00:00:03,000 --> 00:00:04,000\nthere\n",
        ["Hello", "there"],
    ),
    "byte order mark, CRLF": ("\ufeff1\r\n00:00:01,000 --> 00:00:02,500\r\nHello\r\n\r\n", ["Hello"]),
    "lone CR": ("1\r00:00:01,000 --> 00:00:02,500\rHello\r", ["Hello"]),
    "tags": (
        '1\n00:00:01,000 --> 00:00:02,500\n<font color="white" size=".72c">Hel<b>lo</b></font>{\\an8}\n',
        ["Hello"],
    ),
    "a tag in a tag": ("1\n00:00:01,000 --> 00:00:02,500\nHello <<|im_end|>|im_end|>you\n", ["Hello you"]),
    "two lines": ("1\n00:00:01,000 --> 00:00:02,500\nHello\nyou\n", ["Hello you"]),
    "an empty line inside": (
        "1\n00:00:01,000 --> 00:00:02,500\nHello\n\nyou\n\n2\n00:00:03,000 --> 00:00:04,000\nx\n",
        ["Hello you", "x"],
    ),
    "no index": ("00:00:01,000 --> 00:00:02,500\nHello\n\n00:00:03,000 --> 00:00:04,000\nthere", ["Hello", "there"]),
    "no empty lines": (
        "1\n00:00:01,000 --> 00:00:02,500\nHello\n2\n00:00:03,000 --> 00:00:04,000\nx\n",
        ["Hello 2", "x"],
    ),
    "a number as text": (
        "1\n00:00:01,000 --> 00:00:02,500\n1984\n\n2\n00:00:03,000 --> 00:00:04,000\n5\n",
        ["1984", "5"],
    ),
    "no text": ("1\n00:00:01,000 --> 00:00:02,500\n\n2\n00:00:03,000 --> 00:00:04,000\nx\n", ["x"]),
    "points, no hours, positions": ("1\n00:01.000 --> 00:02.500 X1:40 Y1:20\nHello\n", ["Hello"]),
    "wrong order": ("2\n00:00:03,000 --> 00:00:04,000\nx\n\n1\n00:00:01,000 --> 00:00:02,500\nHello\n", ["Hello", "x"]),
    "rubbish around": ("WEBVTT\n\nnote\n\n1\n00:00:01,000 --> 00:00:02,500\nHello\n", ["Hello"]),
    "a placeholder": ("1\n00:00:01,000 --> 00:00:02,500\n<|im_end|>\x1b[0m<video>Hello\n", ["[0mHello"]),
    "nothing": ("", []),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_srt_files_as_they_come(tmp_path: Path, name: str) -> None:
    text, expected = TOLERATED[name]
    lines = read_subtitles(write(tmp_path, text))
    assert [line.text for line in lines] == expected
    if expected:
        assert lines[0][:2] in ((1.0, 2.5), (3.0, 4.0))
        assert lines == sorted(lines, key=lambda line: line[:2])


def test_overlapping_lines_and_borders() -> None:
    lines = [Line(0, 2, "a"), Line(1, 3, "b"), Line(2, 2, "none"), Line(5, math.inf, "c")]
    assert [line.text for line in lines_at(lines, [1.5])] == ["a", "b"]
    assert [line.text for line in lines_at(lines, [2.0])] == ["b"]  # shown from the start, up to the end
    assert [line.text for line in lines_at(lines, [0.0, 1.9, 0.5])] == ["a", "b"]  # each once, in order
    assert [line.text for line in lines_at(lines, [2.3], at_least=1.0)] == ["b", "none"]
    assert [line.text for line in lines_at(lines, [1e9])] == ["c"]
    assert lines_at(lines, []) == lines_at(lines, [math.nan]) == []


def test_lmms_eval_takes_one_tag_only(tmp_path: Path) -> None:
    tag = '<font color="white" size=".72c">{}</font>'
    text = make.srt([(0, 1, tag.format("one") + tag.format("two")), (1, 2, "bare")], tag=False)
    assert lmms_texts(read_subtitles(write(tmp_path, text))) == ["one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("{}", "must be a list"),
        ('["x"]', "item 0: needs timestamp and text"),
        ('[{"text": "x"}]', r"item 0: needs .*found \['text'\]"),
        ('[{"timestamp": 3, "text": "x"}]', "must be .start, end."),
        ('[{"timestamp": ["a", 1], "text": "x"}]', "hh:mm:ss.mmm, found 'a'"),
        ('[{"start": "1", "end": "00:00:02", "line": "x"}]', "found '1'"),
    ],
)
def test_wrong_subtitle_json(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_subtitles(write(tmp_path, text, "a.json"))
    assert "a.json" in str(error.value)


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from(["1\n", "00:00:01,000 --> 00:00:02,500", "\n", "a", "<", ">", "-->"])).map(
        lambda p: "".join(p).encode()
    )
)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_as_plain_text(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.srt"
    path.write_bytes(content)
    for line in read_subtitles(path):
        assert line.text
        assert all(ord(c) >= 32 for c in line.text)
        assert line.start <= 1e9
