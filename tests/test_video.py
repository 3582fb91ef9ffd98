"""Reading video: the right frames of every kind of file, or a clear error.

The test files carry a binary counter drawn in the picture (what was read) and are also compared, pixel by pixel, with
a plain decode from the start (a second opinion on every seek).
"""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from holimerge.video import Video, read_video, sample_indices, synthetic_clip, write_video
from holimerge.video_pyav import FrameTable, TableMismatchError, VideoFile

N, HEIGHT, WIDTH, BITS = 120, 64, 128, 8
TIMES = np.cumsum(np.random.default_rng(1).uniform(0.005, 0.2, N))  # a jittery clock: 5 to 200 ms a frame
TIMES -= TIMES[0]
LIBX265 = {"codec": "libx265", "options": {"x265-params": "log-level=none"}}  # open GOPs by default
FILES: dict[str, dict[str, Any]] = {
    "long.mp4": {"gop": 250},
    "short.mp4": {"gop": 12, "b_frames": 3},
    "two.mp4": {"gop": 2, "b_frames": 1},
    "intra.mp4": {"gop": 1},
    "no_b.mov": {"gop": 30, "b_frames": 0},
    "short.mkv": {"gop": 12, "b_frames": 3},
    "vfr.mp4": {"gop": 12, "timestamps": TIMES},
    "vfr.mkv": {"gop": 25, "timestamps": TIMES, "b_frames": 5},
    "open.mp4": {"gop": 12, "options": {"x264-params": "open-gop=1"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=20"}},
    "hevc.mp4": {"gop": 12, **LIBX265},
    "old.avi": {"gop": 12, "codec": "mpeg4", "b_frames": 2},
    "stream.ts": {"gop": 12},
    "vp8.webm": {"gop": 30, "codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "900k"}},
}


def counted_frames(count: int = N) -> np.ndarray:
    """uint8 `[count, 64, 128, 3]`: the upper half shows the frame number in bits, a block moves in the lower half."""
    frames = np.full((count, HEIGHT, WIDTH, 3), 90, np.uint8)
    frames += np.random.default_rng(0).integers(0, 40, (1, HEIGHT, WIDTH, 1)).astype(np.uint8)
    for number in range(count):
        for bit in range(BITS):
            frames[number, :32, bit * 16 : bit * 16 + 16] = 255 * (number >> bit & 1)
        left = number * 3 % (WIDTH - 16)
        frames[number, 40:56, left : left + 16] = (200, 30, 60)
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """Read the counter back."""
    dots = frames[:, 8:24].mean(axis=(1, 3)).reshape(len(frames), BITS, 16)[:, :, 4:12].mean(axis=2)
    return [int(sum(1 << bit for bit in range(BITS) if dot[bit] > 127)) for dot in dots]


def from_the_start(path: str) -> np.ndarray:
    """Every frame of a file, by a plain loop over the decoder."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="session")
def make(folder: Path) -> Any:
    """Write a file of `FILES` once; skip where this FFmpeg has no such encoder."""
    frames = counted_frames()

    def write(name: str) -> str:
        path = folder / name
        codec = FILES[name].get("codec", "libx264")
        if codec not in av.codecs_available:
            pytest.skip(f"this FFmpeg has no {codec}")
        if not path.exists():
            write_video(path, frames, **FILES[name])
        return str(path)

    return write


def linspace(count: int, total: int = N) -> list[int]:
    return np.linspace(0, total - 1, count, dtype=int).tolist()


# --- the right frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_uniform_frames_are_exact(make: Any, name: str) -> None:
    path = make(name)
    stored = from_the_start(path)
    assert numbers(stored) == list(range(N))  # the counter survives this codec
    times = TIMES if "timestamps" in FILES[name] else np.arange(N) / 30
    for count in (1, 2, 7, 32, N):
        video = read_video(path, frames=count)
        assert numbers(video.frames) == linspace(count)
        assert video.indices is not None
        assert video.indices.tolist() == linspace(count)
        assert np.array_equal(video.frames, stored[linspace(count)])
        np.testing.assert_allclose(video.timestamps, times[linspace(count)], atol=1.1e-3)  # Matroska counts in ms
    assert (video.total_frames, video.source) == (N, path)
    assert video.frames.dtype == np.uint8
    assert video.timestamps.dtype == np.float64
    if "timestamps" in FILES[name]:
        assert video.duration == pytest.approx(TIMES[-1], abs=0.25)
        assert video.fps == pytest.approx(N / video.duration, rel=0.01)
    else:
        assert video.duration == pytest.approx(N / 30, abs=2e-3)
        assert video.fps == pytest.approx(30, rel=1e-3)


@pytest.mark.parametrize("name", FILES)
def test_any_choice_of_frames_is_exact(make: Any, name: str) -> None:
    path = make(name)
    stored = from_the_start(path)
    rng = np.random.default_rng(2)
    with VideoFile(path) as file:
        table = file.table()
        for _ in range(8):
            chosen = np.sort(rng.choice(N, size=int(rng.integers(1, 12)), replace=False))
            try:
                frames = file.decode(table, chosen, None)
            except TableMismatchError:
                assert name == "refresh.mp4"  # no clean picture to start from: the reader counts instead
                table = file.count()
                frames = file.decode(table, chosen, None)
            assert np.array_equal(frames, stored[chosen])


def test_the_average_rate_would_have_been_wrong(make: Any) -> None:
    """The variable-rate file is a real test: index -> time by the average rate points to other frames."""
    guessed = np.searchsorted(TIMES, np.array(linspace(32)) * TIMES[-1] / (N - 1))
    assert np.abs(guessed - linspace(32)).max() >= 2


@pytest.mark.parametrize("cut", [1, 5, 12, 17])
def test_frames_outside_an_edit_list_do_not_count(make: Any, folder: Path, cut: int) -> None:
    """A trimmed phone video: earlier frames are in the file, are decoded, and are never shown."""
    path = str(folder / f"trimmed{cut}.mp4")
    with av.open(make("short.mp4")) as source, av.open(path, "w") as target:
        stream = source.streams.video[0]
        if not hasattr(target, "add_stream_from_template"):
            pytest.skip("this PyAV cannot copy a stream")
        copy = target.add_stream_from_template(stream)
        shift = round(Fraction(cut, 30) / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    shown = numbers(from_the_start(path))
    assert shown[0] == cut
    with VideoFile(path) as file:
        table = file.table()
    assert (len(table.pts), table.counted) == (N - cut, False)
    for count in (1, 9, 40, 300):
        video = read_video(path, frames=count)
        assert video.total_frames == N - cut
        assert numbers(video.frames) == [shown[i] for i in linspace(min(count, N - cut), N - cut)]
        assert video.timestamps[0] == 0


def test_a_long_gop_is_decoded_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seeks = []
    original = VideoFile._from
    monkeypatch.setattr(VideoFile, "_from", lambda self, *a: seeks.append(a) or original(self, *a))
    read_video(make("long.mp4"), frames=32)
    assert len(seeks) == 1  # one key frame: no seek after the first
    seeks.clear()
    read_video(make("short.mp4"), frames=N)
    assert len(seeks) == N / 12
    seeks.clear()
    read_video(make("short.mp4"), frames=2)
    assert len(seeks) == 2  # and the first GOPs are not decoded to reach the last


def test_a_short_file_gives_each_frame_once(folder: Path) -> None:
    path = write_video(folder / "five.mp4", counted_frames(5))
    video = read_video(path, frames=32)
    assert numbers(video.frames) == [0, 1, 2, 3, 4]
    assert len(video.timestamps) == 5
    one = read_video(write_video(folder / "one.mkv", counted_frames(1)))
    assert numbers(one.frames) == [0]
    assert one.timestamps.tolist() == [0]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("size", [None, (40, 30)])
def test_rotation_metadata(folder: Path, degrees: int, size: tuple[int, int] | None) -> None:
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:24, :40], picture[:24, 40:], picture[24:, :40] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    if degrees and not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotation")
    path = write_video(folder / f"turned{degrees}.mp4", [picture] * 4, rotation=degrees, crf=1)
    upright = np.rot90(picture, degrees // 90)
    frames = read_video(path, frames=2, size=size).frames
    assert frames.shape[1:3] == (size or upright.shape[:2])
    height, width = frames.shape[1:3]
    for row in (0.25, 0.75):
        for column in (0.25, 0.75):
            expected = upright[int(row * upright.shape[0]), int(column * upright.shape[1])].astype(int)
            shown = frames[1, int(row * height), int(column * width)].astype(int)
            assert np.abs(shown - expected).max() < 40, (row, column)


ONE = 1 << 16
MATRICES = {  # what phones write (their own numbers, not PyAV's idea of an angle) -> the upright picture
    "portrait, quarter turn clockwise": ((0, ONE, 0, -ONE, 0, 0), lambda p: np.rot90(p, -1)),
    "portrait, other way": ((0, -ONE, 0, ONE, 0, 0), lambda p: np.rot90(p, 1)),
    "upside down": ((-ONE, 0, 0, 0, -ONE, 0), lambda p: np.rot90(p, 2)),
    "selfie mirror": ((-ONE, 0, 0, 0, ONE, 0), np.fliplr),
    "vertical mirror": ((ONE, 0, 0, 0, -ONE, 0), np.flipud),
    "transpose": ((0, ONE, 0, ONE, 0, 0), lambda p: p.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrix_with_mirrors(folder: Path, name: str) -> None:
    matrix, turn = MATRICES[name]
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:24, :40], picture[:24, 40:], picture[24:, :40] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    path = str(folder / "matrix.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        if not hasattr(stream, "set_display_matrix"):
            pytest.skip("this PyAV cannot write a display matrix")
        stream.set_display_matrix([*matrix, 0, 0, 1 << 30])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    shown, upright = read_video(path).frames[0].astype(int), turn(picture).astype(int)
    assert shown.shape == upright.shape
    for row in (12, upright.shape[0] - 12):
        for column in (12, upright.shape[1] - 12):
            assert np.abs(shown[row, column] - upright[row, column]).max() < 40


def test_resizing_while_decoding(make: Any) -> None:
    full, small = read_video(make("short.mp4"), frames=4), read_video(make("short.mp4"), frames=4, size=(32, 50))
    assert small.frames.shape == (4, 32, 50, 3)
    by_pil = [np.asarray(Image.fromarray(f).resize((50, 32), Image.Resampling.BILINEAR)) for f in full.frames]
    assert np.abs(small.frames.astype(int) - np.stack(by_pil)).mean() < 4


# --- sampling ---------------------------------------------------------------------------------------------------------


def clock(times: np.ndarray, end: float) -> FrameTable:
    return FrameTable(np.arange(len(times)), np.arange(1), times, end, len(times) / end, counted=False)


def test_fps_sampling_at_a_steady_rate(make: Any) -> None:
    """120 frames at 30 a second: 2 a second are 8 frames, every 15th."""
    video = read_video(make("short.mp4"), sampling="fps", fps=2)
    assert numbers(video.frames) == list(range(0, N, 15))
    assert numbers(read_video(make("short.mp4"), sampling="fps").frames) == list(range(0, N, 15))  # 2 is the default
    assert numbers(read_video(make("short.mp4"), sampling="fps", fps=0.01).frames) == [0, 30, 60, 90]  # min_frames
    assert numbers(read_video(make("short.mp4"), sampling="fps", fps=60).frames) == list(range(N))  # all there are
    limited = read_video(make("short.mp4"), sampling="fps", fps=60, max_frames=7)
    assert numbers(limited.frames) == [0, 20, 40, 60, 80, 100]  # made even


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_fps_sampling_follows_the_clock_of_a_variable_rate(make: Any, name: str) -> None:
    video = read_video(make(name), sampling="fps", fps=2)
    assert video.duration is not None
    count = int(video.duration * 2 // 2 * 2)
    moments = np.arange(count) * video.duration / count
    assert numbers(video.frames) == [int((moment + 1e-3 >= TIMES).sum()) - 1 for moment in moments]


def test_sampling_rules_on_numbers() -> None:
    assert sample_indices(100, frames=4).tolist() == [0, 33, 66, 99]
    assert sample_indices(3, frames=1).tolist() == [0]
    assert sample_indices(3, frames=9).tolist() == [0, 1, 2]
    frozen = clock(np.array([0.0, 0.1, 9.0]), 10.0)  # a frame that stays for nine seconds is taken once
    assert sample_indices(frozen, sampling="fps", fps=2, max_frames=2).tolist() == [0, 1]
    assert sample_indices(clock(np.arange(1) / 5, 0.2), sampling="fps").tolist() == [0]
    assert sample_indices(clock(np.arange(5) / 5, 1.0), sampling="fps", fps=30).tolist() == [0, 1, 2, 3][:4]
    with pytest.raises(ValueError, match="source_fps"):
        sample_indices(10, sampling="fps")


@pytest.mark.parametrize("total", [1, 2, 7, 31, 32, 33, 100, 4096])
@pytest.mark.parametrize("frames", [1, 3, 32])
def test_left_and_midpoint_rules(total: int, frames: int) -> None:
    count = min(frames, total)
    left = sample_indices(total, frames=frames, sampling="left").tolist()
    assert left == [int(total / count) * i for i in range(count)]
    middle = sample_indices(total, frames=frames, sampling="midpoint").tolist()
    if frames < total:
        assert middle == [int(Fraction(total, frames + 1) * i) for i in range(1, frames + 1)]
    else:
        assert middle == list(range(total))  # a short source gives each frame once
    for chosen in (left, middle):
        assert len(set(chosen)) == count
        assert chosen[0] >= 0
        assert chosen == sorted(chosen)
        assert chosen[-1] < total


def test_a_part_by_every_rule(make: Any) -> None:
    """From 1 s to 2 s at 30 frames a second: frames 30 to 59."""
    path, part = make("short.mp4"), {"start": 1.0, "end": 2.0}
    video = read_video(path, frames=4, **part)
    assert numbers(video.frames) == [30, 39, 49, 59]
    np.testing.assert_allclose(video.timestamps, np.array([30, 39, 49, 59]) / 30, atol=1e-4)  # of the whole source
    assert video.total_frames == 30
    assert video.duration == pytest.approx(1.0, abs=1e-3)
    assert video.fps == pytest.approx(30, rel=1e-3)
    assert numbers(read_video(path, frames=4, sampling="left", **part).frames) == [30, 37, 44, 51]
    assert numbers(read_video(path, frames=4, sampling="midpoint", **part).frames) == [36, 42, 48, 54]
    assert numbers(read_video(path, sampling="fps", fps=4, **part).frames) == [30, 37, 45, 52]
    assert numbers(read_video(path, frames=99, **part).frames) == list(range(30, 60))
    assert numbers(read_video(path, frames=2, start=3).frames) == [90, N - 1]
    assert numbers(read_video(path, frames=2, end=99).frames) == [0, N - 1]
    assert numbers(read_video(path, frames=2, end=0.01).frames) == [0]
    assert numbers(read_video(path, start=1.001, end=1.03).frames) == [30]  # between two frames: the one on screen
    assert numbers(read_video(path, start=3.99).frames) == [N - 1]


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv", "refresh.mp4"])
def test_parts_follow_the_clock_and_meet_without_gap_or_overlap(make: Any, name: str) -> None:
    times = TIMES if name.startswith("vfr") else np.arange(N) / 30
    cuts = [0.0, times[40] - 2e-3, times[41] - 2e-3, times[77] - 2e-3, times[-1] + 9]
    shown: list[int] = []
    for start, end in pairwise(cuts):
        video = read_video(make(name), frames=N, start=start, end=end)
        shown += numbers(video.frames)
        np.testing.assert_allclose(video.timestamps, times[numbers(video.frames)], atol=1.1e-3)
        assert video.total_frames == len(video.frames)
    assert shown == list(range(N))


def test_a_part_of_frames_in_memory() -> None:
    frames = counted_frames(20)
    video = read_video(frames, frames=3, source_fps=10, start=0.5, end=1.5)
    assert numbers(video.frames) == [5, 9, 14]
    np.testing.assert_allclose(video.timestamps, [0.5, 0.9, 1.4])
    assert (video.total_frames, video.duration) == (10, pytest.approx(1.0))
    with pytest.raises(ValueError, match="give source_fps"):
        read_video(frames, start=0.5)


# --- clear errors -----------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4: no such video"):
        read_video(tmp_path / "nothing.mp4")
    with pytest.raises(ValueError, match="download"):
        read_video("https://example.com/a.mp4")


@pytest.mark.parametrize("name", ["noise.mp4", "noise.mkv", "text.txt", "text.mp4", "empty.mp4"])
def test_not_a_video(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20000, dtype=np.uint8).tobytes()
    content = {"noise": noise, "text": b"hello\n" * 500, "empty": b""}[name.split(".")[0]]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_video(tmp_path / name)


@pytest.mark.parametrize("name", ["long.mp4", "short.mp4", "short.mkv", "vfr.mkv", "no_b.mov", "hevc.mp4", "old.avi"])
def test_truncated_file_is_refused_wherever_it_is_cut(make: Any, tmp_path: Path, name: str) -> None:
    content = Path(make(name)).read_bytes()
    path = tmp_path / name
    cuts = [*np.linspace(0.05, 0.97, 12), 1 - 100 / len(content), 1 - 1 / len(content)]
    for share in cuts:
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=name):
            read_video(path, frames=4)
    path.write_bytes(content[: int(len(content) * 0.6)])
    with pytest.raises(
        ValueError, match=r"(truncated|damaged).* \d+( of 120)? frames (are complete|could be read)"
    ) as e:
        read_video(path)
    assert "again" in str(e.value)  # what to do


@pytest.mark.parametrize("name", ["short.mp4", "no_b.mov", "short.mkv"])
def test_cut_between_two_frames(make: Any, tmp_path: Path, name: str) -> None:
    """The sly cut: what is left is whole frames only, so no decoder complains."""
    with av.open(make(name)) as container:
        starts = sorted(p.pos for p in container.demux(video=0) if p.size)
    content = Path(make(name)).read_bytes()
    for start in (starts[-1], starts[-2], starts[60]):
        (tmp_path / name).write_bytes(content[:start])
        with pytest.raises(ValueError, match="truncated"):
            read_video(tmp_path / name)


def test_truncated_count_is_true(make: Any, tmp_path: Path) -> None:
    """The number in the message equals what a plain demuxer gets whole."""
    content = Path(make("short.mp4")).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: int(len(content) * 0.7)])
    with av.open(str(path)) as container:
        whole = sum(p.size > 0 and not p.is_corrupt for p in container.demux(video=0))
    assert 0 < whole < N
    with pytest.raises(ValueError, match=f"{whole} of {N} frames are complete"):
        read_video(path)


def test_index_at_the_end_cut_off(tmp_path: Path) -> None:
    path = write_video(tmp_path / "late.mp4", counted_frames(30), container_options={})
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"late\.mp4: cannot be read as a video.*incomplete"):
        read_video(path)


def test_damage_in_the_middle_is_not_papered_over(make: Any, tmp_path: Path) -> None:
    content = bytearray(Path(make("long.mp4")).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = np.random.default_rng(0).integers(0, 256, 600, dtype=np.uint8).tobytes()
    (tmp_path / "hurt.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"hurt\.mp4: is truncated or damaged.* \d+ frames could be read"):
        read_video(tmp_path / "hurt.mp4", frames=N)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_zero_frames(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"none.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match="zero frames"):
        read_video(path)


@pytest.mark.parametrize(("ending", "codec"), [("m4a", "aac"), ("mkv", "aac"), ("wav", "pcm_s16le")])
def test_audio_only(tmp_path: Path, ending: str, codec: str) -> None:
    path = tmp_path / f"sound.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        for block in range(5):
            kind, values = ("s16", np.zeros((1, 2048), np.int16)) if ending == "wav" else ("fltp", np.zeros((2, 1024)))
            values = values.astype(np.float32) if kind == "fltp" else values
            frame = av.AudioFrame.from_ndarray(values, format=kind, layout="stereo")
            frame.sample_rate, frame.pts = 44100, block * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\..*no video stream, only audio"):
        read_video(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": "random"}, "uniform, left, midpoint, fps"),
        ({"backend": "opencv"}, "auto, pyav, torchcodec, decord"),
        ({"frames": 0}, "frames must be a whole number of at least 1"),
        ({"frames": -3}, "at least 1"),
        ({"frames": 2.5}, "at least 1"),
        ({"frames": True}, "at least 1"),
        ({"fps": 2}, "sampling='fps'"),
        ({"sampling": "fps", "fps": 0}, "positive"),
        ({"sampling": "fps", "fps": float("nan")}, "positive"),
        ({"sampling": "fps", "min_frames": 9, "max_frames": 3}, "above max_frames"),
        ({"size": (0, 5)}, "height, width"),
        ({"size": 5.0}, "height, width"),
        ({"source_fps": 5}, "own clock"),
        ({"start": -1}, "start must be seconds from 0 on"),
        ({"end": float("nan")}, "end must be seconds"),
        ({"start": 2, "end": 1}, r"end \(1 s\) must be after start \(2 s\)"),
        ({"end": 0}, "must be after start"),
        ({"start": 99}, r"start \(99 s\) is after the end of the video \(4\.000 s\)"),
    ],
)
def test_bad_arguments(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_video(make("short.mp4"), **arguments)


# --- folders and frames in memory -------------------------------------------------------------------------------------


def test_a_folder_of_images_in_natural_order(tmp_path: Path) -> None:
    for number, frame in enumerate(counted_frames(12)):
        Image.fromarray(frame).save(tmp_path / f"Frame{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    video = read_video(tmp_path, frames=5)
    assert numbers(video.frames) == linspace(5, 12)  # frame10 comes after frame9
    assert (video.total_frames, video.fps, video.source) == (12, None, str(tmp_path))
    assert np.isnan(video.timestamps).all()
    timed = read_video(tmp_path, frames=3, source_fps=4, size=(10, 20))
    assert timed.timestamps.tolist() == [0, 1.25, 2.75]
    assert (timed.duration, timed.frames.shape) == (3.0, (3, 10, 20, 3))
    assert numbers(read_video(tmp_path, sampling="fps", source_fps=6, fps=2).frames) == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="source_fps"):
        read_video(tmp_path, sampling="fps")


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        read_video(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="different sizes"):
        read_video(tmp_path)
    assert read_video(tmp_path, size=(4, 4)).frames.shape == (2, 4, 4, 3)
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"2\.png"):
        read_video(tmp_path)


@pytest.mark.parametrize("kind", ["array", "tensor", "pictures", "arrays", "tuple"])
def test_frames_in_memory(kind: str) -> None:
    frames = counted_frames(20)
    pictures = [Image.fromarray(f) for f in frames]
    source: Any = {
        "array": frames,
        "tensor": torch.from_numpy(frames),
        "pictures": pictures,
        "arrays": list(frames),
        "tuple": tuple(pictures),
    }[kind]
    video = read_video(source, frames=6, source_fps=10)
    assert isinstance(video, Video)
    assert np.array_equal(video.frames, frames[linspace(6, 20)])
    np.testing.assert_allclose(video.timestamps, np.array(linspace(6, 20)) / 10)
    assert len(read_video(source).frames) == 20
    assert read_video(source, size=(8, 8), frames=2).frames.shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "zero frames"),
        ([], ValueError, "zero frames"),
        (np.zeros((4, 3, 8, 8), np.uint8), ValueError, "channels come last"),
        (np.zeros((4, 8, 8, 4), np.uint8), ValueError, r"\[T, H, W, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"\[T, H, W, 3\]"),
        (np.zeros((4, 8, 8, 3), np.float32), ValueError, "uint8"),
        (torch.zeros(4, 8, 8, 3), ValueError, "uint8"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 8, 3))], ValueError, "uint8"),
        (42, TypeError, "a path, a folder"),
        (None, TypeError, "a path, a folder"),
    ],
)
def test_bad_frames_in_memory(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_video(source)


# --- back-ends --------------------------------------------------------------------------------------------------------


def test_import_needs_no_decoder() -> None:
    names = "('av', 'decord', 'torchcodec', 'torchvision')"
    code = f"import sys, holimerge.video, holimerge.inputs; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "backend", "command"),
    [
        ("av", "pyav", 'pip install "av'),
        ("decord", "decord", "pip install decord2"),
        ("torchcodec", "torchcodec", "pip install torchcodec"),
    ],
)
def test_missing_backend(make: Any, monkeypatch: pytest.MonkeyPatch, module: str, backend: str, command: str) -> None:
    path = make("short.mp4")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=command):
        read_video(path, backend=backend)


def fake_backends(frames: np.ndarray, asked: list[list[int]]) -> dict[str, ModuleType]:
    """Stand-ins with the call signatures of decord and torchcodec, which give `frames` and note what was asked."""

    def get(indices: list[int]) -> np.ndarray:
        asked.append(indices)
        return frames[indices]

    class Reader:
        def __init__(self, path: str, **_: Any) -> None: ...

        def __len__(self) -> int:
            return len(frames)

        def get_batch(self, indices: list[int]) -> Any:
            return SimpleNamespace(asnumpy=lambda: get(indices))

        def get_frames_at(self, indices: list[int]) -> Any:
            return SimpleNamespace(data=torch.from_numpy(get(indices)))

    decord, torchcodec, decoders = ModuleType("decord"), ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decord.VideoReader = decoders.VideoDecoder = Reader  # type: ignore[attr-defined]
    return {"decord": decord, "torchcodec": torchcodec, "torchcodec.decoders": decoders}


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_other_backends_get_the_exact_numbers(make: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The plumbing only: the real packages are not tested here."""
    asked: list[list[int]] = []
    for name, module in fake_backends(counted_frames(), asked).items():
        monkeypatch.setitem(sys.modules, name, module)
    video = read_video(make("vfr.mp4"), frames=9, backend=backend, size=(32, 64))
    assert asked == [linspace(9)]
    assert video.frames.shape == (9, 32, 64, 3)
    np.testing.assert_allclose(video.timestamps, TIMES[linspace(9)], atol=1e-3)
    for name, module in fake_backends(counted_frames(N - 1), asked).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match=f"{backend} sees 119 frames where there are 120"):
        read_video(make("vfr.mp4"), backend=backend)
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotation")
    turned = write_video(Path(make("vfr.mp4")).parent / "turned.mp4", counted_frames(8), rotation=90)
    with pytest.raises(ValueError, match="rotated"):
        read_video(turned, backend=backend)
    if backend == "decord":
        with pytest.raises(ValueError, match="open GOPs"):
            read_video(make("open.mp4"), backend=backend)


@pytest.mark.parametrize("name", ["long.mp4", "short.mkv", "vfr.mp4"])
def test_the_real_decord_if_installed(make: Any, name: str) -> None:
    pytest.importorskip("decord", reason="decord or decord2 is not installed")
    ours, theirs = read_video(make(name)), read_video(make(name), backend="decord")
    assert np.array_equal(ours.frames, theirs.frames)


# --- making videos ----------------------------------------------------------------------------------------------------


def test_written_gop_and_codec_are_as_asked(make: Any) -> None:
    for name, gop in (("short.mp4", 12), ("short.mkv", 12), ("intra.mp4", 1)):
        with av.open(make(name)) as container:
            packets = sorted((p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size)
            assert container.streams.video[0].codec_context.name == "h264"
        assert [number for number, (_, key) in enumerate(packets) if key] == list(range(0, N, gop))


@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "no frames"),
        (np.zeros((2, 8, 8, 3)), {}, "uint8"),
        (np.zeros((2, 9, 8, 3), np.uint8), {}, "even"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)], {}, "one size"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"fps": 0}, "positive"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"timestamps": [0.5, 0.5]}, "increasing"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"timestamps": [0.5]}, "more frames"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"timestamps": [0.5, 1, 2]}, "3 timestamps"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"codec": "nope"}, "unknown codec"),
    ],
)
def test_bad_frames_to_write(tmp_path: Path, frames: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, **arguments)
    with pytest.raises(ValueError, match="ending"):
        write_video(tmp_path / "a.unknown", counted_frames(1))


def test_synthetic_clip() -> None:
    clip = synthetic_clip(frames=10, height=60, width=80, seed=3)
    assert clip.shape == (10, 60, 80, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, synthetic_clip(frames=10, height=60, width=80, seed=3))
    assert not np.array_equal(clip, synthetic_clip(frames=10, height=60, width=80, seed=4))
    changed = (clip[1:] != clip[:-1]).any(axis=3).mean(axis=(1, 2))
    assert changed[4] > 0.9  # the cut, in the middle
    assert np.delete(changed, 4).min() > 0  # the object moves
    assert np.delete(changed, 4).max() < 0.3  # over a still background
    with pytest.raises(ValueError, match="frames >= 1"):
        synthetic_clip(frames=0)
