"""Time from a video file to a model's pixels, and to the first token, against a bare PyAV seek loop.

    python -m holimerge.eval.bench_reading --output results

The files: ten minutes of 1280 x 720 H.264, with short and long groups of pictures. 40 seconds (two drawn scenes that
pan, an object that moves) are encoded and their packets repeated, so that they are there in seconds. The bare loop
opens the file, seeks for each frame back to its key frame, decodes up to it and converts it to full-size RGB; which
frames, it is told. Ours finds that out itself. Both ways of PyAV's threads are tried for the loop, and ours is held
against the faster one. All sides take turns; the file is in the system's cache. With a GPU frames are preprocessed on
it, and the first token is that of a model of full size with random weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holimerge.preprocess import Settings, default_settings
from holimerge.reading import read_pixels
from holimerge.video import read_video, sample_indices
from holimerge.video_ahead import usable_cores
from holimerge.video_pyav import VideoFile, import_av
from holimerge.video_write import synthetic_clip

from .bench_first_token import embedded_model, first_token, random_weights
from .conditions import conditions
from .measure import spread

GOPS = {"short": 12, "long": 250}  # frames from one key frame to the next
FRAMES, SECONDS, PART, FPS, HEIGHT, WIDTH = 32, 600, 40, 25, 720, 1280
AIM = 1.1  # of the bare loop's time
SHAPE = "llava-onevision-7b"  # of the model on a GPU


def write_long_clip(
    path: Path, gop: int, *, seconds: int = SECONDS, part: int = PART, height: int = HEIGHT, width: int = WIDTH
) -> dict[str, Any]:
    """Write the test file; `part` seconds are encoded, as often as `seconds` needs. Returns what it is."""
    av = import_av()
    count, copies = part * FPS, seconds // part
    options = {"preset": "veryfast", "crf": "28", "g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = [p for picture in _pictures(av, count, height, width) for p in stream.encode(picture)]
        packets += stream.encode()
        stored = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        base = packets[0].time_base
        for copy in range(copies):
            for content, pts, dts, key in stored:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.duration = stream, base, 1
                packet.pts, packet.dts, packet.is_keyframe = pts + copy * count, dts + copy * count, key
                container.mux(packet)
    return {"codec": "h264", "seconds": seconds, "fps": FPS, "gop": gop, "height": height, "width": width} | {
        "b_frames": "x264's veryfast",
        "bytes": path.stat().st_size,
    }


def _pictures(av: Any, count: int, height: int, width: int) -> Iterator[Any]:
    """Frames in YUV, drawn in place: each scene pans slowly, and an object moves over it."""
    scenes = [
        av.VideoFrame.from_ndarray(scene, format="rgb24").reformat(format="yuv420p").to_ndarray()
        for scene in synthetic_clip(2, height, width)
    ]
    side = height // 4
    for number in range(count):
        planes = scenes[number * 2 // count].copy()
        planes[:height] = np.roll(planes[:height], number // 2 % width, axis=1)
        top, left = number * 3 % (height - side), number * 7 % (width - side)
        planes[top : top + side, left : left + side] = planes[top : top + side, left : left + side] // 2 + number % 97
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.pts = number
        yield frame


def bare_loop(path: str, wanted: list[int], thread_type: str) -> np.ndarray:
    """The plain way to read frames with PyAV. wanted: their time stamps."""
    found = []
    with import_av().open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = thread_type
        for stamp in wanted:
            container.seek(stamp, stream=stream, backward=True)
            frame = next(f for f in container.decode(stream) if f.pts >= stamp)
            found.append(frame.to_ndarray(format="rgb24"))
    return np.stack(found)


def stages(path: str, settings: Settings, frames: int) -> dict[str, float]:
    """Milliseconds of each stage in one thread, one after another."""
    from av.video.reformatter import VideoReformatter

    times: dict[str, float] = {}
    begin = time.perf_counter()

    def stop(stage: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        times[stage] = times.get(stage, 0.0) + (now - begin) * 1000
        begin = now

    with VideoFile(path, threads=1) as file:
        stop("open")
        table = file.table()
        indices = sample_indices(table, frames=frames)
        stop("list the frames")
        reformatter, kept = VideoReformatter(), []
        for _, frame in file.sought(table, list(enumerate(indices.tolist()))):
            stop("seek and decode")
            picture = reformatter.reformat(frame, frame.width, frame.height, "rgb24").to_ndarray()
            stop("convert to RGB")
            kept.append(settings.fit(picture, frames))
            stop("resize")
        settings.pixels(np.stack(kept))
        stop("normalise")
    return times


def sides_of(path: str, settings: Settings, frames: int, device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    with VideoFile(path) as file:
        table = file.table()
    wanted = table.pts[sample_indices(table, frames=frames)].tolist()

    def overlapped(resize: str = "exact", where: str = "cpu") -> Any:
        return read_pixels(path, settings, frames=frames, resize=resize, device=where)[1]

    sides: dict[str, Callable[[], Any]] = {
        "bare loop, slice threads": lambda: bare_loop(path, wanted, "SLICE"),
        "bare loop, frame threads": lambda: bare_loop(path, wanted, "AUTO"),
        "frames, one thread": lambda: read_video(path, frames=frames, threads=1).frames,
        "frames": lambda: read_video(path, frames=frames).frames,
        "pixels, sequential": lambda: settings.pixels(read_video(path, frames=frames, threads=1).frames),
        "pixels, overlapped": overlapped,
        "pixels, overlapped, decoder resizes": lambda: overlapped("decoder"),
    }
    if device != "cpu":
        sides[f"pixels, overlapped, on {device}"] = lambda: overlapped("exact", device)
    return sides


def timed(
    sides: dict[str, Callable[[], Any]], repeats: int, say: Callable[..., None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU milliseconds of each side, in turns; each has run before."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides) if turn % 2 == 0 else reversed(list(sides)):
            say(name, turn, repeats)
            begin, busy = time.perf_counter(), time.process_time()
            sides[name]()
            wall[name].append((time.perf_counter() - begin) * 1000)
            cpu[name].append((time.process_time() - busy) * 1000)
    return wall, cpu


def bench_case(
    path: Path,
    gop: int,
    *,
    frames: int = FRAMES,
    repeats: int = 5,
    device: str = "cpu",
    shape: str = SHAPE,
    say: Callable[..., None] = lambda *_: None,
    **clip: Any,
) -> dict[str, Any]:
    """Time every side on one file, which is written here.

    device: where the model is; on "cpu" it is the embedded one, elsewhere it has the shape `shape` and random weights,
    and sides that decode in one thread are left out.

    Returns:
        `ms` and `cpu_ms` (of all threads) by side, `stages` in one thread, each median, min, max, p90, n; `ratio`: the
        frames' time over that of the faster bare loop, the median over turns; `aim`; `largest`, the stage that takes
        longest; `decoder_resize`, by how much its pixels differ on the 0-255 scale; `first_token` by side;
        `dominates`, the longest stage of its last side; `video`; `conditions`: ready for JSON.

    Raises:
        RuntimeError: the sides disagree about a frame or a pixel.
    """
    say("writing the file", 0, 0)
    video = write_long_clip(path, gop, **clip)
    settings = default_settings("llava_onevision")
    sides = sides_of(str(path), settings, frames, device)
    if device != "cpu":
        del sides["frames, one thread"], sides["pixels, sequential"]
    by_decoder = _compared(sides, settings)
    wall, cpu = timed(sides, repeats, say)
    each = [stages(str(path), settings, frames) for _ in range(repeats if device == "cpu" else 1)]
    parts = {stage: spread(times[stage] for times in each) for stage in each[0]}
    bare = min((name for name in sides if name.startswith("bare")), key=lambda name: spread(wall[name])["median"])
    ratio = spread(ours / theirs for ours, theirs in zip(wall["frames"], wall[bare], strict=True))
    reader = embedded_model() if device == "cpu" else random_weights(shape, device)
    told = first_token(reader, str(path), frames, repeats, say)
    return {
        "kind": "reading",
        "video": video | {"frames": frames},
        "ms": {name: spread(values) for name, values in wall.items()},
        "cpu_ms": {name: spread(values) for name, values in cpu.items()},
        "stages": parts,
        "largest": max(parts, key=lambda stage: parts[stage]["median"]),
        "bare": bare,
        "ratio": ratio,
        "ratios": {"frames, faster bare loop over ours": round(1 / ratio["median"], 3), **_gains(told)},
        "aim": {f"at most {AIM}": ratio["median"] <= AIM},
        "decoder_resize": by_decoder,
        "model": reader.name,
        "first_token": told,
        "dominates": _longest(list(told.values())[-1]),
        "conditions": conditions(
            device, dtype=reader.dtype, seed=0, warmup=1, repeats=repeats, usable_cores=usable_cores()
        ),
    }


def _gains(told: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of the time from file to first token: the first side's over every other's."""
    first, *others = told
    whole = {name: stages["all"]["median"] for name, stages in told.items()}
    return {f"file to first token, {first} over {name}": round(whole[first] / whole[name], 3) for name in others}


