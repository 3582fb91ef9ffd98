"""The micro-benchmark behind the planner: a few seconds, once for each device and set of conditions.

What a prompt spends its time on is timed at a handful of sizes, written as transformers writes it: matrix products,
attention through the model's own attention implementation, norms, activations, rotary embedding, plain passes over
memory, received attention, the outer reduction itself. Two tiny models of the real class then tell what is left when
there is next to no arithmetic: what a layer and a stage cost by being launched.
"""

from __future__ import annotations

import contextvars
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from ..attention import received_attention, rotate
from ..registry import method_module
from ..shapes import shape_of
from ..timing import now, quiet_clock, reading
from ..tokens import Target, VideoTokens
from .device import Conditions, Device, Points, load_device, monotone, processor, save_device
from .predict import Clip, Prompt, Scheme, predict

_LOG = logging.getLogger("holimerge")
_KNOWN: dict[Conditions, Device] = {}  # of this process

EDGES = (64, 256, 1024, 2048)
ROWS = (1, 16, 128, 1024, 4096)
LENGTHS = (16, 64, 256, 1024, 3072)
WIDTHS = (64, 128)
HEADS = 4
ELEMENTS = tuple(2**p for p in (12, 15, 18, 20, 22, 23, 24))
PATCHES = (64, 256, 729)
UNITS = 8  # heads times frames of which received attention is timed
PASSES = 3  # over all sizes; the median of the passes counts
SAMPLE_MS = 4.0  # a sample repeats what is shorter
TOO_LONG_MS = 250.0  # what would take longer is left out: the table grows by its power
SPREAD_BYTES = 64 * 2**20  # more than a cache holds
_EDGE_OF_MAP = 27


class _Watch:
    """Times calls on a device, in passes over all of them, so that a busy second spoils one sample and not a size."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: dict[Any, Callable[[], Any]] = {}

    def once(self, call: Callable[[], Any], times: int) -> float:
        self.wait()
        begin = now()
        for _ in range(times):
            call()
        self.wait()
        return (now() - begin) * 1000 / times

    def wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize(self.device)

    def add(self, name: Any, call: Callable[[], Any]) -> float:
        """Note a call and run it once; returns about how long it takes."""
        call()
        self.calls[name] = call
        return self.once(call, 1)

    def medians(self, passes: int = PASSES) -> dict[Any, float]:
        """Milliseconds of every call that was added; forgets them."""
        times = {name: max(1, math.ceil(SAMPLE_MS / max(1e-3, self.once(c, 1)))) for name, c in self.calls.items()}
        samples: dict[Any, list[float]] = {name: [] for name in self.calls}
        for _ in range(passes):
            for name, call in self.calls.items():
                samples[name].append(self.once(call, min(times[name], 200)))
        self.calls.clear()
        return {name: statistics.median(found) for name, found in samples.items()}


def conditions_of(device: Any, dtype: torch.dtype, attention: str) -> Conditions:
    """What the times of a device hold under, as this process is set up."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return Conditions(
        device=torch.cuda.get_device_name(device) if cuda else processor(),
        kind=device.type,
        dtype=str(dtype).removeprefix("torch."),
        attention=attention,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def calibrated(
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    *,
    method: str | None = "holitom",
    again: bool = False,
) -> Device:
    """The device's tables: of this process, of the cache on disk, or measured now (seconds; a line is logged).

    Args:
        device, dtype, attention: as the model runs.
        method: a reduction method whose times are needed, measured when first asked for.
        again: measure although there is a cached one.
    """
    key = conditions_of(device, dtype, attention)
    found = None if again else _KNOWN.get(key) or load_device(key)
    missing = found is None or (method is not None and method not in found.reduction)
    if found is None:
        _LOG.warning("measuring %s (%s, %s, %d threads), once; seconds", key.device, key.dtype, attention, key.threads)
    if missing:
        # a context of its own: this may run inside a forward of a patched model, whose hooks look into theirs
        found = contextvars.Context().run(_measure, torch.device(device), dtype, key, found, method)
        save_device(found)
    assert found is not None
    _KNOWN[key] = found
    return found


