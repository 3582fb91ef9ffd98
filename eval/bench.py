"""`holimerge bench`: one prompt with one video on a model of any size, unpatched against configurations, by stage.

Without a checkpoint the model has random weights, which change nothing about times and FLOPs. Needs neither PyAV nor a
tokenizer, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holimerge.config import load_config
from holimerge.preprocess import Settings, default_settings
from holimerge.registry import list_families
from holimerge.shapes import SHAPES, Shape, build_config, load_shape, shape_of
from holimerge.video_write import synthetic_clip

from .conditions import conditions
from .measure import gains, measure_cases
from .run import devices_of
from .small_shapes import SMALL
from .toy import describe, random_model, toy_config

# of the 7B shape in bf16 on a GPU, 32 frames, 10 %
AIMS = {"reduce_ms": 2.0, "share_of_ideal": 0.95, "inner_share": 0.01}
TIMESTAMP = 6  # tokens of <3.5 seconds>


def shape_config(name: str) -> tuple[Any, Shape | None]:
    """The Hugging Face config of `toy`, of a small or named shape, or of a folder with a config.json."""
    if name == "toy":
        return toy_config(), None
    shape = SMALL[name] if name in SMALL else load_shape(name)
    return build_config(shape), shape


def bench_inputs(
    config: Any, *, frames: int, text_tokens: int = 40, grid: tuple[int, int] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """The inputs of one prompt: random text around a drawn clip (two still scenes, a moving object, camera noise).

    config: of a supported family. frames: T. text_tokens: prompt tokens that are no video tokens. grid: patches
    (rows, columns) of a frame where the resolution is free.
    """
    vision = shape_of(config).vision
    rows, columns = vision.frame_grid(grid)
    side = (rows * vision.patch, columns * vision.patch)
    if vision.side is not None:
        side = (config.vision_config.image_size, config.vision_config.image_size)
    rng = np.random.default_rng(seed)
    clip = synthetic_clip(frames, *side, seed=seed).astype(np.int16)
    clip = np.clip(clip + rng.integers(-2, 3, size=clip.shape, dtype=np.int16), 0, 255).astype(np.uint8)
    settings = bench_settings(config)
    if config.model_type != "llava_onevision":  # the size is chosen here: keep it
        settings = replace(settings, min_pixels=1, max_pixels=side[0] * side[1])
    return prompt_around(settings.pixels(clip), config, frames=frames, text_tokens=text_tokens, grid=grid, rng=rng)


def bench_settings(config: Any) -> Settings:
    """Preprocessor settings for a model without a preprocessor file."""
    alike = {"qwen3_vl": "qwen2_5_vl"}  # the same patches, of another size, which the config says
    return default_settings(alike.get(config.model_type, config.model_type), config)


def prompt_around(
    pixels: dict[str, Tensor],
    config: Any,
    *,
    frames: int,
    text_tokens: int,
    grid: tuple[int, int] | None = None,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """One prompt of random text with a video in its middle.

    pixels: of `Settings.pixels`. frames, text_tokens, grid: as in `bench_inputs`. rng: draws the text.
    """
    shape = shape_of(config)
    vision = shape.vision
    tokens = vision.steps(frames) * vision.tokens_per_step(grid)
    separate = 1 if config.model_type == "llava_onevision" else 0
    names = ("video", "image", "vision_start", "vision_end", "eos", "bos", "pad")
    special = {getattr(config, f"{name}_token_id", None) for name in names}
    plain = [i for i in range(min(1000, shape.text.vocab)) if i not in special]
    words = rng.choice(plain, size=max(2, text_tokens)).tolist()
    around = ([config.vision_start_token_id], [config.vision_end_token_id]) if not separate else ([], [])
    half = max(1, (text_tokens - 2 * len(around[0])) // 2)
    rest = max(1, text_tokens - 2 * len(around[0]) - half)
    placeholders = [config.video_token_id] * (tokens + separate)
    if config.model_type == "qwen3_vl":  # a time before each step, which stands between markers of its own
        steps = vision.steps(frames)
        stamp = rng.choice(plain, size=TIMESTAMP).tolist()
        step = [*stamp, *around[0], *[config.video_token_id] * (tokens // steps), *around[1]]
        placeholders = step * steps
    row = [*words[:half], *around[0], *placeholders, *around[1], *words[-rest:]]
    ids = torch.tensor([row])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if not separate:
        inputs["mm_token_type_ids"] = (ids == config.video_token_id).long() * 2
        if config.model_type != "qwen3_vl":  # whose text says the times
            inputs["second_per_grid_ts"] = torch.tensor([1.0])
    return inputs


def bench_model(
    *,
    shape: str = "toy",
    model: str | None = None,
    frames: int | None = None,
    configs: Sequence[str] | Mapping[str, Any] = ("holitom-10", "holimerge-10"),
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    text_tokens: int = 40,
    warmup: int = 3,
    repeats: int = 5,
    new_tokens: int = 16,
    count: bool = False,
    seed: int = 0,
    say: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure one prompt unpatched and under each of `configs`.

    Args:
        shape: "toy", a name of `SMALL` or of `holimerge.shapes.SHAPES`, or a folder with a config.json: random weights.
        model: a checkpoint to load instead (hub id or folder).
        configs: presets or paths; or by name whatever `load_config` takes.
        frames: T; default that of the shape.
        dtype: "auto" (bfloat16 on a GPU, float32 elsewhere), "float32", "bfloat16" or "float16".
        device: for instance "cuda:0"; default a GPU if there is one.
        text_tokens, warmup, repeats, new_tokens, count, say: see `holimerge.eval.measure.measure_cases`.
        seed: of weights, clip and text.

    Returns:
        `shape`, `prompt`, `cases`, `gains`, `aims` (met or not, per configuration), `conditions`: ready for JSON.

    Raises:
        ValueError, ConfigError: an unknown shape, dtype, device or configuration; before a model is built.
        TypeError: a model of an unsupported family.
    """
    from .load import DTYPES, load, read_config

    named = configs if isinstance(configs, Mapping) else {str(name): name for name in configs}
    loaded = {name: load_config(cfg) for name, cfg in named.items()}
    if not loaded:
        raise ValueError("bench needs at least one configuration")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; valid: {', '.join(DTYPES)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is no device of torch: {str(error).splitlines()[0]}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r}, but this torch ({torch.__version__}) sees no CUDA device")
    kind = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if where.type == "cuda" else torch.float32
    known: Shape | None = None
    if model is None:
        config, known = shape_config(shape)
    else:
        config = read_config(model)
    if config.model_type not in list_families():
        supported = ", ".join(list_families())
        raise TypeError(f"{shape}: cannot patch model_type {config.model_type!r}; supported: {supported}")
    frames = frames or (known.frames if known is not None else 32)
    if frames < 1:
        raise ValueError(f"frames: {frames}; at least 1 is needed")
    grid = known.grid if known is not None else None
    if shape_of(config).vision.side is None and grid is None:
        grid = SHAPES["qwen2.5-vl-7b"].grid
    if say is not None:
        say("building the model", 0, 0)
    if model is None:
        built = random_model(config, device=where, dtype=kind, attn_implementation=attn_implementation, seed=seed)
    else:
        built = load(model, device_map=str(where), dtype=dtype, attn_implementation=attn_implementation).model

    def prompt_of(count: int) -> dict[str, Tensor]:
        made = bench_inputs(config, frames=count, text_tokens=text_tokens, grid=grid, seed=seed)
        moved = {key: value.to(where) for key, value in made.items()}
        return {**moved, "pixel_values_videos": moved["pixel_values_videos"].to(built.dtype)}

    inputs = prompt_of(frames)
    others = {name: prompt_of(frames * cfg.more_frames) for name, cfg in loaded.items() if cfg.more_frames > 1}
    cases = {"unpatched": None, **loaded}
    with _suppressed(built, config):
        found = measure_cases(
            built,
            inputs,
            cases,
            warmup=warmup,
            repeats=repeats,
            new_tokens=new_tokens,
            count=count,
            say=say,
            others=others,
        )
    depth = config.text_config.num_hidden_layers
    layers = {cfg.inner.resolve(depth) for cfg in loaded.values() if cfg.inner is not None}
    won = {name: gains(found["unpatched"], found[name]) for name in loaded}
    return {
        "kind": "model",
        "shape": model or shape,
        "weights": "random" if model is None else "checkpoint",
        "sizes": describe(config),
        "parameters": sum(p.numel() for p in built.parameters()),
        "prompt": {"frames": frames, "grid": list(grid) if grid else None, "text_tokens": text_tokens},
        "inner_layer": layers.pop() if len(layers) == 1 else None,
        "cases": found,
        "gains": won,
        "aims": {name: _aims(values) for name, values in won.items()},
        "ratios": {
            f"{name}, {label}": values[key]
            for name, values in won.items()
            for key, label in (("ttft_ratio", "first token"), ("share_of_ideal", "share of ideal"))
        },
        "conditions": conditions(
            where,
            dtype=str(built.dtype).removeprefix("torch."),
            attn=str(getattr(built.config, "_attn_implementation", None)),
            devices_used=max(1, len(devices_of(built))),
            seed=seed,
            warmup=warmup,
            repeats=repeats,
        ),
    }