def _longest(stages: dict[str, Any]) -> str:
    return max((name for name in stages if name != "all"), key=lambda name: float(stages[name]["median"]))


def _compared(sides: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, float]:
    """All sides must give the same; the decoder's resizing by how much it differs, in steps of 1/255."""
    frames = sides["bare loop, slice threads"]()
    for name in (name for name in sides if name.startswith(("bare", "frames")) and "slice" not in name):
        if not np.array_equal(sides[name](), frames):
            raise RuntimeError(f"{name}: other frames than the bare loop's")
    whole = settings.pixels(frames)["pixel_values_videos"]
    for name in (name for name in sides if name.startswith("pixels") and "decoder" not in name):
        if not torch.equal(sides[name]()["pixel_values_videos"].cpu(), whole):
            raise RuntimeError(f"{name}: other pixels")
    step = torch.tensor(settings.std)[:, None, None] / settings.rescale
    gap = (sides["pixels, overlapped, decoder resizes"]()["pixel_values_videos"] - whole).abs() * step
    return {"mean": round(float(gap.mean()), 3), "largest": round(float(gap.max()), 1)}


def bench_gop(name: str, gop: int, **more: Any) -> dict[str, Any]:
    """`bench_case` of a file of a moment with a key frame every `gop` frames."""
    with tempfile.TemporaryDirectory() as folder:
        return bench_case(Path(folder) / f"{name}.mp4", gop, **more)


