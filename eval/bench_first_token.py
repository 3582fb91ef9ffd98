"""The way from a video file to a model's first token, stage by stage, for `holimerge.eval.bench_reading`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from holimerge.api import last_report
from holimerge.config import Config, load_config
from holimerge.inputs import build_inputs
from holimerge.preprocess import Settings
from holimerge.reading import read_pixels
from holimerge.video import Video, read_video

from .bench import bench_settings, prompt_around, shape_config
from .load import load, to_model
from .measure import spread
from .run import patched, run_once
from .tiny import BUDGETS, CHECKPOINT
from .toy import random_model

QUESTION = "What happens in the video?"
PRESET = "holimerge-10"
WAYS = ("one after the other", "overlapped", "encoded while read")
STAGES = ("read", "inputs", "vision", "reduce", "project", "splice", "prefill", "other", "all")


class Asked(NamedTuple):
    """A model that is asked about a file.

    ask: from a video and its pixels on the model's device (None: of its frames, made here) to the model's inputs.
    sides: name -> how it is read (one of `WAYS`), and the configuration (None: unpatched), in order.
    """

    name: str
    model: Any
    settings: Settings
    dtype: str
    ask: Callable[[Video, Any], dict[str, Any]]
    sides: dict[str, tuple[str, Config | None]]


def embedded_model() -> Asked:
    """The embedded model at 15 % of the tokens."""
    model, tokenizer, settings, template = load(CHECKPOINT, dtype="float32", device_map="cpu")
    config = load_config(next(path for path in BUDGETS if path.endswith("-15.yaml")))

    def ask(video: Video, pixels: Any) -> dict[str, Any]:
        inputs = build_inputs(
            QUESTION,
            video,
            config=model.config,
            tokenizer=tokenizer,
            settings=settings,
            chat_template=template,
            pixels=None if pixels is None else [pixels],
        )
        return to_model(inputs, model)

    return Asked("embedded model", model, settings, "float32", ask, {way: (way, config) for way in WAYS})


def random_weights(shape: str, device: str) -> Asked:
    """A model of a named shape with random weights: a prompt of random text, unpatched and reduced to 10 %."""
    config, _ = shape_config(shape)
    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = random_model(config, device=where, dtype=dtype)
    settings = bench_settings(config)

    def ask(video: Video, pixels: Any) -> dict[str, Any]:
        pixels = settings.pixels(video.frames) if pixels is None else pixels
        grid = pixels.get("video_grid_thw")
        rows = None if grid is None else (int(grid[0, 1]), int(grid[0, 2]))
        rng = np.random.default_rng(0)
        made = prompt_around(pixels, config, frames=len(video.frames), text_tokens=40, grid=rows, rng=rng)
        return to_model(made, model)

    preset = load_config(PRESET)
    sides: dict[str, tuple[str, Config | None]] = {
        f"{name}, {way}": (way, cfg)
        for name, cfg, ways in (("unpatched", None, WAYS[:2]), (PRESET, preset, WAYS))
        for way in ways
    }
    return Asked(f"{shape}, random weights", model, settings, str(dtype).removeprefix("torch."), ask, sides)


def first_token(
    asked: Asked, path: str, frames: int, repeats: int, say: Callable[..., None]
) -> dict[str, dict[str, dict[str, float]]]:
    """From the file to the first token, every side in turns after a run of each that does not count.

    One after the other: decoded in one thread, preprocessed on the host, sent to the device; once on a GPU, whose time
    is dear. Overlapped: `read_pixels` to the model's device and dtype. Encoded while read: the same given the model, so
    that `read` holds the vision tower too.

    Returns:
        ms by side and stage: of `STAGES` those that it has, `all` last (median, min, max, p90, n).
    """
    model, device = asked.model, asked.model.device

    def once(way: str) -> dict[str, float]:
        begin = time.perf_counter()
        pixels = None
        if way == WAYS[0]:
            video = read_video(path, frames=frames, threads=1)
        else:
            tower = model if way == WAYS[2] else None
            video, pixels = read_pixels(
                path, asked.settings, frames=frames, device=device, dtype=model.dtype, model=tower
            )
        read = time.perf_counter()
        inputs = asked.ask(video, pixels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        built = time.perf_counter()
        run = run_once(model, inputs, memory=False)
        end = time.perf_counter()
        assert way != WAYS[2] or last_report(model).ahead
        ms = {"read": (read - begin) * 1000, "inputs": (built - read) * 1000}
        ms |= {stage: value for stage, value in run.stages.items() if stage in STAGES}
        ms["other"] = (end - built) * 1000 - sum(value for stage, value in run.stages.items() if stage in STAGES)
        ms["all"] = (end - begin) * 1000
        return {stage: ms[stage] for stage in STAGES if stage in ms}

    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked.sides}
    for turn in range(repeats + 1):
        for name in list(found) if turn % 2 == 0 else reversed(list(found)):
            way, config = asked.sides[name]
            if way == WAYS[0] and turn > 1 and device.type == "cuda":
                continue
            say(f"first token, {name}", turn, repeats + 1)
            with patched(model, config):
                times = once(way)
            if turn:
                found[name].append(times)
    return {name: {stage: spread(t[stage] for t in times) for stage in times[0]} for name, times in found.items()}
