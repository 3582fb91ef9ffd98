"""Exact frames from a video file with PyAV: a table of every frame's time stamp, then seeks to the frames asked for.

How a frame is found. The header of a plain mp4, or else the packets, read once without decoding, give the number of
frames and every presentation time (`FrameTable`), also for files of variable frame rate and for containers that do not
store a frame count. For each wanted frame the reader goes back to the last key frame shown at or before it, unless
decoding has already passed that key frame, and decodes until the frame with exactly that time stamp comes out. Where
the packets cannot be trusted to be frames (old containers, pictures that a decoder drops after a seek), all frames are
decoded and counted instead: slower, never a neighbouring frame in place of the right one.

What makes it fast: each group of pictures has its own thread and decoder, ahead of the one that takes the frames; and
pictures that no other picture needs (H.264's and HEVC's non-reference ones) are not decoded unless they are wanted; and
the decoder is emptied after the last wanted picture of a group, where it would else hold it back for later ones.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .video_ahead import MOST_THREADS, in_order, usable_cores
from .video_container import ends_early
from .video_mp4 import header_times
from .video_pictures import display_turn, stacked, upright

# One packet is one shown frame with a presentation time here; elsewhere frames are counted by decoding.
_INDEXED_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
_INDEXED_CODECS = {"h264", "hevc", "vvc", "av1", "vp9", "mjpeg", "prores", "dnxhd", "ffv1", "png", "rawvideo"}
_SKIPPING_CODECS = {"h264", "hevc"}  # decoders that can leave out pictures that no other one needs
_INDEXED_CODECS |= {"libdav1d", "libaom-av1", "libvpx-vp9"}  # FFmpeg names decoders, not formats


Size = tuple[int, int] | Callable[[int, int], tuple[int, int]] | None


def import_av() -> ModuleType:
    """Import PyAV, or say how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading and writing video files needs PyAV: pip install "av>=14"') from error
    return av


class TableMismatchError(Exception):
    """The decoder did not give the frame that the packet table promised: count the frames by decoding instead."""


@dataclass(frozen=True, eq=False)
class FrameTable:
    """Every frame of a file in the order shown.

    Attributes:
        pts: int64 `[n]` presentation times in stream ticks, strictly increasing.
        keys: int64 `[k]` sorted presentation times of the key frames, those outside an edit list included.
        seconds: float64 `[n]` seconds since the first frame.
        duration: seconds from the first frame's start to the last frame's end; None where nothing tells.
        fps: mean frames a second, or None where nothing tells.
        counted: True if the frames were counted by decoding, so that they must be read in sequence.
        closed: True if the packets show that no frame needs pictures from before its key frame (closed GOPs).
    """

    pts: np.ndarray
    keys: np.ndarray
    seconds: np.ndarray
    duration: float | None
    fps: float | None
    counted: bool
    closed: bool = False


