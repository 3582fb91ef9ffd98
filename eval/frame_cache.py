"""Sampled frames on disk, so that a video asked about in several runs is decoded once.

An entry is found by the file's content and by everything that decides which frames come out: the sampling rule, its
numbers, the size, the decoder and its version. "Content" is size, modification time in nanoseconds, and a SHA-256 of
64 KiB blocks spread evenly over the file (all of a file below 1 MiB). Hashing whole files would read gigabytes where
seeking reads megabytes; name and folder do not matter, so a data set may move. Frames are kept as they were decoded:
what comes from the cache is what decoding gives, bit for bit.

Entries are .npz files without pickle, checked by the archive's CRC when read; one that cannot be read is a miss. They
are written beside and renamed, so that processes can share the folder. The least recently used go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holimerge.video import Video, read_video

from .conditions import version_of

VERSION = 2
DEFAULT_BYTES = 10 * 10**9
_BLOCK, _BLOCKS = 64 * 1024, 16
_ENTRY = re.compile(r"[0-9a-f]{64}\.npz")
_WRITING = re.compile(r"\.writing-\w+\.npz")
_ABANDONED = 3600.0  # seconds after which a file still being written belongs to a process that died


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/holimerge/frames`, or `~/.cache/holimerge/frames`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "holimerge" / "frames"


def parse_size(text: str) -> int:
    """Bytes from "10GB", "500 MB", "1.5TB" (powers of ten) or a plain number.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if found is None:
        raise ValueError(f"size {text!r}: a number with KB, MB, GB or TB, for instance 10GB")
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2] or " "))


def sampled_hash(path: Path) -> str:
    """SHA-256 of a file's size and of blocks spread over it (of all of it, below 1 MiB).

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def content_key(path: Path) -> str:
    """What stands for a file's content: `sampled_hash` and modification time.

    Raises:
        OSError: the file cannot be read.
    """
    return f"{sampled_hash(path)} {path.stat().st_mtime_ns}"


@dataclass
class FrameCache:
    """The cache in one folder.

    Attributes:
        folder: where; made when the first entry is written.
        limit: bytes that all entries together may take.
        hits, misses: of this object.
    """

    folder: Path
    limit: int = DEFAULT_BYTES
    hits: int = 0
    misses: int = 0

    def read(self, path: Path, decode: Callable[..., Video] = read_video, **rule: Any) -> tuple[Video, bool]:
        """The video of `decode(path, **rule)`, and whether it came from the cache. Folders of images are not cached.

        Raises:
            whatever `decode` raises.
        """
        try:
            name = None if not path.is_file() else _name(content_key(path), rule)
        except OSError:
            name = None  # decoding says what is wrong
        found = None if name is None else self._load(self.folder / name, str(path))
        if found is not None:
            self.hits += 1
            return found, True
        self.misses += 1
        video = decode(path, **rule)
        if name is not None:
            self._store(self.folder / name, video)
        return video, False

    def size(self) -> tuple[int, int]:
        """Entries and their bytes."""
        entries = self._entries()
        return len(entries), sum(size for _, size, _ in entries)

    def clear(self) -> tuple[int, int]:
        """Remove every entry (nothing else in the folder); returns how many, and their bytes."""
        found = self.size()
        for path, _, _ in self._entries():
            path.unlink(missing_ok=True)
        self._sweep(0.0)
        return found

    def _entries(self) -> list[tuple[Path, int, int]]:
        """Path, bytes and time of last use (ns) of each entry."""
        found = []
        for path in self._listed(_ENTRY):
            with contextlib.suppress(OSError):  # another process removed it
                state = path.stat()
                found.append((path, state.st_size, state.st_mtime_ns))
        return found

    def _listed(self, names: re.Pattern[str]) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if names.fullmatch(path.name)]
        except OSError:
            return []

    def _load(self, entry: Path, source: str) -> Video | None:
        try:
            arrays = {}
            with zipfile.ZipFile(entry) as file:
                for name in file.namelist():
                    with file.open(name) as member:
                        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                        if member.read(1):  # the CRC is checked at the end, which a damaged shape does not reach
                            return None
            told = json.loads(arrays["about.npy"].tobytes())
            frames, times = arrays["frames.npy"], arrays["timestamps.npy"]
            indices = arrays["indices.npy"] if told["indices"] else None
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or times.shape != frames.shape[:1]:
                return None
            video = Video(frames, times, told["fps"], told["duration"], told["total_frames"], source, indices)
        except Exception:  # not there, or damaged: an archive with wrong bytes raises nearly anything
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)  # used now
        return video

    def _store(self, entry: Path, video: Video) -> None:
        """Write an entry and make room; a full or read-only disk leaves the cache as it is."""
        if video.frames.nbytes > self.limit:
            return
        told = {"fps": video.fps, "duration": video.duration, "total_frames": video.total_frames}
        told["indices"] = video.indices is not None
        arrays = {"frames": video.frames, "timestamps": np.asarray(video.timestamps, dtype=np.float64)}
        if video.indices is not None:
            arrays["indices"] = np.asarray(video.indices, dtype=np.int64)
        arrays["about"] = np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)
        written = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            number, written = tempfile.mkstemp(prefix=".writing-", suffix=".npz", dir=self.folder)
            with os.fdopen(number, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(written, entry)
        except OSError:
            if written is not None:
                with contextlib.suppress(OSError):
                    os.unlink(written)
            return
        self._shrink()

    def _shrink(self) -> None:
        self._sweep(_ABANDONED)
        entries = sorted(self._entries(), key=lambda entry: entry[2])
        total = sum(size for _, size, _ in entries)
        for path, size, _ in entries:
            if total <= self.limit:
                return
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size

    def _sweep(self, age: float) -> None:
        """Remove what processes that died were writing."""
        for path in self._listed(_WRITING):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime >= age:
                    path.unlink(missing_ok=True)


def _name(content: str, rule: dict[str, Any]) -> str:
    versions = {package: version_of(package) for package in ("av", "holimerge")}
    parts = {"version": VERSION, "content": content, "rule": rule, "versions": versions}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest() + ".npz"