def _measure(
    where: torch.device, dtype: torch.dtype, key: Conditions, old: Device | None, method: str | None
) -> Device:
    begin = time.perf_counter()
    with _steady(where):
        found = old or _primitives(where, dtype, key)
        if method is not None and method not in found.reduction:
            fitted = _reduction(where, dtype, method)
            found = replace(found, reduction={**found.reduction, method: fitted})
        if old is None:
            found = replace(found, overhead=_overheads(where, dtype, found))
    return replace(found, seconds=round(found.seconds + time.perf_counter() - begin, 3))


@contextmanager
def _steady(where: torch.device) -> Iterator[None]:
    """No gradients, no autocast, the quietest clock, and the caller's random state untouched."""
    forked = [where] if where.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.autocast(where.type, enabled=False),
        torch.random.fork_rng(devices=forked),
        reading(quiet_clock(where)),
    ):
        torch.manual_seed(0)
        yield


def _primitives(where: torch.device, dtype: torch.dtype, key: Conditions) -> Device:
    make = partial(torch.randn, device=where, dtype=dtype)
    watch = _Watch(where)
    _matmuls(watch, make)
    matmul = watch.medians()
    _attentions(watch, make, key.attention)
    attention = watch.medians()
    _elementwise(watch, make)
    elementwise = watch.medians()
    _received(watch, make)
    received = watch.medians()
    convolution = _convolutions(watch, make)
    found = Device(
        conditions=key,
        matmul=tuple((float(edge), _points(matmul, edge)) for edge in EDGES if _points(matmul, edge)),
        attention={
            name: monotone([(n, max(1e-6, ms / HEADS)) for n, ms in _points(attention, name)])
            for name in dict.fromkeys(name for name, _ in attention)
        },
        elementwise={name: _points(elementwise, name) for name in dict.fromkeys(name for name, _ in elementwise)},
        received=monotone([(n, ms / UNITS) for n, ms in _points(received, "received")]),
    )
    rows, inner, outer = _CONVOLVED
    product = found.matmul_ms(rows, inner, outer)
    return replace(found, overhead={name: ms / product for name, ms in convolution.items()})


def _points(found: dict[Any, float], name: Any) -> Points:
    return monotone([(size, ms) for (of, size), ms in found.items() if of == name])


def _matmuls(watch: _Watch, make: Callable[..., Tensor]) -> None:
    """Each call takes another weight, as the layers of a model do: none is found in a cache."""
    for edge in EDGES:
        count = min(64, math.ceil(SPREAD_BYTES / (edge * edge * make(1).element_size())))
        weights = itertools.cycle(make(count, edge, edge))
        last = 0.0
        for rows in ROWS:
            if last * rows / ROWS[max(0, ROWS.index(rows) - 1)] > TOO_LONG_MS:
                break
            x = make(rows, edge)
            last = watch.add((edge, rows), partial(_linear, x, weights))


def _linear(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return functional.linear(x, next(weights))


def _attentions(watch: _Watch, make: Callable[..., Tensor], implementation: str) -> None:
    """One prompt of HEADS heads, as the models hand it over: heads inside, transposed."""
    run = attention_function(implementation)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=False, config=None, layer_idx=0)
    for causal in (True, False):
        for width in WIDTHS:
            last = 0.0
            for length in LENGTHS:
                if last * 16 > 4 * TOO_LONG_MS:
                    break
                q, k, v = (make(1, length, HEADS, width).transpose(1, 2) for _ in range(3))
                mask = None
                if implementation == "eager" and causal:
                    mask = torch.full((1, 1, length, length), -math.inf, device=q.device, dtype=q.dtype).triu(1)
                scaling = width**-0.5
                call = partial(run, module, q, k, v, mask, dropout=0.0, scaling=scaling, is_causal=causal)
                last = watch.add((f"{'causal' if causal else 'full'}-{width}", length), call)