def _aims(values: dict[str, float | None]) -> dict[str, Any]:
    reduce_ms, share = values["reduce_ms"] or 0.0, values["share_of_ideal"] or 0.0
    inner = values["inner_share"] or 0.0
    return {
        "reduce_ms": reduce_ms,
        f"at most {AIMS['reduce_ms']} ms": reduce_ms <= AIMS["reduce_ms"],
        "share_of_ideal": share,
        f"at least {AIMS['share_of_ideal']}": share >= AIMS["share_of_ideal"],
        "inner_share": inner,
        f"at most {AIMS['inner_share']}": inner <= AIMS["inner_share"],
    }


@contextlib.contextmanager
def _suppressed(model: Any, config: Any) -> Any:
    """A loaded model, asked about random text, must not write placeholders either."""
    before = model.generation_config.suppress_tokens
    model.generation_config.suppress_tokens = before or [config.video_token_id, config.image_token_id]
    try:
        yield
    finally:
        model.generation_config.suppress_tokens = before


def show_bench(result: dict[str, Any], console: Any) -> None:
    """Print a bench's result."""
    from .show import cases_table

    here, prompt = result["conditions"], result["prompt"]
    console.print(
        f"{result['shape']} ({result['weights']} weights, {result['parameters'] / 1e9:.3g} B parameters), "
        f"{prompt['frames']} frames; {here['device']}, {here['dtype']}, {here['attn']}\n{result['sizes']}",
        highlight=False,
    )
    title = f"Median (range) of {here['repeats']} runs after {here['warmup']} to warm up"
    console.print(cases_table(title, result["cases"], layer=result["inner_layer"]))
    for name, values in result["aims"].items():
        console.print(
            f"{name}: reduction {values['reduce_ms']:.2f} ms; {100 * values['share_of_ideal']:.1f} % of the gain there "
            "would be if reducing and splicing were free",
            highlight=False,
        )
