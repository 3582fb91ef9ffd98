"""Is a media file complete? Read from the container's own bookkeeping, without decoding."""

from __future__ import annotations

import os
from typing import Any


def ends_early(path: str) -> bool:
    """Does the container promise more bytes than the file has?

    Args:
        path: the file. Known containers: mp4/mov (box sizes), Matroska/WebM (segment size), AVI (RIFF size).

    Returns:
        True if the file is cut off; False if it is complete or its container has no such promise.
    """
    total = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            return 8 + int.from_bytes(head[4:8], "little") > total
        if head[:4] == b"\x1a\x45\xdf\xa3":
            file.seek(4)
            size, _ = _vint(file)
            file.seek(size, 1)
            if file.read(4) != b"\x18\x53\x80\x67":
                return False
            size, unknown = _vint(file)
            return not unknown and file.tell() + size > total
        if head[4:8] not in {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"pnot"}:
            return False
        at = 0
        while at + 8 <= total:
            file.seek(at)
            box = file.read(16)
            size = int.from_bytes(box[:4], "big")
            if size == 1:
                size = int.from_bytes(box[8:16], "big")
            if size < 8:  # 0: up to the end of the file; else not a box
                return False
            at += size
        return at > total


def _vint(file: Any) -> tuple[int, bool]:
    """Read an EBML size: (value, True if it says 'unknown')."""
    first = (file.read(1) or b"\x01")[0]  # at the end of the file: a size that it cannot hold
    length = 9 - first.bit_length()
    value = first - (1 << (8 - length)) if length <= 8 else 0
    value = (value << 8 * (length - 1)) | int.from_bytes(file.read(length - 1), "big")
    return value, value == (1 << 7 * length) - 1
