"""`holimerge demo`: from a real H.264 file to an answer, unpatched and patched, with every number of the way."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTION = "what moves in the video?"
CONFIGS = ("holitom-10", "holimerge-10")


def run_demo(
    *,
    frames: int = 32,
    configs: tuple[str, ...] = CONFIGS,
    repeats: int = 3,
    new_tokens: int = 8,
    threads: int | None = 1,
    quick: bool = False,
    say: Callable[..., None] = lambda *_: None,
) -> dict[str, Any]:
    """Make a video, decode it, ask a model with random weights about it, unpatched and under each of `configs`.

    Args:
        frames: frames taken of the video, which has twice as many.
        repeats: measured runs of each case, after one that warms up.
        new_tokens: decoding steps timed.
        threads: of torch, while it runs; None leaves them.
        quick: a tiny model, for tests.
        say: told what is going on.

    Returns:
        `video`, `model`, `cases` (see `holimerge.eval.measure`), `before` (decode and preprocess in ms), `answers`,
        `gains` per configuration and `conditions`, ready for JSON.

    Raises:
        ImportError: PyAV is not installed.
        ConfigError, ValueError: a configuration or number that cannot be used.
    """
    import torch

    from holimerge.config import load_config
    from holimerge.inputs import build_inputs
    from holimerge.preprocess import default_settings
    from holimerge.video import read_video, synthetic_clip, write_video

    from .conditions import conditions
    from .measure import gains, measure_cases, spread
    from .toy import SPECIAL, describe, random_model, toy_config, toy_tokenizer

    loaded = {name: load_config(name) for name in configs}
    before_threads = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        say("writing a video")
        config, tokenizer = toy_config(quick), toy_tokenizer()
        settings = default_settings(config.model_type, config)
        height, width = (96, 128) if quick else (360, 640)
        times: dict[str, list[float]] = {"decode": [], "preprocess": []}
        with tempfile.TemporaryDirectory() as folder:
            path = write_video(Path(folder) / "demo.mp4", synthetic_clip(2 * frames, height, width), fps=15, gop=30)
            size = Path(path).stat().st_size
            for _ in range(1 + repeats):
                say("decoding and preprocessing")
                begin = time.perf_counter()
                video = read_video(path, frames=frames)
                middle = time.perf_counter()
                settings.pixels(video.frames)
                end = time.perf_counter()
                times["decode"].append((middle - begin) * 1000)
                times["preprocess"].append((end - middle) * 1000)
        say("building the model")
        model = random_model(config)
        model.generation_config.suppress_tokens = list(range(len(SPECIAL)))  # words only
        inputs = build_inputs(QUESTION, video, config=config, tokenizer=tokenizer, settings=settings)
        cases = {"unpatched": None, **loaded}
        found = measure_cases(model, inputs, cases, warmup=1, repeats=repeats, new_tokens=new_tokens, say=say)
        answers = {name: tokenizer.decode(r["answer"][0], skip_special_tokens=True) for name, r in found.items()}
        result = {
            "kind": "demo",
            "question": QUESTION,
            "video": {
                "codec": "h264",
                "bytes": size,
                "frames_in_file": video.total_frames,
                "frames_taken": len(video.frames),
                "height": height,
                "width": width,
            },
            "model": {"weights": "random", "shape": describe(config), "parameters": sum_parameters(model)},
            "before": {name: spread(values[1:]) for name, values in times.items()},
            "cases": found,
            "answers": answers,
            "gains": {name: gains(found["unpatched"], found[name]) for name in configs},
            "inner_layer": next(
                (c.inner.resolve(config.text_config.num_hidden_layers) for c in loaded.values() if c.inner), None
            ),
            "conditions": conditions("cpu", dtype="float32", attn=_attention(model), seed=0, repeats=repeats, warmup=1),
        }
    finally:
        torch.set_num_threads(before_threads)
    return result


def show_demo(result: dict[str, Any], console: Any) -> None:
    """Print a demo's result: what was run, the answers, one table."""
    from .show import cases_table

    video, model = result["video"], result["model"]
    console.print(
        f"Video: H.264, {video['width']} x {video['height']}, {video['frames_in_file']} frames, "
        f"{video['bytes'] / 1e3:.0f} kB, made here; {video['frames_taken']} frames taken of it.",
        highlight=False,
    )
    console.print(
        f"Model: a real Hugging Face class with [bold]RANDOM weights[/] (nothing was trained, nothing downloaded), "
        f"{model['parameters'] / 1e6:.1f} M parameters.\n       {model['shape']}.",
        highlight=False,
    )
    console.print(f"Question: {result['question']}", highlight=False)
    for name, answer in result["answers"].items():
        console.print(f"  {name}: {answer!r}", highlight=False, markup=False)
    console.print("  (random weights write random words: the numbers below are what the demo is about)\n", style="dim")
    table = cases_table(
        "One question, one video: unpatched and patched",
        result["cases"],
        before=result["before"],
        layer=result["inner_layer"],
    )
    console.print(table)
    here = result["conditions"]
    console.print(
        f"Median (range) of {here['repeats']} runs after {here['warmup']} warm-up, cases taking turns; "
        f"{here['device']}, {here['threads']} thread(s), {here['dtype']}, {here['attn']}, "
        f"torch {here['versions']['torch']}, transformers {here['versions']['transformers']}.\n"
        "Unpatched, vision includes the projector. FLOPs: multiply-adds times two, every stage counted.",
        style="dim",
        highlight=False,
    )


def sum_parameters(model: Any) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def _attention(model: Any) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "sdpa")
