"""Models of next to no arithmetic: what a stage, a layer and a call cost by being launched.

They are of the real classes. On a CPU one of them tells what the tables leave out. On a GPU the host alone takes the
time there, which depends on no size, so that the differences of a few such prompts are what each thing takes to issue.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..shapes import ModelShape, shape_of
from .device import Device
from .predict import STAGES, Clip, Prompt, Scheme, flow_name, predict
from .watch import Watch

RUNS = 9  # of every prompt, of which the first WARM do not count
WARM = 2
LAYERS = (4, 24)  # of the two models of a class; real ones have about as many as the second
STEPS = (2, 6)  # of the two videos; a frame is one span of the tower
CELLS = (4, 4)  # patches of a frame where the resolution is free: one window
EDGE = 56  # of a frame in pixels where it is not: as many patches
MORE_CELLS = (6, 4)  # windows of two lengths
_IMAGE, _VIDEO, _BEGIN, _END = 4, 5, 6, 7
_IDS = {
    "video_token_id": _VIDEO,
    "image_token_id": _IMAGE,
    "vision_start_token_id": _BEGIN,
    "vision_end_token_id": _END,
}


def llava_config(layers: int, kind: str = "llava_onevision", edge: int = 28) -> Any:
    """A LLaVA-OneVision of next to no arithmetic. edge: of a frame in pixels, 14 of which are a patch."""
    from transformers import AutoConfig

    if kind == "llava_video":
        from .. import llava_video  # noqa: F401, registers it

    vision = {"model_type": "siglip_vision_model", "image_size": edge, "patch_size": 14, "vision_use_head": False}
    vision |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoConfig.for_model(
        kind,
        vision_config=vision,
        text_config={**text, "max_position_embeddings": 256},
        video_token_index=_VIDEO,
        image_token_index=_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[edge, edge]],
        tie_word_embeddings=False,
    )


def qwen_config(layers: int, kind: str, shape: ModelShape) -> Any:
    """A Qwen2.5-VL or Qwen3-VL of next to no arithmetic, with as many projectors as the real one."""
    from transformers import AutoConfig

    vision: dict[str, Any] = {"depth": layers, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    vision |= {"out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2}
    text: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "qwen3_vl":
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": list(range(shape.vision.projectors - 1))}
        sections = [4, 2, 2]
    else:
        vision |= {"fullatt_block_indexes": list(range(layers)), "window_size": 14 * CELLS[0]}
        sections = [2, 3, 3]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return AutoConfig.for_model(kind, vision_config=vision, text_config=text, tie_word_embeddings=False, **_IDS)


def build(config: Any, where: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """The real class with random weights, which never writes a placeholder."""
    from transformers import AutoModelForImageTextToText

    with torch.device(where):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [_IMAGE, _VIDEO, _BEGIN, _END]
    return model.eval()


def llava_inputs(config: Any, frames: int, where: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A prompt of `frames` frames."""
    edge, side = config.vision_config.image_size, shape_of(config).vision.pooled
    assert side is not None
    newlines = frames * side if config.model_type == "llava_video" else 1
    ids = torch.tensor([[1, 2, *[_VIDEO] * (frames * side**2 + newlines), 3]], device=where)
    pixels = torch.randn(1, frames, 3, edge, edge, device=where, dtype=dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}