def run(
    output: str | Path | None,
    *,
    gops: dict[str, int] | None = None,
    repeats: int = 5,
    device: str = "cpu",
    say: Callable[..., None] = print,
    **clip: Any,
) -> list[dict[str, Any]]:
    """Every kind of file; with `output`, one JSON each in that folder."""
    found = []
    for name, gop in (gops or GOPS).items():
        result = bench_gop(name, gop, repeats=repeats, device=device, say=say, **clip)
        found.append(result)
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=2) + "\n"
            (Path(output) / f"reading-{name}-gop-{result['conditions']['device_type']}.json").write_text(
                text, encoding="utf-8"
            )
    return found


def reading_tables(results: list[dict[str, Any]]) -> list[Any]:
    """The results as two rich tables: files, and the way to the first token."""
    from rich.table import Table

    from .show import milliseconds_text

    about = results[0]["video"]
    files = Table(title=f"{about['frames']} frames of {about['seconds']} s, ms: median (range)", title_justify="left")
    tokens = Table(title=f"File to first token, {results[0]['model']}, ms: median (range)", title_justify="left")
    for table in (files, tokens):
        table.add_column("", no_wrap=True)
    for r in results:
        files.add_column(f"key frame every {r['video']['gop']}", justify="right", no_wrap=True)
        for way in r["first_token"]:
            tokens.add_column(f"{way}, every {r['video']['gop']}", justify="right", no_wrap=True)
    for side in results[0]["ms"]:
        files.add_row(side, *(milliseconds_text(r["ms"][side]) for r in results))
    files.add_row("  of all threads' CPU: frames", *(milliseconds_text(r["cpu_ms"]["frames"]) for r in results))
    files.add_row("  the faster bare loop", *(milliseconds_text(r["cpu_ms"][r["bare"]]) for r in results))
    files.add_section()
    for stage in results[0]["stages"]:
        files.add_row(f"one thread: {stage}", *(milliseconds_text(r["stages"][stage]) for r in results))
    files.add_section()
    files.add_row("frames / faster bare loop", *(f"{r['ratio']['median']:.2f}" for r in results))
    files.add_row("takes longest", *(r["largest"] for r in results))
    ways = [way for r in results for way in r["first_token"].values()]
    for stage in max(ways, key=len):
        tokens.add_row(stage, *(milliseconds_text(way[stage]) if stage in way else "" for way in ways))
    return [files, tokens]


def main() -> None:
    """The command line of `python -m holimerge.eval.bench_reading`."""
    from .show import Steps, stdout

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default=None, metavar="FOLDER", help="write one JSON per file into this folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of the model, for instance cuda:0")
    given = parser.parse_args()
    if given.repeats < 1:
        parser.error("--repeats must be at least 1")
    with Steps() as say:
        results = run(given.output, repeats=given.repeats, device=given.device, say=say)
    for table in reading_tables(results):
        stdout().print(table)


if __name__ == "__main__":
    main()
