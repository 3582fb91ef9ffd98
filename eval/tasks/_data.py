"""Reading a data set's annotation files, with errors that name the file, the row, the column, and where to get it."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._paths import VIDEO_ENDINGS, commit_of, hf_home, snapshots
from .base import LETTERS, Loaded, Sample

_REQUIRED: Any = object()
_LARGEST = 1e15  # JSON knows no limit: such a whole number need not fit a float
# controls and what turns the writing direction; line ends and tabs stay, they are part of a question
_HIDDEN = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


class Source(NamedTuple):
    """A data set: its names on the hub, the folders lmms-eval extracts it to within $HF_HOME, what the user needs."""

    repos: tuple[str, ...]
    folders: tuple[str, ...]
    needs: str
    revisions: tuple[str, ...] = ("main",)

    @property
    def homepage(self) -> str:
        return f"https://huggingface.co/datasets/{self.repos[0]}"

    @property
    def get_it(self) -> str:
        revision = "" if self.revisions[0] == "main" else f" --revision {self.revisions[0]}"
        return (
            f"Get it from {self.homepage}: `hf download {self.repos[0]} --repo-type dataset{revision} "
            f"--local-dir FOLDER`, unpack its archives there ({self.needs}), and give FOLDER. Nothing is downloaded "
            "without being asked."
        )


def bases(source: Source, root: Path | None) -> list[Path]:
    """Folders in which a data set may lie: within `root`, else in the hub cache and where lmms-eval extracts it."""
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder. {source.get_it}")
    tops = [root] if root is not None else snapshots(source.repos, source.revisions)
    places = [place for top in tops for place in (top, *(top / name for name in source.folders))]
    places += [hf_home() / name for name in source.folders if root is None]
    return [place for place in places if place.is_dir()]


def annotation_files(source: Source, root: Path | None, patterns: Sequence[str]) -> list[Path]:
    """The annotation files: those of the first of the globs that matches, in the first folder where one does.

    A root that holds only the videos takes them from the hub cache.

    Raises:
        FileNotFoundError: there are none; names the patterns, the folders, and where to get the data set.
    """
    places = bases(source, root)
    for place in [*places, *(snapshots(source.repos, source.revisions) if root is not None else ())]:
        for pattern in patterns:
            if files := sorted(path for path in place.glob(pattern) if path.is_file()):
                return files
    looked = ", ".join(map(str, places)) or f"the hub cache ({', '.join(source.repos)})"
    raise FileNotFoundError(f"no {' or '.join(patterns)} in {looked}. {source.get_it}")


def media_folders(source: Source, root: Path | None, names: Sequence[str], what: str = "videos") -> list[Path]:
    """The folders that hold the videos (or subtitles), of `names` in every place; "." counts if it holds videos.

    Raises:
        FileNotFoundError: there is none.
    """
    places = bases(source, root)
    found = [place / name for place in places for name in names if _holds(place / name, name)]
    if not found:
        wanted = ", ".join(name for name in names if name != ".")
        looked = ", ".join(map(str, places)) or str(hf_home())
        raise FileNotFoundError(f"no folder of {what} ({wanted}) in {looked}. {source.get_it}")
    return found


def _holds(folder: Path, name: str) -> bool:
    if not folder.is_dir() or name != ".":
        return folder.is_dir()
    return any(path.suffix in VIDEO_ENDINGS for pattern in ("*", "*/*") for path in folder.glob(pattern))


def clean(text: str) -> str:
    """Text without control characters other than line ends and tabs, and with nothing that turns its direction."""
    text = _HIDDEN.sub("", text.replace("\r\n", "\n"))
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


class Row:
    """One row of an annotation file; its readers raise ValueError that names file, row, column and value."""

    def __init__(self, values: Any, where: str, hint: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: must be an object with columns, found {values!r:.80}. {hint}".rstrip())
        self.values, self.where, self._hint = values, where, hint

    def has(self, column: str) -> bool:
        """Whether the column is there and has a value."""
        return self.values.get(column) is not None

    def _get(self, column: str, default: Any) -> Any:
        if self.values.get(column) is None and default is not _REQUIRED:
            return default
        if column not in self.values:
            raise ValueError(missing_column(self.where, column, self.values, self._hint))
        return self.values[column]

    def wrong(self, column: str, needs: str) -> ValueError:
        """The error for a value that is not what the column needs."""
        shown = repr(self.values.get(column))
        shown = shown if len(shown) <= 120 else f"{shown[:120]}..."
        return ValueError(f"{self.where}, column {column!r}: needs {needs}, found {shown}. {self._hint}".rstrip())

    def text(self, column: str, default: Any = _REQUIRED) -> str:
        """A text that is not empty, cleaned."""
        value = self._get(column, default)
        if not isinstance(value, str) or (not clean(value).strip() and value is not default):
            raise self.wrong(column, "a text")
        return clean(value)

    def file_name(self, column: str) -> Any:
        """The value as it is: whoever makes a path of it checks it, and must see what a cleaning would hide."""
        return self._get(column, _REQUIRED)

    def texts(self, column: str) -> tuple[str, ...]:
        """Two or more texts, cleaned."""
        value = self._get(column, _REQUIRED)
        if not isinstance(value, list) or not all(isinstance(v, str) and clean(v).strip() for v in value):
            raise self.wrong(column, "a list of texts")
        if not 2 <= len(value) <= len(LETTERS):
            raise self.wrong(column, f"2 to {len(LETTERS)} options")
        return tuple(clean(v) for v in value)

    def number(self, column: str, default: Any = _REQUIRED) -> Any:
        """A finite number (up to 1e15 in size), or `default` where there is none."""
        value = self._get(column, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
            raise self.wrong(column, "a number")
        return value


def missing_column(where: str, column: str, found: Iterable[str], hint: str) -> str:
    """The message for a column that is not there."""
    return f"{where}: no column {column!r}; found {', '.join(map(repr, sorted(found))) or 'none'}. {hint}".rstrip()


def read_rows(files: Sequence[Path], columns: Sequence[str], hint: str) -> list[Row]:
    """The rows of parquet or JSON files, in order.

    Args:
        files: .parquet, or .json with a list of objects.
        columns: those every file must have.
        hint: where to get the data set.

    Raises:
        ImportError: parquet without pyarrow.
        ValueError: a damaged or empty file, or a column that is not there.
    """
    rows: list[Row] = []
    for path in files:
        values = _parquet(path, hint) if path.suffix == ".parquet" else _json(path, hint)
        if not values:
            raise ValueError(f"{path}: no rows. {hint}")
        numbered = [Row(value, f"{path}, row {number}", hint) for number, value in enumerate(values)]
        for column in columns:
            if not any(column in row.values for row in numbered):
                raise ValueError(missing_column(str(path), column, numbered[0].values, hint))
        rows += numbered
    return rows


def _parquet(path: Path, hint: str) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading parquet needs pyarrow: pip install 'holimerge[eval]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error}). {hint}") from error


def _json(path: Path, hint: str) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). {hint}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: must be a list of rows, found {type(values).__name__}. {hint}")
    return values


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Options as texts: "A. text", "(A) text" and "A) text" lose their letters if every option has its own."""
    found = [
        re.match(rf"\(?{letter}[.):]\s*(.*)", o.strip(), re.DOTALL) for letter, o in zip(LETTERS, options, strict=False)
    ]
    if all(match and match[1].strip() for match in found):
        return tuple(match[1].strip() for match in found if match)
    return tuple(o.strip() for o in options)