class VideoFile:
    """An open video file; use it as a context manager.

    Args:
        path: the file.
        threads: of the decoder; None leaves them to FFmpeg.
        stop: once set, decoding ends at the next packet.

    Raises:
        ValueError: not a video, no video stream, or a file that ends too early.
    """

    def __init__(self, path: str, *, threads: int | None = None, stop: threading.Event | None = None) -> None:
        self.path, self._threads, self._stop = path, threads, stop or threading.Event()
        self._wanted: frozenset[int] = frozenset()  # time stamps that must not be left out
        self._av = import_av()
        self._open()

    def _open(self) -> None:
        try:
            self._container = self._av.open(self.path)
        except PermissionError:
            raise
        except self._av.error.EOFError as error:
            raise ValueError(f"{self.path}: has zero frames: it ends before the first one") from error
        except (self._av.FFmpegError, ValueError) as error:
            raise ValueError(
                f"{self.path}: cannot be read as a video ({error}); it may be no video or an incomplete download: "
                "copy it again, or check it with ffprobe"
            ) from error
        try:
            self._stream = self._choose_stream()
        except Exception:
            self._container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _choose_stream(self) -> Any:
        if self._container.format.name == "tty":
            raise ValueError(f"{self.path}: is a text file, not a video")
        streams = [s for s in self._container.streams.video if not _is_cover(s)]
        if not streams:
            kinds = sorted({s.type for s in self._container.streams})
            found = f"only {' and '.join(kinds)}" if kinds else "and nothing else either"
            raise ValueError(f"{self.path}: has no video stream, {found}: zero frames")
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError(f"{self.path}: FFmpeg has no decoder for its video codec; convert it to H.264")
        stream.thread_type = "AUTO"
        if self._threads is not None:
            stream.codec_context.thread_count = self._threads
        return stream

    def table(self) -> FrameTable:
        """List the frames from the packets, without decoding where container and codec allow it.

        Raises:
            ValueError: no frames, or the file ends before its last frame.
        """
        container, stream = self._container, self._stream
        if not _INDEXED_CONTAINERS.intersection(container.format.name.split(",")):
            return self.count()
        if stream.codec_context.codec.name not in _INDEXED_CODECS:
            return self.count()
        return self._from_header() or self._from_packets()

    def _from_header(self) -> FrameTable | None:
        """The table of a complete mp4 with a plain header."""
        if "mp4" not in self._container.format.name.split(",") or ends_early(self.path):
            return None
        found = header_times(self.path, self._stream.id)
        if found is None:
            return None
        order = np.argsort(found.pts, kind="stable")
        pts = found.pts[order]
        if np.any(np.diff(pts) == 0):
            return None
        last_key = np.maximum.accumulate(np.where(found.keys, np.arange(len(pts)), 0))
        closed = bool(np.all(found.pts >= found.pts[last_key]))
        keys = np.sort(found.pts[found.keys])
        return self._table(pts, keys, int(found.durations[order[-1]]), counted=False, closed=closed)

    def _from_packets(self) -> FrameTable:
        container, stream = self._container, self._stream
        pts: list[int | None] = []
        keys, last, last_duration, broken = [], None, 0, ""
        complete, closed, key = 0, True, None
        try:
            for packet in container.demux(stream):
                if packet.size == 0 and packet.pts is None:  # the end marker
                    continue
                complete += not packet.is_corrupt
                broken = broken or ("a frame is damaged" if packet.is_corrupt else "")
                if packet.is_keyframe and packet.pts is not None:
                    key = packet.pts
                    keys.append(key)
                elif key is not None and packet.pts is not None and packet.pts < key:
                    closed = False
                if packet.is_discard:  # outside the edit list: decoded for others' sake, never shown
                    continue
                pts.append(packet.pts)
                if packet.pts is not None and (last is None or packet.pts > last):
                    last, last_duration = packet.pts, packet.duration or 0
        except self._av.FFmpegError as error:
            broken = str(error)
        if ends_early(self.path):
            broken = "the file ends early"
        if broken:
            of = f" of {stream.frames}" if stream.frames else ""
            raise ValueError(
                f"{self.path}: is truncated or damaged ({broken}): {complete}{of} frames are complete; copy or "
                f'download it again, or keep the readable part with: ffmpeg -i "{self.path}" -c copy part.mkv'
            )
        if not pts:
            raise ValueError(f"{self.path}: has a video stream with zero frames")
        if any(p is None for p in pts):
            return self.count()
        order = np.sort(np.array(pts, dtype=np.int64))
        if np.any(np.diff(order) == 0):
            return self.count()
        return self._table(order, np.sort(np.array(keys, dtype=np.int64)), last_duration, counted=False, closed=closed)

    def count(self) -> FrameTable:
        """List the frames by decoding all of them.

        Raises:
            ValueError: no frames, or decoding fails before the end.
        """
        times: list[int | None] = []
        last_duration = 0
        for frame in self._sequence():
            times.append(frame.pts)
            last_duration = getattr(frame, "duration", 0) or 0
        if ends_early(self.path):
            raise ValueError(
                f"{self.path}: is truncated (the file ends early): {len(times)} frames could be read; "
                "copy or download it again"
            )
        if not times:
            raise ValueError(f"{self.path}: has a video stream with zero frames")
        order = np.array([-1 if t is None else t for t in times], dtype=np.int64)
        if any(t is None for t in times) or np.any(np.diff(order) <= 0):  # no usable clock: a steady rate
            rate, tick = self._stream.average_rate, self._stream.time_base
            step = int(1 / (rate * tick)) if rate and tick else 0
            order, last_duration = np.arange(len(times), dtype=np.int64) * max(step, 1), step
        return self._table(order, order[:1], last_duration, counted=True, closed=False)

    def _table(self, pts: np.ndarray, keys: np.ndarray, last_duration: int, counted: bool, closed: bool) -> FrameTable:
        tick = float(self._stream.time_base)
        count, rate = len(pts), self._stream.average_rate
        seconds = (pts - pts[0]).astype(np.float64) * tick
        if last_duration <= 0 and count > 1:
            last_duration = (pts[-1] - pts[0]) / (count - 1)
        duration: float | None = float(seconds[-1] + last_duration * tick)
        if not duration or duration <= 0:
            duration = float(1 / rate) if rate else None
        fps = count / duration if duration else None
        if rate and duration and abs(float(rate) * duration - count) <= 1:
            fps = float(rate)  # the exact fraction, not disturbed by rounded time stamps
        return FrameTable(pts, keys, seconds, duration, fps, counted, closed)

    def turned(self, table: FrameTable) -> bool:
        """Does the file ask for its picture to be turned or mirrored when shown?"""
        frames = self._sequence() if table.counted else self._from(table, 0, int(table.pts[0]))
        return any(display_turn(next(frames)))

    def decode(self, table: FrameTable, indices: np.ndarray, size: Size) -> np.ndarray:
        """`pictures` as one array, uint8 `[T, H, W, 3]`."""
        return stacked(self.pictures(table, indices, size), len(indices))

    def pictures(
        self,
        table: FrameTable,
        indices: np.ndarray,
        size: Size,
        *,
        threads: int | None = None,
        fit: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Generator[np.ndarray]:
        """Decode the frames with these numbers.

        Args:
            table: from `table()` or `count()`.
            indices: int64 `[T]` frame numbers, strictly increasing.
            size: (height, width) of the upright result, or a function that makes it of the file's; None keeps those.
            threads: that decode groups of pictures ahead of the one who takes the frames; 1 decodes in the caller's
                thread; None is one a core, `MOST_THREADS` at most.
            fit: applied to each picture, in the thread that decoded it.

        Yields:
            in order, uint8 `[H, W, 3]` RGB, turned upright as the file's display matrix says (right angles, mirrors).

        Raises:
            TableMismatchError: a frame of a table that was not counted did not come out.
            ValueError: decoding failed.
        """
        groups = _groups(table, indices)
        given = min(MOST_THREADS, usable_cores()) if threads is None else threads
        if given == 1:
            for group in groups:
                yield from (picture for _, picture in self._converted(table, group, size, fit))
            return
        count = min(given, len(groups))
        each = max(1, given // count)

        @contextmanager
        def reader(stop: threading.Event) -> Iterator[Any]:
            with VideoFile(self.path, threads=each, stop=stop) as file:
                yield lambda group: file._converted(table, group, size, fit)

        yield from in_order(groups, reader, threads=count, window=4 * given)

    def _converted(
        self, table: FrameTable, group: Sequence[tuple[int, int]], size: Size, fit: Any
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(slot, upright picture) for each (slot, frame number)."""
        from av.video.reformatter import VideoReformatter

        reformatter, turn = VideoReformatter(), None
        for slot, frame in self._counted(group) if table.counted else self.sought(table, group):
            if turn is None:
                turn = display_turn(frame)
                height, width = (frame.width, frame.height) if turn[0] else (frame.height, frame.width)
                if size is not None:
                    height, width = size(height, width) if callable(size) else size
                if turn[0]:
                    width, height = height, width
            picture = upright(reformatter.reformat(frame, width, height, "rgb24").to_ndarray(), turn)
            yield slot, picture if fit is None else fit(picture)

    def sought(self, table: FrameTable, group: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Any]]:
        """Yield (slot, frame) for each (slot, frame number), by seeking to key frames."""
        frames: Iterator[Any] = iter(())
        at = None  # time stamp of the last frame that the decoder gave
        targets = [int(table.pts[number]) for _, number in group]
        self._wanted = frozenset(targets)
        for (slot, _), target in zip(group, targets, strict=True):
            place = int(np.searchsorted(table.keys, target, side="right")) - 1
            anchor = int(table.keys[place]) if place >= 0 else int(table.pts[0])
            if at is None or anchor > at:
                frames = self._from(table, place, target)
            while True:
                frame = next(frames, None)
                if frame is None or frame.pts is None or frame.pts > target:
                    raise TableMismatchError
                at = frame.pts
                if at == target:
                    break
            if frame.is_corrupt:
                raise TableMismatchError
            yield slot, frame

    def _from(self, table: FrameTable, place: int, target: int) -> Iterator[Any]:
        """Decode from the key frame number `place`, or an earlier one if the container lands behind it."""
        while True:
            stamp = int(table.keys[place]) if place >= 0 else int(min(table.pts[0], table.keys[:1].min(initial=target)))
            try:
                self._container.seek(stamp, stream=self._stream, backward=True)
                packets = self._container.demux(self._stream)
                first = next(packets)
            except self._av.FFmpegError as error:
                raise TableMismatchError from error
            if first.pts is not None and first.pts <= target:
                break
            if place < 0:
                raise TableMismatchError
            place -= 1
        return self._decoded(first, packets)

    def _decoded(self, first: Any, packets: Iterator[Any]) -> Iterator[Any]:
        context = self._stream.codec_context
        skips = context.codec.name in _SKIPPING_CODECS
        missing = set(self._wanted)
        try:
            for packet in itertools.chain((first,), packets):
                if self._stop.is_set():
                    return
                if skips:
                    needed = packet.pts is None or packet.pts in self._wanted
                    context.skip_frame = "DEFAULT" if needed else "NONREF"
                yield from packet.decode()
                if packet.pts in missing:
                    missing.remove(packet.pts)
                    if not missing:  # all that is wanted is in the decoder: have it out, without decoding on
                        yield from context.decode(None)
                        return
        except self._av.FFmpegError as error:
            raise TableMismatchError from error

    def _sequence(self) -> Iterator[Any]:
        """Decode every frame from the start."""
        done = 0
        try:
            self._container.close()
            self._open()  # not every container can go back to its start
            for frame in self._container.decode(self._stream):
                if frame.is_corrupt:
                    raise self._av.error.InvalidDataError(0, f"frame {done} is damaged")
                yield frame
                done += 1
        except self._av.FFmpegError as error:
            raise ValueError(
                f"{self.path}: is truncated or damaged ({error}): {done} frames could be read; "
                "copy or download it again"
            ) from error

    def _counted(self, group: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Any]]:
        """Yield (slot, frame) for each (slot, frame number), by decoding from the start."""
        slots = {number: slot for slot, number in group}
        for number, frame in enumerate(self._sequence()):
            if number in slots:
                yield slots[number], frame
            if number == group[-1][1] or self._stop.is_set():
                return


def _groups(table: FrameTable, indices: np.ndarray) -> list[list[tuple[int, int]]]:
    """(slot, frame number) of the wanted frames, those after one key frame together."""
    places = np.searchsorted(table.keys, table.pts[indices], side="right") * (not table.counted)
    groups: dict[int, list[tuple[int, int]]] = {}
    for slot, (number, place) in enumerate(zip(indices.tolist(), places.tolist(), strict=True)):
        groups.setdefault(place, []).append((slot, number))
    return list(groups.values())


def _is_cover(stream: Any) -> bool:
    """A still cover picture of an audio file is no video."""
    disposition = getattr(stream, "disposition", 0)
    return bool(getattr(disposition, "value", disposition) & 0x0400)  # AV_DISPOSITION_ATTACHED_PIC