def attention_function(implementation: str) -> Callable[..., Any]:
    """transformers' function of that name."""
    if implementation == "eager":
        from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

        return eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
    return found


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _silu_mul(x: Tensor, y: Tensor) -> Tensor:
    return functional.silu(x) * y


def _pool(x: Tensor) -> Tensor:
    """LLaVA-OneVision's pooling. x: [T, 729, D]."""
    maps = x.view(x.shape[0], _EDGE_OF_MAP, _EDGE_OF_MAP, -1).permute(0, 3, 1, 2).contiguous()
    half = math.ceil(_EDGE_OF_MAP / 2)
    return functional.interpolate(maps, size=[half, half], mode="bilinear").permute(0, 2, 3, 1).reshape(-1, x.shape[2])


def _elementwise(watch: _Watch, make: Callable[..., Tensor], width: int = 512, head: int = 64) -> None:
    weight, bias = make(width), make(width)
    longest: dict[str, float] = {}
    for elements in ELEMENTS:
        rows = max(1, elements // width)
        x, y = make(rows, width), make(rows, width)
        heads = x.view(1, rows, width // head, head).transpose(1, 2)
        fused = make(rows, 3, width // head, head)[:, 0]
        cos, sin = make(1, 1, rows, head), make(1, 1, rows, head)
        calls: dict[str, Callable[[], Any]] = {
            "add": partial(torch.add, x, y),
            "copy": x.clone,
            "rmsnorm": partial(_rms_norm, x, weight),
            "layernorm": partial(functional.layer_norm, x, (width,), weight, bias),
            "gelu": partial(functional.gelu, x, approximate="tanh"),
            "silu_mul": partial(_silu_mul, x, y),
            "rotary": partial(rotate, heads, cos, sin),
            "rotary_fused": partial(rotate, fused, cos[0, 0, :, None], sin[0, 0, :, None]),
            "transpose": partial(heads.clone, memory_format=torch.contiguous_format),
        }
        for name, call in calls.items():
            if longest.get(name, 0.0) * 2 < TOO_LONG_MS / 4:
                longest[name] = watch.add((name, elements), call)
    for frames in (1, 8):
        for depth in (64, 1024):
            maps = make(frames, _EDGE_OF_MAP**2, depth)
            watch.add(("pool", maps.numel()), partial(_pool, maps))


def _received(watch: _Watch, make: Callable[..., Tensor], width: int = 64) -> None:
    for patches in PATCHES:
        q, k = make(UNITS, 1, patches, width), make(UNITS, 1, patches, width)
        watch.add(("received", patches), partial(received_attention, q, k, 0.125))


_CONVOLVED = (1024, 1176, 256)  # patches, values of a patch, width


def _convolutions(watch: _Watch, make: Callable[..., Tensor]) -> dict[str, float]:
    """Patch embeddings, flat (LLaVA) and of two frames (Qwen), of as many multiplications as `_CONVOLVED`."""
    rows, _, width = _CONVOLVED
    images, flat = make(4, 3, 14 * 16, 14 * 32), make(width, 3, 14, 14)
    patches, deep = make(rows, 3, 2, 14, 14), make(width, 3, 2, 14, 14)
    watch.add("convolution_2", lambda: functional.conv2d(images, flat, stride=14))
    watch.add("convolution_3", lambda: functional.conv3d(patches, deep, stride=(2, 14, 14)))
    return watch.medians()


def _reduction(where: torch.device, dtype: torch.dtype, method: str) -> tuple[float, ...]:
    """(constant, per frame, per token, per feature value): the best of them with no negative one, by relative error."""
    found = method_module(method).METHOD
    assert found.reduce is not None
    assert found.options is not None
    options, watch = found.options(), _Watch(where)
    terms: list[tuple[float, ...]] = []
    for frames, side, width in ((4, 4, 64), (4, 14, 256), (16, 14, 64), (16, 14, 1024), (48, 14, 256), (16, 6, 256)):
        tokens = _scenes(frames, side * side, width, where, dtype)
        total = frames * side * side
        target = Target(max(1, total // 8), 0.125)
        watch.add(len(terms), partial(found.reduce, tokens, target, options))
        terms.append((1.0, frames, total, total * width))
    times = watch.medians()
    return _positive_fit(np.array(terms, dtype=float), np.array([times[i] for i in range(len(terms))]))


def _scenes(frames: int, per_frame: int, width: int, where: torch.device, dtype: torch.dtype) -> VideoTokens:
    """Two still scenes in whose second half of the tokens every frame is new."""
    base = torch.randn(2, per_frame, width, device=where, dtype=dtype)
    x = base[torch.arange(frames, device=where) * 2 // frames].clone()
    x[:, per_frame // 2 :] = torch.randn(frames, per_frame - per_frame // 2, width, device=where, dtype=dtype)
    return VideoTokens(x, torch.rand(frames, per_frame, device=where))


def _positive_fit(terms: Any, times: Any) -> tuple[float, ...]:
    """Least squares of the relative error with coefficients of at least 0: the best subset of the columns."""
    scaled = terms / times[:, None]
    size = np.linalg.norm(scaled, axis=0)
    best, found = math.inf, np.zeros(terms.shape[1])
    for subset in range(1, 2 ** terms.shape[1]):
        columns = [c for c in range(terms.shape[1]) if subset >> c & 1]
        solved = np.linalg.lstsq(scaled[:, columns] / size[columns], np.ones(len(times)), rcond=None)[0] / size[columns]
        error = float(np.square(scaled[:, columns] @ solved - 1).sum())
        if (solved >= 0).all() and error < best - 1e-12:
            best, found = error, np.zeros(terms.shape[1])
            found[columns] = solved
    return tuple(float(x) for x in found)


# ---------------------------------------------------------------------- what is left without arithmetic


def _tiny(layers: int) -> Any:
    """A LLaVA-OneVision of next to no arithmetic."""
    from transformers import LlavaOnevisionConfig

    vision = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    vision |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config={**text, "max_position_embeddings": 256},
        video_token_index=5,
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[28, 28]],
        tie_word_embeddings=False,
    )


def _overheads(where: torch.device, dtype: torch.dtype, device: Device) -> dict[str, float]:
    """Time of tiny models, by stage and layer, less what the tables say about their arithmetic."""
    implementation = device.conditions.attention
    from transformers import AutoModelForImageTextToText

    few, many, frames = 2, 8, 2
    found = {}
    for layers in (few, many):
        config = _tiny(layers)
        with torch.device(where):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=implementation)
        model.generation_config.pad_token_id = 0
        model.generation_config.suppress_tokens = [4, 5]
        found[layers] = (shape_of(config), _tiny_stages(model.eval(), where, dtype, frames))
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


def _tiny_stages(model: Any, where: torch.device, dtype: torch.dtype, frames: int) -> dict[str, float]:
    """Median milliseconds by stage of a patched tiny model; `other` is what no stage covers."""
    from ..api import last_report, patch_model

    ids = torch.tensor([[1, 2, *[5] * (frames + 1), 3]], device=where)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values_videos"] = torch.randn(1, frames, 3, 28, 28, device=where, dtype=dtype)
    outer = {"similarity": 0.8, "at": "projector_input"}
    patch_model(
        model, {"method": "holitom", "budget": {"tokens": 1}, "outer": outer, "inner": {"layer": 1, "retain": 0.5}}
    )
    watch, runs = _Watch(where), []
    for _ in range(9):
        whole = watch.once(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False), 1)
        stages = last_report(model).milliseconds
        stages["other"] = whole - sum(ms for name, ms in stages.items() if name != "inner")
        runs.append(stages)
    return {name: statistics.median(run.get(name, 0.0) for run in runs[2:]) for name in runs[-1]}
