"""What survives a kill: the run's identity (run.json) and one line of JSON per answer (records*.jsonl).

    DIR/run.json               what the run is: model, configurations, data revisions, protocols, seed; written once
    DIR/records.jsonl          answers of process 0, and at the end of everybody, in the order of the data
    DIR/records.rank1.jsonl    answers of process 1 while a run of several processes lasts
    DIR/results.json           the summary, written when every answer is there

A line is written whole, flushed and synced before the next question, so only the last one can be half-written. Who
opens a file again cuts that half off; who only reads, passes over it. A sample is known by (task, config, id).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

SCHEMA = 1
RUN, RESULTS = "run.json", "results.json"

_MISSING = object()  # null is a value: the configuration of an unpatched model

Key = tuple[str, str, str]
Record = dict[str, Any]


def key_of(record: Mapping[str, Any]) -> Key:
    """(task, config, sample id)."""
    return record["task"], record["config"], record["id"]


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename, so that the file is whole or not there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object; the message names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is needed, this is a {type(value).__name__}")
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """Every leaf that differs between two nested mappings, as "key.key: old, now new"."""
    for name in sorted({*old, *new}):
        path = f"{inside}.{name}" if inside else name
        before, after = old.get(name, _MISSING), new.get(name, _MISSING)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, path)
        elif before != after or (before is _MISSING) != (after is _MISSING):
            yield f"{path}: {_short(before)}, now {_short(after)}"


def _short(value: Any) -> str:
    text = "nothing" if value is _MISSING else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def open_run(folder: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Begin a run in a folder, or go on with the one that is there.

    Args:
        folder: made if missing.
        identity: everything that may change an answer, ready for JSON.
        resume: go on with the run in the folder; in an empty one a run begins all the same.

    Raises:
        ValueError: the folder holds something and `resume` is false; or it holds another run, and then the message
            names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(identity))
    if (folder / RUN).is_file():
        if not resume:
            raise ValueError(f"{folder}: holds a run already; go on with it by --resume, or give another --output")
        check_run(folder, identity)
        return
    # a run killed while it wrote this very file left something behind that is nobody's
    if any(not path.name.startswith(f".{RUN}.") for path in folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and holds no run ({RUN}); give another --output")
    write_json(folder / RUN, plain)


def check_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise ValueError unless the folder's run is this one; the message names every difference."""
    found = list(differences(read_json(folder / RUN), json.loads(json.dumps(identity))))
    if found:
        raise ValueError(f"{folder}: the run there is another one; {'; '.join(found)}. Give another --output")


def lines_of(path: Path) -> tuple[list[Record], int]:
    """The records of one file, and the number of bytes they take: what follows is a half-written line.

    Raises:
        ValueError: a damaged line that is not the last.
    """
    content = path.read_bytes()
    records: list[Record] = []
    good = 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # the last piece has no end: it is empty or half a line
        try:
            record = json.loads(line)
            key_of(record)
        except (ValueError, TypeError, KeyError):
            if good + len(line) + 1 == len(content):
                break  # a machine that lost power may have written the end but not the rest
            raise ValueError(
                f"{path}, line {number}: is damaged; remove that line and its sample is asked again"
            ) from None
        records.append(record)
        good += len(line) + 1
    return records, good


def record_files(folder: Path) -> list[Path]:
    """The files of all processes, process 0 first."""
    return sorted(folder.glob("records*.jsonl"))


def read_records(folder: Path) -> dict[Key, Record]:
    """All answers by key, whatever process wrote them; of an answer that is there twice the first."""
    found: dict[Key, Record] = {}
    for path in record_files(folder):
        try:
            records, _ = lines_of(path)
        except FileNotFoundError:  # another process has just merged the files
            continue
        for record in records:
            found.setdefault(key_of(record), record)
    return found


class Writer:
    """Appends to one process's file: `with Writer(folder, rank) as write: write(record)`."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path = folder / ("records.jsonl" if rank == 0 else f"records.rank{rank}.jsonl")
        self.file: Any = None

    def __enter__(self) -> Writer:
        good = lines_of(self.path)[1] if self.path.exists() else 0
        self.file = self.path.open("ab")
        self.file.truncate(good)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Write one record; when this returns it is on the disk."""
        self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def merge_files(folder: Path, order: Iterable[Key]) -> list[Record]:
    """Join the files of all processes into records.jsonl, in the given order; return those records.

    Killed in between, answers are in two files for a while, which `read_records` takes once.
    """
    found = read_records(folder)
    records = [found[key] for key in order if key in found]
    beside = folder / f".records.{os.getpid()}"
    with beside.open("wb") as file:
        for record in records:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / "records.jsonl")
    for path in record_files(folder):
        if path.name != "records.jsonl":
            path.unlink()
    return records
