"""The times of an mp4 file's frames, from its header alone.

Listing packets reads the whole file; the header (ISO/IEC 14496-12: stts, ctts, stss, stsz, elst) has the same times in
a few kilobytes. Only plain headers are used: one edit at most, which shows every frame. Anything else, and any doubt,
is None, and the packets are listed instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_NESTED = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"}
_REFUSED = {b"mvex", b"stps", b"senc"}  # frames elsewhere, other marks of key frames, encryption
_LARGEST, _MOST = 1 << 28, 1 << 26  # bytes of a header, frames


@dataclass(frozen=True, eq=False)
class HeaderTimes:
    """Frames in the order stored: pts int64 `[n]` in ticks, keys bool `[n]`, durations int64 `[n]` in ticks."""

    pts: np.ndarray
    keys: np.ndarray
    durations: np.ndarray


def header_times(path: str, track: int) -> HeaderTimes | None:
    """Read the frame times of one track.

    Args:
        path: an mp4 or mov file.
        track: its track number.

    Returns:
        the times; None where the header is not plain, or not as long as it says.
    """
    moov = _moov(path)
    if moov is None:
        return None
    try:
        movie: dict[bytes, bytes] = {}
        for kind, body in _boxes(moov):
            if kind in _REFUSED:
                return None
            if kind != b"trak":
                movie[kind] = body
                continue
            found = dict(_leaves(body))
            head = found[b"tkhd"]
            if int.from_bytes(head[20:24] if head[0] else head[12:16], "big") == track:
                return _times(found, movie[b"mvhd"])
    except (KeyError, IndexError, ValueError):  # a box that is missing, or shorter than it says
        return None
    return None


def _moov(path: str) -> bytes | None:
    """The body of the file's only header; None with fragments, or a box without an end."""
    found, at, total = None, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while at + 8 <= total:
            file.seek(at)
            head = file.read(16)
            size, kind, skip = int.from_bytes(head[:4], "big"), head[4:8], 8
            if size == 1:
                size, skip = int.from_bytes(head[8:16], "big"), 16
            if size < skip or kind == b"moof" or (kind == b"moov" and (found is not None or size > _LARGEST)):
                return None
            if kind == b"moov":
                file.seek(at + skip)
                found = file.read(size - skip)
            at += size
    return found


def _boxes(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(body):
        size = int.from_bytes(body[at : at + 4], "big")
        if size < 8 or at + size > len(body):
            raise ValueError
        yield body[at + 4 : at + 8], body[at + 8 : at + size]
        at += size


def _leaves(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every box inside, those of `_NESTED` opened."""
    for kind, inside in _boxes(body):
        if kind in _REFUSED or (kind == b"sbgp" and inside[4:8] in (b"rap ", b"sync")):
            raise ValueError
        if kind in _NESTED:
            yield from _leaves(inside)
        else:
            yield kind, inside


def _times(track: dict[bytes, bytes], movie: bytes) -> HeaderTimes | None:
    size, count = _numbers(track[b"stsz"], 4, 2)
    runs = _pairs(track[b"stts"])
    if _numbers(track[b"stsd"], 4, 1) != [1] or not 0 < count <= _MOST or runs[:, 0].sum() != count:
        return None
    if not size and len(track[b"stsz"]) < 12 + 4 * count:
        return None
    durations = np.repeat(runs[:, 1], runs[:, 0])
    stored = np.cumsum(durations) - durations
    shift = np.zeros(count, dtype=np.int64)
    if b"ctts" in track:
        shifts = _pairs(track[b"ctts"])
        signed = shifts[:, 1].astype(np.uint32).view(np.int32)  # older files have negative ones in version 0 too
        if shifts[:, 0].sum() != count:
            return None
        shift = np.repeat(signed.astype(np.int64), shifts[:, 0])
    keys = np.full(count, b"stss" not in track)
    if b"stss" in track:
        keys[np.frombuffer(track[b"stss"], dtype=">u4", offset=8).astype(np.int64) - 1] = True
    if not keys[0]:
        return None
    begin, length = _edit(track.get(b"elst"), _scale(track[b"mdhd"]), _scale(movie))
    pts = stored + shift - begin
    shown = pts.max() + durations[pts.argmax()]
    if pts.min() < 0 or (length is not None and shown > length):
        return None  # frames that the edit does not show
    return HeaderTimes(pts, keys, durations)


def _edit(elst: bytes | None, ticks: int, movie_ticks: int) -> tuple[int, int | None]:
    """Where the only edit begins and how long it is, in the track's ticks, one tick of the movie added for rounding.

    Raises:
        ValueError: several edits, an empty one, or one that changes the speed.
    """
    if elst is None:
        return 0, None
    wide = 8 if elst[0] else 4
    if _numbers(elst, 4, 1) != [1] or _numbers(elst, 8 + 2 * wide, 1) != [0x10000]:
        raise ValueError
    length = int.from_bytes(elst[8 : 8 + wide], "big")
    begin = int.from_bytes(elst[8 + wide : 8 + 2 * wide], "big", signed=True)
    if begin < 0 or not length:
        raise ValueError
    return begin, (length + 1) * ticks // movie_ticks


def _scale(head: bytes) -> int:
    """Ticks a second, of an mvhd or mdhd box."""
    (scale,) = _numbers(head, 20 if head[0] else 12, 1)
    if not scale:
        raise ValueError
    return scale


def _numbers(body: bytes, at: int, count: int) -> list[int]:
    return [int(n) for n in np.frombuffer(body, dtype=">u4", count=count, offset=at)]


def _pairs(body: bytes) -> np.ndarray:
    """The entries of stts and ctts, int64 `[k, 2]`."""
    (count,) = _numbers(body, 4, 1)
    return np.frombuffer(body, dtype=">u4", count=2 * count, offset=8).reshape(-1, 2).astype(np.int64)
