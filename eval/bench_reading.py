"""Time from a video file to a model's pixels, and to the first token, against a bare PyAV seek loop.

    python -m holimerge.eval.bench_reading --output results

The files: ten minutes of 1280 x 720 H.264, with short and long groups of pictures. 40 seconds (two drawn scenes that
pan, an object that moves) are encoded and their packets repeated, so that they are there in seconds. The bare loop
opens the file, seeks for each frame back to its key frame, decodes up to it and converts it to full-size RGB; which
frames, it is told. Ours finds that out itself. Both ways of PyAV's threads are tried for the loop, and ours is held
against the faster one. All sides take turns; the file is in the system's cache.
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

from .conditions import conditions
from .measure import spread

GOPS = {"short": 12, "long": 250}  # frames from one key frame to the next
FRAMES, SECONDS, PART, FPS, HEIGHT, WIDTH = 32, 600, 40, 25, 720, 1280
AIM = 1.1  # of the bare loop's time
QUESTION = "What happens in the video?"


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


def sides_of(path: str, settings: Settings, frames: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    with VideoFile(path) as file:
        table = file.table()
    wanted = table.pts[sample_indices(table, frames=frames)].tolist()
    return {
        "bare loop, slice threads": lambda: bare_loop(path, wanted, "SLICE"),
        "bare loop, frame threads": lambda: bare_loop(path, wanted, "AUTO"),
        "frames, one thread": lambda: read_video(path, frames=frames, threads=1).frames,
        "frames": lambda: read_video(path, frames=frames).frames,
        "pixels, sequential": lambda: settings.pixels(read_video(path, frames=frames, threads=1).frames),
        "pixels, overlapped": lambda: read_pixels(path, settings, frames=frames)[1],
        "pixels, overlapped, decoder resizes": lambda: read_pixels(path, settings, frames=frames, resize="decoder")[1],
    }


def timed(
    sides: dict[str, Callable[[], Any]], repeats: int, say: Callable[..., None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU milliseconds of each side, in turns, after one run of each that does not count."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name in list(sides) if turn % 2 == 0 else reversed(list(sides)):
            say(name, turn, repeats + 1)
            begin, busy = time.perf_counter(), time.process_time()
            sides[name]()
            if turn:
                wall[name].append((time.perf_counter() - begin) * 1000)
                cpu[name].append((time.process_time() - busy) * 1000)
    return wall, cpu


def bench_case(
    path: Path,
    gop: int,
    *,
    frames: int = FRAMES,
    repeats: int = 5,
    say: Callable[..., None] = lambda *_: None,
    **clip: Any,
) -> dict[str, Any]:
    """Time every side on one file, which is written here.

    Returns:
        `ms` and `cpu_ms` (of all threads) by side, `stages` in one thread, each median, min, max, p90, n; `ratio`: the
        frames' time over that of the faster bare loop, the median over turns; `aim`; `largest`, the stage that takes
        longest; `decoder_resize`, by how much its pixels differ on the 0-255 scale; `first_token`; `video`;
        `conditions`: ready for JSON.

    Raises:
        RuntimeError: the sides disagree about a frame or a pixel.
    """
    say("writing the file", 0, 0)
    video = write_long_clip(path, gop, **clip)
    settings = default_settings("llava_onevision")
    sides = sides_of(str(path), settings, frames)
    by_decoder = _compared(sides, settings)
    wall, cpu = timed(sides, repeats, say)
    each = [stages(str(path), settings, frames) for _ in range(repeats)]
    parts = {stage: spread(times[stage] for times in each) for stage in each[0]}
    bare = min((name for name in sides if name.startswith("bare")), key=lambda name: spread(wall[name])["median"])
    ratio = spread(ours / theirs for ours, theirs in zip(wall["frames"], wall[bare], strict=True))
    told = first_token(str(path), frames, repeats, say)
    return {
        "kind": "reading",
        "video": video | {"frames": frames},
        "ms": {name: spread(values) for name, values in wall.items()},
        "cpu_ms": {name: spread(values) for name, values in cpu.items()},
        "stages": parts,
        "largest": max(parts, key=lambda stage: parts[stage]["median"]),
        "bare": bare,
        "ratio": ratio,
        "ratios": {
            "frames, faster bare loop over ours": round(1 / ratio["median"], 3),
            "file to first token, one after the other over overlapped": round(
                told["sequential"]["all"]["median"] / told["overlapped"]["all"]["median"], 3
            ),
        },
        "aim": {f"at most {AIM}": ratio["median"] <= AIM},
        "decoder_resize": by_decoder,
        "first_token": told,
        "conditions": conditions(
            "cpu", dtype="float32", seed=0, warmup=1, repeats=repeats, usable_cores=usable_cores()
        ),
    }


def _compared(sides: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, float]:
    """All sides must give the same; the decoder's resizing by how much it differs, in steps of 1/255."""
    frames = sides["bare loop, slice threads"]()
    for name in ("frames, one thread", "frames"):
        if not np.array_equal(sides[name](), frames):
            raise RuntimeError(f"{name}: other frames than the bare loop's")
    whole = settings.pixels(frames)["pixel_values_videos"]
    for name in ("pixels, sequential", "pixels, overlapped"):
        if not torch.equal(sides[name]()["pixel_values_videos"], whole):
            raise RuntimeError(f"{name}: other pixels")
    step = torch.tensor(settings.std)[:, None, None] / settings.rescale
    gap = (sides["pixels, overlapped, decoder resizes"]()["pixel_values_videos"] - whole).abs() * step
    return {"mean": round(float(gap.mean()), 3), "largest": round(float(gap.max()), 1)}


