"""Reading a choice out of a raw answer, by the named rules of three protocols.

* `official`: our own reading, strict about what counts as naming an option (`named_option`).
* `lmms_eval_0_3`: as lmms-eval 0.3.0, which HoliTom's tables were made with. It takes the first capital A, B, C or D
  anywhere, so that "Answer: C" is A.
* `lmms_eval_0_7`: as lmms-eval 0.7.3, which ranks the formats in which a letter stands.

The rules were written anew from what those programs do, and compared with them on random texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .tasks.base import LETTERS, Extracted, Sample

PROTOCOLS = ("official", "lmms_eval_0_3", "lmms_eval_0_7")

_OPENINGS = ("The best answer is", "The correct answer is", "The answer is", "The answer")
_CLOSING = ("The best option is", "The correct option is", "Best answer:", "Best option:")
# lmms-eval 0.3.0 lacks two commas in the lists of Video-MME and MLVU: these pairs are joined, and so never found
_CLOSING_JOINED = ("The best option isThe correct option is", "Best answer:Best option:")

_FORMS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))
_NOUNS = {"answer": ("", "correct ", "best "), "option": ("correct ", "best "), "choice": ("", "correct ")}
_PHRASES = (
    *(f"{the}{kind}{noun} is" for noun, kinds in _NOUNS.items() for kind in kinds for the in ("the ", "")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)

_NOUN = r"(?:answer|option|choice)"
_PUNCTUATION = [
    ";",
    "/",
    "[",
    "]",
    '"',
    "{",
    "}",
    "(",
    ")",
    "=",
    "+",
    "\\",
    "_",
    "-",
    ">",
    "<",
    "@",
    "`",
    ",",
    "?",
    "!",
]


def lettered(options: Sequence[str], form: str = "{}. {}") -> list[str]:
    """Options with their letters: "A. text", or in another form."""
    return [form.format(letter, text) for letter, text in zip(LETTERS, options, strict=False)]


def drawn(count: int, sample_id: str, seed: int) -> Extracted:
    """A choice drawn at random among `count`, the same one for the same seed and sample, marked as a fallback."""
    generator = random.Random(f"{seed}:{sample_id}")  # noqa: S311 - a reproducible guess, no secret
    return Extracted(generator.randrange(count), fallback=True)


def chosen(letter: str | None, count: int) -> int | None:
    """The index of a letter among `count` options; None without a letter or beyond them."""
    index = LETTERS.find(letter) if letter else -1
    return index if 0 <= index < count else None


def named_option(raw: str, options: Sequence[str]) -> int | None:
    """The option that an answer names: the reading of `official`.

    In this order: a whole answer that is one capital letter (prompts ask for it: it is one too where an option reads
    "A"), one option's text, or one letter in any case; the last capital letter after
    "answer is", "option:" and the like; a capital at the start ("(B)", "B. text", "B text"); the only letter after
    "answer", "option" or "choice"; the only one in parentheses; the only option whose text stands in the answer; a
    capital alone at the end. Anything before "</think>" is left out. A letter joined to another ("B or C") names none.
    An A (or I) before a word is an article, unless the word begins that option.

    Args:
        raw: what the model wrote, without the prefix its answer was given.
        options: texts without letters; letters beyond their number are none.

    Returns:
        the index, or None.
    """
    text = raw.rsplit("</think>", 1)[-1].strip()
    letters, texts = LETTERS[: len(options)], [_folded(o) for o in options]
    single = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    if single and single[1] in letters:
        return letters.index(single[1])
    if texts.count(_folded(text)) == 1:
        return texts.index(_folded(text))
    if single:
        return chosen(single[1].upper(), len(options))
    letter = rf"([{letters}])(?![\w'\u2019])"
    declared = re.finditer(rf"(?i:\b{_NOUN}\W*(?:is|would be|should be|[:=])\W*(?:{_NOUN}\s+)?\W*)(?-i:{letter})", text)
    leading = re.match(rf"\W*{letter}", text)
    for match in (*reversed(list(declared)), leading):
        if match and not _is_article(match, texts):
            joined = re.match(rf"\W*\b(?:or|and)\W+{letter}|\)?\s*[/,&]\s*\(?{letter}", text[match.end() :])
            return None if joined else LETTERS.index(match[1])
    for pattern in (rf"(?i:\b{_NOUN}\s+\W?)(?-i:{letter})", rf"\({letter}\)"):
        if len(named := {match[1] for match in re.finditer(pattern, text) if not _is_article(match, texts)}) == 1:
            return LETTERS.index(named.pop())
    inside = [o for o in texts if o and re.search(rf"(?<!\w){re.escape(o)}(?!\w)", _folded(text))]
    longest = [o for o in inside if not any(o != other and o in other for other in inside)]
    if len(longest) == 1:
        return texts.index(longest[0])
    at_end = re.search(rf"(?<!not)[\s:*]{letter}\W*$", text)
    return LETTERS.index(at_end[1]) if at_end else None


def _folded(text: str) -> str:
    return " ".join(text.casefold().strip(" \t\n.!\"'*").split())


def _is_article(match: re.Match[str], texts: Sequence[str]) -> bool:
    """Whether the letter found is the word "A" or "I" and not an option's name."""
    rest = match.string[match.end() :]
    if match[1] not in "AI" or not re.match(r"\s+(?!(?:is|because|since|or|and)\b)\w", rest):
        return False
    own = texts[LETTERS.index(match[1])]
    return not (own and _folded(rest).startswith(own))