def qwen_inputs(
    config: Any, steps: int, cells: tuple[int, int], where: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A prompt of `steps` temporal steps of `cells` patches."""
    v, tokens = config.vision_config, cells[0] * cells[1] // config.vision_config.spatial_merge_size**2
    if config.model_type == "qwen3_vl":  # each step after its time
        video = [token for _ in range(steps) for token in (3, _BEGIN, *[_VIDEO] * tokens, _END)]
    else:
        video = [_BEGIN, *[_VIDEO] * (steps * tokens), _END]
    ids = torch.tensor([[1, 2, *video, 3]], device=where)
    values = v.in_channels * v.temporal_patch_size * v.patch_size**2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == _VIDEO).long() * 2}
    inputs["pixel_values_videos"] = torch.randn(steps * cells[0] * cells[1], values, device=where, dtype=dtype)
    inputs["video_grid_thw"] = torch.tensor([[steps, *cells]], device=where)
    if config.model_type != "qwen3_vl":
        inputs["second_per_grid_ts"] = torch.tensor([1.0], device=where)
    return inputs


def stages(model: Any, inputs: Mapping[str, Tensor], where: torch.device, cfg: Any = None) -> dict[str, float]:
    """Median milliseconds by stage of a prompt, stock or patched with `cfg`; `other` is what no stage covers."""
    from ..api import last_report, merging
    from .stock import watched

    watch, runs = Watch(where), []

    def run() -> None:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    with nullcontext() if cfg is None else merging(model, cfg):
        for _ in range(RUNS):
            with nullcontext() if cfg is not None else watched(model) as clock:
                whole = watch.whole(run)
            times = last_report(model).milliseconds if clock is None else clock.milliseconds()
            runs.append({**times, "other": whole - sum(ms for name, ms in times.items() if name != "inner")})
    return {name: statistics.median(run.get(name, 0.0) for run in runs[WARM:]) for name in runs[-1]}


# ---------------------------------------------------------------------- a CPU


def overheads(where: torch.device, dtype: torch.dtype, device: Device) -> dict[str, float]:
    """Time of tiny models, by stage and layer, less what the tables say about their arithmetic."""
    few, many, frames = 2, 8, 2
    cfg = patched_with(1, tokens=1)
    found = {}
    for layers in (few, many):
        config = llava_config(layers)
        model = build(config, where, dtype, device.conditions.attention)
        found[layers] = (shape_of(config), stages(model, llava_inputs(config, frames, where, dtype), where, cfg))
    overhead = dict(device.overhead)
    scheme = Scheme("holitom", "projector_input", 1, 0.5)
    expected = {}
    for layers in (few, many):
        prompt = Prompt(found[layers][0], (Clip(frames),), 4)
        expected[layers] = predict(prompt, device, scheme, 1)
    for stage, layer in (("vision", "tower_layer"), ("prefill", "decoder_layer")):
        slope, known = (
            (of[many] - of[few]) / (many - few)
            for of in (
                {n: found[n][1][stage] for n in found},
                {n: expected[n][stage] for n in found},
            )
        )
        overhead[layer] = max(0.0, slope - known)
    for stage in ("vision", "project", "splice", "prefill", "other"):
        left = found[few][1][stage] - expected[few][stage]
        left -= few * overhead.get({"vision": "tower_layer", "prefill": "decoder_layer"}.get(stage, ""), 0.0)
        overhead[stage] = max(0.0, left)
    overhead["inner"] = found[few][1]["inner"]
    overhead["prefill"] = max(0.0, overhead["prefill"] - overhead["inner"])
    return overhead


def patched_with(layer: int, *, tokens: int, encoder: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration whose stages are timed. tokens: that enter. layer: of the inner merge."""
    outer = {"similarity": 0.8, "at": "projector_input"}
    inner = {"layer": layer, "retain": 0.5}
    return {"method": "holitom", "budget": {"tokens": tokens}, "outer": outer, "inner": inner, "encoder": encoder}


# ---------------------------------------------------------------------- the host of a GPU


def host_times(
    where: torch.device, dtype: torch.dtype, device: Device, shape: ModelShape
) -> dict[str, dict[str, float]]:
    """What the host takes to issue a prompt of such a model, stock and patched, as `Device.host` has it.

    Per flow: `vision`, `prefill` (each once), `tower_layer`, `decoder_layer`, `attention_call` (of one span more in
    the tower), `other`; patched also `reduce` (what its own table leaves out), `project`, `splice`, `inner` and
    `merging` (of tokens, in a block of the tower).
    """
    kind, attention = shape.model_type, device.conditions.attention
    square, windowed = shape.vision.side is not None, bool(shape.vision.window)
    few, many = LAYERS
    found: dict[str, dict[int, dict[str, float]]] = {"stock": {}, "patched": {}}
    calls = dict.fromkeys(found, 0.0)
    merging = 0.0
    cfg = patched_with(few - 1, tokens=4)
    for layers in LAYERS:
        config = llava_config(layers, kind, EDGE) if square else qwen_config(layers, kind, shape)
        model = build(config, where, dtype, attention)

        def inputs(steps: int = STEPS[0], cells: tuple[int, int] = CELLS, config: Any = config) -> dict[str, Tensor]:
            if square:
                return llava_inputs(config, steps, where, dtype)
            return qwen_inputs(config, steps, cells, where, dtype)

        found["stock"][layers] = stages(model, inputs(), where)
        found["patched"][layers] = stages(model, inputs(), where, cfg)
        if layers == few:
            continue
        base = {flow: times[layers]["vision"] for flow, times in found.items()}
        if not square:
            longer = stages(model, inputs(STEPS[1]), where)["vision"]
            calls["stock"] = max(0.0, longer - base["stock"]) / (layers * (STEPS[1] - STEPS[0]))
        more = stages(model, inputs(), where, {**cfg, "encoder": {"tokens": {"r": 1}}})["vision"]
        merging = max(0.0, more - base["patched"]) / layers
        if windowed:
            model.model.visual.fullatt_block_indexes = []
            one, two = (stages(model, inputs(cells=cells), where, cfg)["vision"] for cells in (CELLS, MORE_CELLS))
            calls["patched"] = max(0.0, two - one) / layers
    host = {}
    for flow, times in found.items():
        host[flow_name(kind, stock=flow == "stock")] = {**split_layers(times, few, many), "attention_call": calls[flow]}
    stock, patched = host.values()
    # a stock tower's block goes through its spans one by one; here there were STEPS[0]
    stock["tower_layer"] = max(0.0, stock["tower_layer"] - STEPS[0] * calls["stock"])
    patched["merging"] = merging
    per_step = shape_of(config).vision.tokens_per_step(None if square else CELLS)
    width = shape_of(config).vision.decision_width
    patched["reduce"] = max(0.0, patched["reduce"] - device.reduce_ms("holitom", STEPS[0], per_step, width))
    return host


def split_layers(times: Mapping[int, Mapping[str, float]], few: int, many: int) -> dict[str, float]:
    """Stages of two models of `few` and `many` layers as what a layer takes and what is left without layers."""
    found = {stage: times[few].get(stage, 0.0) for stage in (*STAGES, "inner")}
    for stage, layer in (("vision", "tower_layer"), ("prefill", "decoder_layer")):
        found[layer] = max(0.0, times[many][stage] - times[few][stage]) / (many - few)
        found[stage] = max(0.0, found[stage] - few * found[layer])
    found["prefill"] = max(0.0, found["prefill"] - found["inner"])
    # stages that layers have no part in were timed twice
    for stage in ("reduce", "project", "splice", "other", "inner"):
        found[stage] = statistics.mean(t.get(stage, 0.0) for t in times.values())
    return found


__all__ = ["host_times", "overheads", "split_layers", "stages"]
