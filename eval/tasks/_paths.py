"""Where data lies on disk, and names from data sets that must not lead out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

VIDEO_ENDINGS = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")


def inside(folder: Path, name: object, where: str) -> Path:
    """The path of a file that a data set names, only if it lies in its folder.

    Args:
        folder: the data folder, as the user gave it or as it lies in the hub cache; may itself be a link.
        name: what the data set says: a relative path with forward slashes.
        where: the row, for the message.

    Returns:
        folder / name; the file need not exist.

    Raises:
        ValueError: no text, empty, absolute, with a drive letter, a backslash, a control character or "..", too long,
            or a link that leads elsewhere. (Files in a hub snapshot are links into the same data set's cache; that
            is where they may lead.)
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: needs the name of a file, found {name!r}")
    parts = PurePosixPath(name).parts
    if (
        name.startswith("/")
        or "\\" in name
        or ".." in parts
        or not parts
        or re.match(r"[A-Za-z]:", name)
        or any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in name)
        or any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
    ):
        raise ValueError(f"{where}: {name!r} is no plain relative file name, and names must not leave {folder}")
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: {name!r} cannot be looked up in {folder} ({error})") from error
    if target != home and not (target.is_relative_to(home) or target.is_relative_to(_reach(home))):
        raise ValueError(f"{where}: {name!r} is a link that leads out of {folder}, to {target}")
    if target == home:
        raise ValueError(f"{where}: {name!r} names the folder {folder} itself, not a file in it")
    return path


def _reach(folder: Path) -> Path:
    """How far links in a folder may lead: the data set's folder in the hub cache for a snapshot, else itself."""
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and re.match(r"(datasets|models|spaces)--", parent.parent.parent.name):
            return parent.parent.parent
    return folder


def find_file(folders: Sequence[Path], name: object, where: str, endings: Sequence[str] = ()) -> Path:
    """The first file of that name in some folders; where there is none, the path it should have.

    Args:
        folders: at least one, the best first.
        name: from the data set; checked by `inside` for every folder.
        where: the row, for the message.
        endings: endings to put on the name, the usual one first; empty if the name has its own. With a name that has
            an ending of videos, the same name with another one is taken too.

    Raises:
        ValueError: a name that leads out of a folder.
    """
    inside(folders[0], name, where)
    names = [f"{name}{ending}" for ending in endings] if endings else [str(name), *_other_endings(str(name))]
    for folder in folders:
        for candidate in names:
            if (path := inside(folder, candidate, where)).exists():
                return path
    return inside(folders[0], names[0], where)


def _other_endings(name: str) -> list[str]:
    path = PurePosixPath(name)
    if path.suffix and path.suffix not in VIDEO_ENDINGS:
        return []
    return [str(path.with_suffix(ending)) for ending in VIDEO_ENDINGS if ending != path.suffix]


def hf_home() -> Path:
    """Hugging Face's folder: $HF_HOME, else huggingface in $XDG_CACHE_HOME or ~/.cache (read when called)."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")).expanduser()


def hub_cache() -> Path:
    """The hub cache: $HF_HUB_CACHE, else `hub` in `hf_home()`."""
    return Path(os.environ.get("HF_HUB_CACHE") or hf_home() / "hub").expanduser()


def snapshots(repos: Iterable[str], revisions: Sequence[str] = ("main",)) -> list[Path]:
    """Folders of data sets in the hub cache, by the named revisions first, then any other that is there.

    Nothing is downloaded, whatever HF_HUB_OFFLINE says.
    """
    found = []
    for repo in repos:
        home = hub_cache() / f"datasets--{repo.replace('/', '--')}"
        names = [(home / "refs" / r).read_text().strip() for r in revisions if (home / "refs" / r).is_file()]
        if (home / "snapshots").is_dir():
            names += sorted(path.name for path in (home / "snapshots").iterdir())
        found += [home / "snapshots" / name for name in dict.fromkeys(names) if (home / "snapshots" / name).is_dir()]
    return found


def commit_of(path: Path) -> str | None:
    """The hub commit of a file in a snapshot folder, or None elsewhere."""
    for parent in Path(os.path.abspath(path)).parents:  # not resolved: the file itself is a link out of the snapshot
        if parent.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", parent.name):
            return parent.name
    return None