def first_letter(raw: str, letters: str, joined: bool = True) -> str | None:
    """The reading of lmms-eval 0.3.0: leave out certain openings, then the first of `letters` anywhere.

    Args:
        raw: the answer.
        letters: the letters that count, in capitals.
        joined: with the two missing commas of its Video-MME and MLVU files; LongVideoBench's file has the commas.
    """
    text = raw.strip()
    for opening in _OPENINGS + (_CLOSING_JOINED if joined else _CLOSING):
        text = text.replace(opening, "")
    found = re.search(f"[{letters}]", text)
    return found[0] if found else None


def ranked_letter(raw: str, letters: str) -> str | None:
    """The reading of lmms-eval 0.7.3: the best ranked format wins, within one format the last place.

    Ranks: at the start 10, at the end 9, anywhere after an answer phrase 7, "(A)" 6, "A." 5, "A:" 4, "A)" 3, "A " 2;
    without any of these, the last of `letters` anywhere.
    """
    text = raw.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    padded, bare = f" {text} ", text.strip()
    found = []  # (rank, place, letter)
    for letter in letters:
        found += [(rank, padded.rfind(form.format(letter)), letter) for rank, form in _FORMS]
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(padded), letter))
    lower = padded.lower()
    for phrase in _PHRASES:
        if (at := lower.find(phrase)) >= 0:
            found += [(7, padded.find(letter, at + len(phrase)), letter) for letter in letters]
    found = [entry for entry in found if entry[1] >= 0]
    found = found or [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def mcq_letter(raw: str, letters: str, protocol: str) -> str | None:
    """The letter by the lmms-eval of a protocol, for the benchmarks that share its general reading."""
    return first_letter(raw, letters) if protocol == "lmms_eval_0_3" else ranked_letter(raw, letters)


def option_of_four(raw: str, sample: Sample, protocol: str, seed: int) -> Extracted:
    """The choice of tasks whose options are A to D, as `Task.extract`; seed: not needed, nothing is drawn."""
    if protocol == "official":
        return Extracted(named_option(raw, sample.options))
    return Extracted(chosen(mcq_letter(raw, "ABCD", protocol), len(sample.options)))


def standing_letter(raw: str) -> str | None:
    """MVBench's reading in lmms-eval (both versions): "A. text", else the first A-E that stands alone, in any case."""
    text = raw.strip()
    if match := re.match(r"([A-E])\.\s*(.+)$", text, re.IGNORECASE):
        return match[1].upper()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text) is not None
    clean = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if beside_space or thousands else " ")
    clean = re.sub(r"(?!<=\d)\.(?!\d)", "", clean, count=32)  # it passes a flag where the count belongs
    found = re.search(r"\b([A-E])\b", clean, re.IGNORECASE)
    return found[1].upper() if found else None


def marked_letter(raw: str, options: Sequence[str]) -> str | None:
    """EgoSchema's reading in lmms-eval (both versions): the first of "(A)", "A " and "A.", else an option's text.

    Each form is looked for at its last place; the text of an option (as the data set has it, letter included) counts
    in answers of more than five words only.
    """
    text = raw
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    places = [(text.rfind(form.format(c)), c) for form in ("({})", "{} ", "{}.") for c in letters]
    places = [place for place in places if place[0] >= 0]
    if not places and len(text.split()) > 5:
        lower = text.lower()
        places = [(lower.rfind(o.strip().lower()), c) for o, c in zip(options, letters, strict=True)]
        places = [place for place in places if place[0] >= 0]
    return min(places, key=lambda place: place[0])[1] if places else None
