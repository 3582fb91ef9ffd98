"""Subtitle files to lines with times: SubRip (Video-MME) and the two JSON forms of LongVideoBench.

Lines are plain text: tags and control characters are taken out, so that no file can bring in a placeholder of a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .plain import plain

_LATEST = 1e9  # seconds; JSON knows no limit, and such a whole number need not fit a float
_TIME = r"(?:(\d{1,6}):)?(\d{1,2}):(\d{1,2})(?:[,.](\d{1,6}))?"
_ARROW = re.compile(rf"^\s*{_TIME}\s*-->\s*{_TIME}")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")  # <font ...>, <|im_end|>, {\an8}
_LMMS_FONT = re.compile(r'<font color="white" size=".72c">(.*?)</font>')


class Line(NamedTuple):
    """One subtitle: seconds from start to end, its plain text, and the text as it stands in the file."""

    start: float
    end: float
    text: str
    raw: str = ""


def read_subtitles(path: Path, start_of_video: float = 0.0) -> list[Line]:
    """Read a subtitle file, .json as LongVideoBench's, anything else as SubRip.

    Args:
        path: the file.
        start_of_video: seconds to take off every time (LongVideoBench's `starting_timestamp_for_subtitles`).

    Returns:
        lines with text, by start time.

    Raises:
        ValueError: JSON that is no list of items in one of the two known forms; a file that is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as subtitles ({error})") from error
    lines = _from_json(text, path) if path.suffix.lower() == ".json" else _from_srt(text)
    moved = [Line(a - start_of_video, b - start_of_video, t, raw) for a, b, t, raw in lines if t]
    return sorted(moved, key=lambda line: line[:2])


def lines_at(lines: Iterable[Line], seconds: Sequence[float], at_least: float = 0.0) -> list[Line]:
    """The lines on screen at one of the moments `start <= t < end`, in their order.

    Args:
        lines: from `read_subtitles`.
        seconds: times of the sampled frames; NaN (no clock) matches nothing.
        at_least: shorter lines are widened around their middle to this many seconds (LongVideoBench: 1).
    """
    shown = []
    for line in lines:
        start, end = _widened(line, at_least)
        if any(start <= moment < end for moment in seconds):
            shown.append(line)
    return shown


def lmms_texts(lines: Iterable[Line]) -> list[str]:
    """What lmms-eval takes of Video-MME's lines: the first piece in exactly its font tag; other lines are dropped."""
    found = (_LMMS_FONT.search(line.raw) for line in lines)
    return [_text(match[1]) for match in found if match]


def _widened(line: Line, at_least: float) -> tuple[float, float]:
    if line.end - line.start >= at_least:
        return line.start, line.end
    middle = (line.start + line.end) / 2
    return middle - at_least / 2, middle + at_least / 2


def _text(raw: str) -> str:
    text = raw
    while (without := _TAG.sub("", text)) != text:  # "<<x>x>" holds one more
        text = without
    return plain(text)


def _from_srt(text: str) -> list[Line]:
    """Blocks start at a line with an arrow; an index, if there is one, is the line of digits before the next arrow."""
    rows = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    arrows = [(i, match) for i, row in enumerate(rows) if (match := _ARROW.match(row))]
    lines = []
    for number, (at, match) in enumerate(arrows):
        stop = arrows[number + 1][0] if number + 1 < len(arrows) else len(rows)
        body = [row.strip() for row in rows[at + 1 : stop]]
        if stop < len(rows) and len(body) > 1 and body[-1].isdecimal() and not body[-2]:
            body = body[:-1]  # the next block's index, after an empty line
        elif stop < len(rows) and len(body) == 1 and body[0].isdecimal():
            body = []  # a block without text
        raw = " ".join(row for row in body if row)
        lines.append(Line(_seconds(*match.groups()[:4]), _seconds(*match.groups()[4:]), _text(raw), raw))
    return lines


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return whole + float(f"0.{fraction}") if fraction else float(whole)


def _from_json(text: str, path: Path) -> list[Line]:
    try:
        items = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(items, list):
        raise ValueError(f"{path}: subtitles must be a list of items, found {type(items).__name__}")
    return [_item(item, f"{path}, item {number}") for number, item in enumerate(items)]


def _item(item: Any, where: str) -> Line:
    if isinstance(item, dict) and "timestamp" in item and "text" in item:
        times, raw = item["timestamp"], item["text"]
    elif isinstance(item, dict) and {"start", "end", "line"} <= item.keys():
        times, raw = [item["start"], item["end"]], item["line"]
    else:
        found = sorted(item) if isinstance(item, dict) else type(item).__name__
        raise ValueError(f"{where}: needs timestamp and text, or start, end and line; found {found}")
    if not (isinstance(times, list) and len(times) == 2):
        raise ValueError(f"{where}: timestamp must be [start, end] in seconds, found {times!r}")
    start = _moment(times[0], where)
    end = math.inf if times[1] is None else _moment(times[1], where)  # the last line has no end
    return Line(start, end, _text(str(raw)), str(raw))


def _moment(value: Any, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and -_LATEST < value < _LATEST:
        return float(value)
    match = re.fullmatch(_TIME, value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{where}: a time must be seconds or hh:mm:ss.mmm, found {value!r}")
    return _seconds(*match.groups())
