"""Words of data sets are plain text: no control character reaches a terminal, no mark-up is taken for ours."""

from __future__ import annotations

import re
import unicodedata

# Letters that change what a terminal or an editor shows: controls, and those that turn the writing direction.
_HIDDEN = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&])")


def plain(text: object) -> str:
    """One line of text without control characters; tabs and line ends become spaces."""
    spaced = " ".join(str(text).split())
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cs") and c not in _HIDDEN)


def markdown(text: object) -> str:
    """`plain` text for a Markdown table: what Markdown or HTML would read as mark-up is escaped."""
    return _MARKDOWN.sub(r"\\\1", plain(text))