def first_token(path: str, frames: int, repeats: int, say: Callable[..., None]) -> dict[str, Any]:
    """From the file to the embedded model's first token at 15 % of the tokens, both ways: ms by stage."""
    from holimerge.config import load_config
    from holimerge.inputs import build_inputs

    from .load import load, to_model
    from .run import patched, run_once
    from .tiny import BUDGETS, CHECKPOINT

    model, tokenizer, settings, template = load(CHECKPOINT, dtype="float32")
    config = load_config(next(path for path in BUDGETS if path.endswith("-15.yaml")))

    def once(overlapped: bool) -> dict[str, float]:
        begin = time.perf_counter()
        pixels = None
        if overlapped:
            video, made = read_pixels(path, settings, frames=frames)
            pixels = [made]
        else:
            video = read_video(path, frames=frames, threads=1)
        read = time.perf_counter()
        inputs = build_inputs(
            QUESTION,
            video,
            config=model.config,
            tokenizer=tokenizer,
            settings=settings,
            chat_template=template,
            pixels=pixels,
        )
        built = time.perf_counter()
        run = run_once(model, to_model(inputs, model), memory=False)
        ms = {"read": (read - begin) * 1000, "inputs": (built - read) * 1000}
        ms |= {stage: value for stage, value in run.stages.items() if stage != "inner"}
        ms["other"] = run.ttft - sum(value for stage, value in run.stages.items() if stage != "inner")
        return ms | {"all": (time.perf_counter() - begin) * 1000}

    sides = {"sequential": False, "overlapped": True}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with patched(model, config):
        for turn in range(repeats + 1):
            for name in list(sides) if turn % 2 == 0 else reversed(list(sides)):
                say(f"first token, {name}", turn, repeats + 1)
                times = once(sides[name])
                if turn:
                    found[name].append(times)
    return {name: {stage: spread(t[stage] for t in times) for stage in times[0]} for name, times in found.items()}


def bench_gop(name: str, gop: int, **more: Any) -> dict[str, Any]:
    """`bench_case` of a file of a moment with a key frame every `gop` frames."""
    with tempfile.TemporaryDirectory() as folder:
        return bench_case(Path(folder) / f"{name}.mp4", gop, **more)


def run(
    output: str | Path | None,
    *,
    gops: dict[str, int] | None = None,
    repeats: int = 5,
    say: Callable[..., None] = print,
    **clip: Any,
) -> list[dict[str, Any]]:
    """Every kind of file; with `output`, one JSON each in that folder."""
    found = []
    for name, gop in (gops or GOPS).items():
        result = bench_gop(name, gop, repeats=repeats, say=say, **clip)
        found.append(result)
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=2) + "\n"
            (Path(output) / f"reading-{name}-gop-cpu.json").write_text(text, encoding="utf-8")
    return found


def reading_tables(results: list[dict[str, Any]]) -> list[Any]:
    """The results as two rich tables: files, and the way to the first token."""
    from rich.table import Table

    from .show import milliseconds_text

    about = results[0]["video"]
    files = Table(title=f"{about['frames']} frames of {about['seconds']} s, ms: median (range)", title_justify="left")
    tokens = Table(title="File to first token, embedded model, ms: median (range)", title_justify="left")
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
    for stage in results[0]["first_token"]["sequential"]:
        tokens.add_row(stage, *(milliseconds_text(way[stage]) for r in results for way in r["first_token"].values()))
    return [files, tokens]


def main() -> None:
    """The command line of `python -m holimerge.eval.bench_reading`."""
    from .show import Steps, stdout

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default=None, metavar="FOLDER", help="write one JSON per file into this folder")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.repeats < 1:
        parser.error("--repeats must be at least 1")
    with Steps() as say:
        results = run(given.output, repeats=given.repeats, say=say)
    for table in reading_tables(results):
        stdout().print(table)


if __name__ == "__main__":
    main()
