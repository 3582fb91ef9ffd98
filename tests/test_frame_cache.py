"""The frame cache: what it gives is what decoding gives, whatever happened to its files."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_toys import toy_task
from typer.testing import CliRunner

from holimerge.eval.cli import app
from holimerge.eval.clips import Clip
from holimerge.eval.frame_cache import FrameCache, content_key, default_folder, parse_size
from holimerge.eval.load import Loaded
from holimerge.eval.tasks.base import Sample
from holimerge.video import Video, read_video, synthetic_clip, write_video

pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_video(tmp_path_factory.mktemp("clip") / "a.mp4", synthetic_clip(20, 32, 48), fps=5))


def never(*_: Any, **__: Any) -> Video:
    raise AssertionError("decoded again")


def same(a: Video, b: Video) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("frames", "timestamps", "indices"))
    kinds = all(getattr(a, n).dtype == getattr(b, n).dtype for n in ("frames", "timestamps", "indices"))
    return (
        arrays and kinds and all(getattr(a, n) == getattr(b, n) for n in ("fps", "duration", "total_frames", "source"))
    )


@pytest.mark.parametrize(
    "rule", [{"frames": 5}, {"sampling": "fps", "max_frames": 6}, {"frames": 4, "start": 1.0, "end": 3.0}]
)
def test_a_hit_is_what_decoding_gives(tmp_path: Path, clip: Path, rule: dict[str, Any]) -> None:
    cache = FrameCache(tmp_path / "cache")
    plain = read_video(clip, **rule)
    first, hit = cache.read(clip, **rule)
    assert not hit
    assert same(first, plain)
    again, hit = cache.read(clip, never, **rule)
    assert hit
    assert same(again, plain)
    assert (cache.hits, cache.misses) == (1, 1)


def test_everything_that_decides_is_in_the_key(tmp_path: Path, clip: Path) -> None:
    cache = FrameCache(tmp_path / "cache")
    rules: list[dict[str, Any]] = [{"frames": 5}, {"frames": 6}, {"frames": 5, "sampling": "midpoint"}]
    rules += [{"frames": 5, "size": (16, 16)}, {"frames": 5, "start": 1.0}]
    for rule in rules:
        video, hit = cache.read(clip, **rule)
        assert not hit, rule
        assert same(video, read_video(clip, **rule))
    assert cache.size()[0] == len(rules)


def test_content_not_name(tmp_path: Path, clip: Path) -> None:
    cache = FrameCache(tmp_path / "cache")
    cache.read(clip, frames=5)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    state = clip.stat()
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))
    video, hit = cache.read(copy, never, frames=5)
    assert hit
    assert video.source == str(copy)
    # other bytes of equal length and time
    other = bytearray(copy.read_bytes())
    other[len(other) // 2] ^= 1
    copy.write_bytes(other)
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert content_key(copy) != content_key(clip)


def test_large_files_are_sampled_to_their_end(tmp_path: Path) -> None:
    path = tmp_path / "large"
    content = bytearray(3 * 2**20)
    path.write_bytes(content)
    state = path.stat()
    before = content_key(path)
    content[-1] = 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert content_key(path) != before


@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "text", "pickle", "shape"])
def test_a_damaged_entry_is_a_miss(tmp_path: Path, clip: Path, damage: str) -> None:
    cache = FrameCache(tmp_path / "cache")
    cache.read(clip, frames=5)
    (entry,) = cache.folder.iterdir()
    content = bytearray(entry.read_bytes())
    if damage == "half":
        entry.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 255  # inside the frames: only the archive's CRC can tell
        entry.write_bytes(content)
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "text":
        entry.write_text("no archive")
    elif damage == "pickle":
        np.savez(entry, frames=np.array([object()], dtype=object))
    else:
        np.savez(entry, frames=np.zeros((2, 2)), timestamps=np.zeros(2), about=np.frombuffer(b"{}", np.uint8))
    video, hit = cache.read(clip, frames=5)
    assert not hit
    assert same(video, read_video(clip, frames=5))
    assert cache.read(clip, never, frames=5)[1]  # it was written anew


def test_no_damaged_byte_gives_other_frames_or_an_error(tmp_path: Path) -> None:
    """A byte of a header or of the directory decides what the archive holds; numpy reads only what that says."""
    clip = Path(write_video(tmp_path / "a.mp4", synthetic_clip(6, 64, 64), fps=4))
    cache = FrameCache(tmp_path / "cache")
    video, _ = cache.read(clip, frames=3)
    (entry,) = cache.folder.iterdir()
    content = entry.read_bytes()
    places = [*range(300), *range(len(content) - 500, len(content))]
    random, hits = np.random.default_rng(0), 0
    for place in places:
        for value in random.integers(0, 256, 3):
            entry.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            found = cache._load(entry, str(clip))
            assert found is None or same(found, video), place
            hits += found is not None
    assert 0 < hits < len(places)  # dates and the like do not matter
    smaller = content.replace(b"(3, 64, 64, 3)", b"(3, 64, 10, 3)")  # a damaged shape of fewer bytes than there are
    assert smaller != content
    entry.write_bytes(smaller)
    assert cache._load(entry, str(clip)) is None


def test_the_least_recently_used_go_first(tmp_path: Path, clip: Path) -> None:
    cache = FrameCache(tmp_path / "cache")
    cache.read(clip, frames=4)
    one = cache.size()[1]
    cache.limit = 3 * one + one // 2
    for step, start in enumerate((0.5, 1.0)):
        cache.read(clip, frames=4, start=start)
        for path in cache.folder.iterdir():  # clocks of file systems may be coarse
            state = path.stat()
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 10**9 * (3 - step)))
    assert cache.read(clip, never, frames=4)[1]  # now the first one is the newest
    cache.read(clip, frames=4, start=1.5)
    assert cache.size()[0] == 3
    assert cache.size()[1] <= cache.limit
    assert cache.read(clip, never, frames=4)[1]
    assert not cache.read(clip, frames=4, start=0.5)[1]


def test_decoding_is_timed_without_the_cache(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing an entry may take longer than decoding; it is no part of a video's decoding time."""
    cache = FrameCache(tmp_path / "cache")
    store = cache._store
    monkeypatch.setattr(cache, "_store", lambda *arguments: (time.sleep(0.5), store(*arguments)))
    sample = Sample("1", clip, "clip", "?", ("a", "b"), 0, "c")
    loaded = Loaded(None, None, None, None)
    first, second = (
        Clip(toy_task([sample]), sample, loaded, frames=4, sampling="uniform", cache=cache) for _ in range(2)
    )
    assert first.error is None
    assert 0 < first.ms["decode"] < 500
    assert "decode" not in second.ms
    assert same(first.video, second.video)


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path, clip: Path) -> None:
    cache = FrameCache(tmp_path / "cache", limit=1000)
    video, _ = cache.read(clip, frames=5)
    assert same(video, read_video(clip, frames=5))
    assert cache.size() == (0, 0)


