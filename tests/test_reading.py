"""Reading ahead: the same frames, pixels and errors as a plain loop gives, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_video import FILES, N, counted_frames, linspace, numbers
from toys import make_model

from holimerge.eval import bench_first_token
from holimerge.eval.bench_first_token import first_token, random_weights
from holimerge.eval.bench_reading import reading_tables, run
from holimerge.preprocess import Settings, default_settings
from holimerge.reading import read_pixels
from holimerge.video import Taker, read_video, synthetic_clip, write_video
from holimerge.video_ahead import in_order
from holimerge.video_mp4 import header_times
from holimerge.video_pyav import VideoFile

LLAVA = replace(default_settings("llava_onevision"), size=(42, 56))
QWEN = replace(default_settings("qwen2_5_vl"), min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 12)
CAPPED = replace(QWEN, cap_pixels_per_frame=True, max_video_tokens=60)  # the size depends on the number of frames
CROSSED = replace(QWEN, min_pixels=28 * 28 * 9 - 400, max_pixels=28 * 28 * 9 - 399)  # no size lies between
SETTINGS = {"llava": LLAVA, "qwen": QWEN, "qwen, capped": CAPPED, "qwen, crossed": CROSSED}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("videos")

    def write(name: str) -> str:
        if not (folder / name).exists():
            write_video(folder / name, counted_frames(), **FILES[name])
        return str(folder / name)

    return write


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("holimerge")] == []


# --- threads ahead ----------------------------------------------------------------------------------------------------


def grouped(total: int, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
    cuts = np.sort(rng.choice(np.arange(1, total), size=min(total - 1, int(rng.integers(0, 6))), replace=False))
    return [[(int(place), int(place) * 10) for place in part] for part in np.split(np.arange(total), cuts)]


@pytest.mark.parametrize("seed", range(6))
def test_results_come_in_order_whatever_the_threads_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, window = grouped(20, rng), int(rng.integers(1, 6))
    pauses = rng.uniform(0, 4e-3, 20)
    ahead, taken = [0], [0]

    @contextmanager
    def reader(stop: threading.Event) -> Iterator[Any]:
        def read(group: Any) -> Iterator[tuple[int, int]]:
            for place, value in group:
                time.sleep(pauses[place])
                yield place, value
                ahead[0] = max(ahead[0], place - taken[0])  # `put` has returned: it was within the window

        yield read

    found = []
    for value in in_order(groups, reader, threads=int(rng.integers(1, 5)), window=window):
        found.append(value)
        time.sleep(1e-3)
        taken[0] = len(found)
    assert found == [10 * place for place in range(20)]
    assert ahead[0] <= window + 1  # nobody runs away with the memory


@pytest.mark.parametrize("bad", [{7}, {0}, {3, 11}, {19}])
def test_the_first_error_in_order_is_raised_after_everything_before_it(bad: set[int]) -> None:
    @contextmanager
    def reader(stop: threading.Event) -> Iterator[Any]:
        def read(group: Any) -> Iterator[tuple[int, int]]:
            for place, value in group:
                time.sleep(0.01 if place < 8 else 0)  # later ones fail earlier
                if place in bad:
                    raise ValueError(f"place {place}")
                yield place, value

        yield read

    groups = [[(place, place) for place in range(start, start + 4)] for start in range(0, 20, 4)]
    found = []
    with pytest.raises(ValueError, match=f"^place {min(bad)}$"):
        found.extend(in_order(groups, reader, threads=3, window=50))
    assert found == list(range(min(bad)))


def test_a_reader_that_cannot_open_or_gives_too_little_is_an_error_not_a_wait() -> None:
    @contextmanager
    def closed(stop: threading.Event) -> Iterator[Any]:
        raise OSError("gone")
        yield

    @contextmanager
    def lazy(stop: threading.Event) -> Iterator[Any]:
        yield lambda group: iter([])

    with pytest.raises(OSError, match="gone"):
        list(in_order([[(0, 0)], [(1, 1)]], closed, threads=2, window=4))
    with pytest.raises(RuntimeError, match="too few"):
        list(in_order([[(0, 0)]], lazy, threads=1, window=4))


def test_leaving_early_ends_the_threads(make: Callable[[str], str]) -> None:
    with VideoFile(make("short.mp4")) as file:
        found = file.pictures(file.table(), np.arange(N), None, threads=3)
        next(found)
        assert any(thread.name == "holimerge-decode" for thread in threading.enumerate())
        found.close()


# --- the same frames, pixels and errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(("mp4", "mov"))])
def test_the_headers_times_are_the_packets_times(make: Callable[[str], str], name: str) -> None:
    with VideoFile(make(name)) as file:
        header, packets = file._from_header(), file._from_packets()
    if header is None:
        assert name == "vfr.mp4"  # its edit is shorter than its last frame: listed the slow way
        return
    for key, value in vars(packets).items():
        assert np.array_equal(getattr(header, key), value), key


@pytest.mark.parametrize(
    ("flags", "plain"),
    [
        ({"movflags": "negative_cts_offsets"}, True),
        ({"video_track_timescale": "90000"}, True),
        ({"movflags": "frag_keyframe+empty_moov"}, False),
    ],
)
def test_other_ways_to_write_a_header(tmp_path: Path, flags: dict[str, str], plain: bool) -> None:
    path = write_video(tmp_path / "a.mp4", counted_frames(40), gop=12, b_frames=3, container_options=flags)
    with VideoFile(path) as file:
        header, packets = file._from_header(), file._from_packets()
    assert (header is not None) == plain
    if header is not None:
        assert np.array_equal(header.pts, packets.pts)
        assert np.array_equal(header.keys, packets.keys)
    assert numbers(read_video(path, frames=9).frames) == linspace(9, 40)


def test_a_damaged_header_is_no_header(make: Callable[[str], str], tmp_path: Path) -> None:
    """Whatever its bytes are: None, or times of as many frames as they say; never another error."""
    content = bytearray(Path(make("short.mp4")).read_bytes())
    head = content.index(b"moov")
    with VideoFile(make("short.mp4")) as file:
        track, pts = file._stream.id, np.sort(file.table().pts)
    whole = header_times(make("short.mp4"), track)
    assert whole is not None
    assert np.array_equal(np.sort(whole.pts), pts)
    assert header_times(make("short.mp4"), track + 1) is None
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        hurt = content.copy()
        for at in rng.integers(head, content.index(b"mdat"), int(rng.integers(1, 4))):
            hurt[at] = int(rng.choice([0, 1, 127, 255, int(rng.integers(256))]))
        (tmp_path / "hurt.mp4").write_bytes(hurt)
        found = header_times(str(tmp_path / "hurt.mp4"), track)
        refused += found is None
        assert found is None or len(found.pts) == len(found.keys) == len(found.durations)
    assert refused > 30


def test_pictures_that_nobody_needs_are_not_decoded(make: Callable[[str], str]) -> None:
    """One frame far into a group: fewer come out of the decoder than lie before it, and none after it."""
    with VideoFile(make("long.mp4"), threads=1) as file:
        table = file.table()
        file._wanted = frozenset([int(table.pts[100])])
        seen = [frame.pts for frame in file._from(table, 0, int(table.pts[0]))]
    assert int(table.pts[100]) in seen
    assert len(seen) < 80
    assert max(seen) <= table.pts[104]


@pytest.mark.parametrize("name", ["long.mp4", "short.mp4", "vfr.mkv", "open.mp4", "refresh.mp4", "hevc.mp4", "old.avi"])
def test_threads_change_nothing(make: Callable[[str], str], name: str) -> None:
    alone = read_video(make(name), frames=17, threads=1)
    assert numbers(alone.frames) == linspace(17)
    for threads in (None, 2, 5):
        other = read_video(make(name), frames=17, threads=threads)
        assert np.array_equal(other.frames, alone.frames)
        assert np.array_equal(other.timestamps, alone.timestamps)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("count", [1, 5, 16])
def test_pixels_made_meanwhile_are_the_pixels_made_after(make: Callable[[str], str], name: str, count: int) -> None:
    settings = SETTINGS[name]
    plain = read_video(make("short.mp4"), frames=count, threads=1)
    whole = settings.pixels(plain.frames)
    for chunk, threads in ((1, 1), (2, 3), (3, None), (8, 2), (99, 4)):
        video, pixels = read_pixels(make("short.mp4"), settings, frames=count, chunk=chunk, threads=threads)
        assert pixels.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(pixels[key], value), (key, chunk)
            assert pixels[key].dtype == value.dtype
        assert np.array_equal(video.timestamps, plain.timestamps)
        again = settings.pixels(video.frames)["pixel_values_videos"]
        assert torch.equal(again, whole["pixel_values_videos"])  # the frames kept have the model's size already


@pytest.mark.parametrize("name", ["llava", "qwen, capped", "qwen, crossed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_of_another_dtype_are_those_rounded(make: Callable[[str], str], name: str, dtype: torch.dtype) -> None:
    whole = SETTINGS[name].pixels(read_video(make("short.mp4"), frames=5, threads=1).frames)["pixel_values_videos"]
    pixels = read_pixels(make("short.mp4"), SETTINGS[name], frames=5, chunk=2, dtype=dtype)[1]["pixel_values_videos"]
    assert pixels.dtype == dtype
    assert torch.equal(pixels, whole.to(dtype))


@pytest.mark.parametrize("kind", ["array", "images", "rotated", "refresh"])
def test_every_kind_of_source_goes_the_same_way(make: Callable[[str], str], tmp_path: Path, kind: str) -> None:
    frames = synthetic_clip(9, 48, 80)
    sources: dict[str, Callable[[], Any]] = {
        "array": lambda: frames,
        "images": lambda: list(frames),
        "rotated": lambda: write_video(tmp_path / "turned.mp4", frames, rotation=90),
        "refresh": lambda: make("refresh.mp4"),  # started twice: its packets are no good to seek by
    }
    source = sources[kind]()
    for settings in (LLAVA, QWEN):
        whole = settings.pixels(read_video(source, frames=5).frames)
        pixels = read_pixels(source, settings, frames=5, chunk=2)[1]
        assert all(torch.equal(pixels[key], value) for key, value in whole.items())


@pytest.mark.parametrize("settings", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_the_decoder_may_resize_on_request(make: Callable[[str], str], settings: Settings) -> None:
    exact, quick = (read_pixels(make("short.mp4"), settings, frames=4, resize=r)[1] for r in ("exact", "decoder"))
    a, b = exact["pixel_values_videos"], quick["pixel_values_videos"]
    assert a.shape == b.shape
    assert 0 < float((a - b).abs().mean()) < 0.2


@pytest.mark.parametrize("kind", ["cut", "hurt", "noise", "missing"])
def test_broken_files_are_the_same_errors(make: Callable[[str], str], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mp4"
    content = bytearray(Path(make("long.mp4")).read_bytes())
    if kind == "cut":
        content = content[: len(content) * 2 // 3]
    elif kind == "hurt":
        middle = len(content) // 2
        content[middle : middle + 600] = np.random.default_rng(0).integers(0, 256, 600, dtype=np.uint8).tobytes()
    elif kind == "noise":
        content = bytearray(np.random.default_rng(0).integers(0, 256, 9000, dtype=np.uint8).tobytes())
    if kind != "missing":
        path.write_bytes(content)
    told = []
    for read in (
        lambda: read_video(path, frames=N, threads=1),
        lambda: read_video(path, frames=N, threads=4),
        lambda: read_pixels(path, LLAVA, frames=N),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read()
        told.append((error.type, str(error.value)))
    assert told[0] == told[1] == told[2]


def test_an_error_of_the_one_who_takes_the_frames_ends_the_threads(make: Callable[[str], str]) -> None:
    class Broken(Taker):
        def take(self, pictures: Any, count: int) -> np.ndarray:
            next(pictures)
            raise KeyError("mine")

    class Unfit(Taker):
        def fit(self, picture: np.ndarray) -> np.ndarray:
            raise KeyError("in the thread")

    for taker, text in ((Broken(), "mine"), (Unfit(), "in the thread")):
        with pytest.raises(KeyError, match=text):
            read_video(make("short.mp4"), frames=N, threads=3, taker=taker)


def test_mistakes(make: Callable[[str], str]) -> None:
    path = make("short.mp4")
    for wrong, message in (
        ({"resize": "fast"}, "resize: 'fast'; valid: exact, decoder"),
        ({"chunk": 0}, "chunk: 0; at least 1"),
        ({"size": (4, 4)}, "the preprocessor settings decide"),
        ({"dtype": torch.int32}, "dtype: torch.int32; pixels are floating-point"),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pixels(path, LLAVA, **wrong)  # type: ignore[arg-type]


# --- the bench --------------------------------------------------------------------------------------------------------


def test_the_bench_tells_what_dominates(tmp_path: Path) -> None:
    (found,) = run(
        tmp_path, gops={"short": 12}, repeats=1, say=lambda *_: None, seconds=4, part=2, height=96, width=128
    )
    assert (tmp_path / "reading-short-gop-cpu.json").is_file()
    assert found["video"]["gop"] == 12
    assert found["largest"] in found["stages"]
    assert set(found["ms"]) == set(found["cpu_ms"])
    fastest = min(found["ms"][name]["median"] for name in found["ms"] if name.startswith("bare"))
    assert found["ratio"]["median"] == pytest.approx(found["ms"]["frames"]["median"] / fastest, rel=1e-3)
    told = found["first_token"]
    assert list(told) == ["one after the other", "overlapped", "encoded while read"]
    for way in told.values():
        assert list(way) == ["read", "inputs", "vision", "reduce", "project", "splice", "prefill", "other", "all"]
    assert told["encoded while read"]["vision"]["median"] < told["overlapped"]["vision"]["median"]
    assert found["dominates"] in told["encoded while read"]
    assert 0 < found["decoder_resize"]["mean"] < 30
    assert len(reading_tables([found])) == 2


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_the_way_to_the_first_token_of_random_weights(
    make: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    config = make_model(family).config
    monkeypatch.setattr(bench_first_token, "shape_config", lambda name: (config, None))
    told = first_token(random_weights("tiny", "cpu"), make("short.mp4"), 4, 1, lambda *_: None)
    ways = ["one after the other", "overlapped", "encoded while read"]
    assert list(told) == [*(f"unpatched, {way}" for way in ways[:2]), *(f"holimerge-10, {way}" for way in ways)]
    for stages in told.values():
        parts = sum(value["median"] for stage, value in stages.items() if stage != "all")
        assert parts == pytest.approx(stages["all"]["median"], rel=1e-3)
    assert {"reduce", "splice"} <= set(told["holimerge-10, overlapped"])