def by_letter(row: Row, column: str, count: int) -> int:
    """The index that a column's letter stands for."""
    letter = row.text(column).strip().strip("().").upper()
    if len(letter) != 1 or letter not in LETTERS[:count]:
        raise row.wrong(column, f"a letter from A to {LETTERS[count - 1]}")
    return LETTERS.index(letter)


def by_text(row: Row, column: str, options: Sequence[str]) -> int:
    """The index of the option that a column repeats."""
    answer = row.text(column).strip()
    texts = [o.strip() for o in options]
    if answer not in texts:
        raise row.wrong(column, f"one of the options {list(options)}")
    return texts.index(answer)


def loaded(samples: Sequence[Sample], files: Sequence[Path]) -> Loaded:
    """Samples with the revision of their annotation files: the hub commit, or "sha256:" and 16 hex digits.

    Raises:
        ValueError: two samples of one id.
    """
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ValueError(f"{files[0]}: two rows have the id {sample.id!r}")
        seen.add(sample.id)
    revision = commit_of(files[0])
    if revision is None:
        content = hashlib.sha256()
        for path in files:
            content.update(hashlib.sha256(path.read_bytes()).digest())
        revision = f"sha256:{content.hexdigest()[:16]}"
    source = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    return Loaded(tuple(samples), revision, source)


Record = Mapping[str, Any]


def percent(records: Sequence[Record]) -> float:
    """Share of right answers, in percent; 0 without records."""
    return 100 * sum(bool(r["correct"]) for r in records) / len(records) if records else 0.0


def split(records: Iterable[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    """Records by a key, keys in order."""
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(key(record), []).append(record)
    return dict(sorted(parts.items()))


def mean_of_categories(records: Sequence[Record]) -> float:
    """The unweighted mean of the categories' percentages, over the categories that have records."""
    shares = [percent(part) for part in split(records, lambda r: r["category"]).values()]
    return sum(shares) / len(shares) if shares else 0.0