def test_errors_of_reading_stay(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="no such video"):
        cache.read(tmp_path / "none.mp4", frames=5)
    (tmp_path / "bad.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"bad\.mp4"):
        cache.read(tmp_path / "bad.mp4", frames=5)
    assert cache.size() == (0, 0)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "file").write_text("a file where the folder should be")
    cache = FrameCache(tmp_path / "file" / "cache")
    video, hit = cache.read(clip, frames=5)
    assert not hit
    assert same(video, read_video(clip, frames=5))


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FrameCache(tmp_path / "cache")
    seen: list[list[str]] = []

    def full(file: Any, **_: Any) -> None:
        file.write(b"the beginning")
        file.flush()
        seen.append([path.name for path in cache.folder.iterdir() if not path.name.startswith(".")])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    video, hit = cache.read(clip, frames=5)
    assert not hit
    assert same(video, read_video(clip, frames=5))
    assert seen == [[]]  # nobody could have read the half
    assert not list(cache.folder.iterdir())


def test_clear_removes_entries_and_nothing_else(tmp_path: Path, clip: Path) -> None:
    cache = FrameCache(tmp_path / "cache")
    cache.read(clip, frames=5)
    (cache.folder / "mine.txt").write_text("not the cache's")
    (cache.folder / ".writing-abc.npz").write_text("of a process that died")
    assert cache.clear()[0] == 1
    assert [path.name for path in cache.folder.iterdir()] == ["mine.txt"]
    assert cache.clear() == (0, 0)


def test_abandoned_writing_is_swept(tmp_path: Path, clip: Path) -> None:
    cache = FrameCache(tmp_path / "cache")
    cache.folder.mkdir()
    old, new = cache.folder / ".writing-old.npz", cache.folder / ".writing-new.npz"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.read(clip, frames=5)
    assert not old.exists()
    assert new.exists()  # another process may be writing it


def _hammer(folder: Path, clip: Path, limit: int, number: int) -> None:
    def decode(path: Path, frames: int) -> Video:
        return Video(np.full((frames, 32, 48, 3), frames, dtype=np.uint8), np.zeros(frames))

    cache = FrameCache(folder, limit)
    for turn in range(60):
        frames = 2 + (turn * 7 + number) % 4
        video, _ = cache.read(clip, decode, frames=frames)
        assert video.frames.shape[0] == frames
        assert (video.frames == frames).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_share_a_folder(tmp_path: Path, clip: Path) -> None:
    """Three processes with room for two entries read and evict under each other's feet."""
    size, fork = 4 * 32 * 48 * 3, multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache", clip, 2 * size + 4000)
    children = [fork.Process(target=_hammer, args=(*arguments, i)) for i in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_place_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "holimerge" / "frames"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says: to be ignored
    assert default_folder() == Path.home() / ".cache" / "holimerge" / "frames"
    assert [parse_size(t) for t in ("10GB", "1.5 tb", "200", "3kb")] == [10**10, 15 * 10**11, 200, 3000]
    for wrong in ("", "ten", "-1GB", "5PB", "nan"):
        with pytest.raises(ValueError, match="size"):
            parse_size(wrong)


def test_the_command(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    FrameCache(default_folder()).read(clip, frames=5)
    shown = CliRunner().invoke(app, ["cache"])
    assert shown.exit_code == 0
    assert "1 videos" in shown.stdout
    assert str(tmp_path) in shown.stdout
    assert FrameCache(default_folder()).size()[0] == 1
    assert CliRunner().invoke(app, ["cache", "--clear"]).exit_code == 0
    assert FrameCache(default_folder()).size() == (0, 0)
