"""The tables of the micro-benchmark: what transformers' operations take at a handful of sizes, one kind a function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..attention import received_attention, rotate
from ..registry import method_module
from ..shapes import VisionShape
from ..tokens import Target, VideoTokens
from .device import Points, monotone
from .watch import Watch

Make = Callable[..., Tensor]  # random, of a shape


class Sizes(NamedTuple):
    """At which sizes a device is timed.

    edges, rows: of matrix products. lengths: of attention. elements: of passes. patches: of received attention, for
    `units` heads times frames. pooled: (frames, width). reduced: (frames, edge of the token grid, width). full_rows:
    heads times length that fill a GPU. spread: bytes of weights that take turns, more than a cache holds.
    """

    edges: tuple[int, ...]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    elements: tuple[int, ...]
    patches: tuple[int, ...]
    units: int
    pooled: tuple[tuple[int, int], ...]
    reduced: tuple[tuple[int, int, int], ...]
    full_rows: int | None = None
    spread: int = 64 * 2**20


CPU = Sizes(
    edges=(64, 256, 1024, 2048),
    rows=(1, 16, 128, 1024, 4096),
    lengths=(16, 64, 256, 1024, 3072),
    elements=tuple(2**p for p in (12, 15, 18, 20, 22, 23, 24)),
    patches=(64, 256, 729),
    units=8,
    pooled=((1, 64), (1, 1024), (8, 64), (8, 1024)),
    reduced=((4, 4, 64), (4, 14, 256), (16, 14, 64), (16, 14, 1024), (48, 14, 256), (16, 6, 256)),
)
GPU = Sizes(
    edges=(256, 1024, 4096, 8192),
    rows=(1, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    lengths=(16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    elements=tuple(2**p for p in (12, 16, 18, 20, 22, 23, 24, 25, 26)),
    patches=(64, 256, 729, 1024),
    units=128,
    pooled=((1, 256), (8, 256), (8, 1152), (32, 1152), (32, 3584)),
    reduced=((4, 4, 64), (8, 14, 1152), (32, 14, 1152), (32, 14, 3584), (16, 12, 5120), (64, 14, 1152), (64, 6, 256)),
    full_rows=2**17,
)
WIDTHS = (64, 128)  # of heads
HEADS = 4  # of a call
INSIDE = 16  # heads of one prompt or frame, at most; more are a batch
MOST_HEADS = 4096
TOO_LONG_MS = 250.0  # what would take longer is left out: the table grows by its power
_EDGE_OF_MAP = 27


def points_of(found: Mapping[Any, float], name: Any) -> Points:
    """The table of what was timed as (name, size)."""
    return monotone([(size, ms) for (of, size), ms in found.items() if of == name])


def products(watch: Watch, make: Make, pairs: Sequence[tuple[int, int]], sizes: Sizes) -> dict[tuple[int, int], Points]:
    """Times of [rows, inner] times [inner, outer] by rows, for pairs (inner, outer).

    Each call takes another weight, as the layers of a model do: none is found in a cache.
    """
    for inner, outer in pairs:
        element = make(1).element_size()
        count = min(64, math.ceil(sizes.spread / (inner * outer * element)))
        room = watch.room() / element - count * inner * outer
        fitting = [rows for rows in sizes.rows if rows * (inner + outer) <= room]
        if not fitting:
            continue
        weights, x = itertools.cycle(make(count, outer, inner)), make(fitting[-1], inner)
        last, before = 0.0, fitting[0]
        for rows in fitting:
            if last * rows / before > TOO_LONG_MS:
                break
            last, before = watch.add(((inner, outer), rows), partial(_linear, x[:rows], weights)), rows
    found = watch.medians()
    return {pair: points for pair in pairs if (points := points_of(found, pair))}


def _linear(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return functional.linear(x, next(weights))


def attention(
    watch: Watch, make: Make, implementation: str, widths: Mapping[str, Sequence[int]], sizes: Sizes
) -> dict[str, Points]:
    """Times by length, for widths of heads by kind (causal, full), as `Device.attention` has them.

    One head of a call that fills the device; of a GPU also a call of few heads.
    """
    found: dict[str, Points] = {}
    for kind, width in ((kind, width) for kind, listed in widths.items() for width in listed):
        name = f"{kind}-{width}"
        if sizes.full_rows is None:
            found[name] = _attentions(watch, make, implementation, kind, width, sizes, lambda _: HEADS)
            continue
        full = _attentions(watch, make, implementation, kind, width, sizes, partial(_filling, sizes.full_rows))
        few = _attentions(watch, make, implementation, kind, width, sizes, lambda _: HEADS)
        found[name] = full
        found[f"{name}-call"] = monotone([(n, ms * HEADS) for n, ms in few])
    return found


def _filling(rows: int, length: int) -> int:
    return min(MOST_HEADS, max(HEADS, rows // length))


def _attentions(
    watch: Watch,
    make: Make,
    implementation: str,
    kind: str,
    width: int,
    sizes: Sizes,
    heads_of: Callable[[int], int],
) -> Points:
    """Times of one of so many heads, as the models hand them over: heads inside, transposed."""
    run, causal = attention_function(implementation), kind == "causal"
    module = SimpleNamespace(is_causal=causal, num_key_value_groups=1, training=False, config=None, layer_idx=0)
    last = 0.0
    for length in sizes.lengths:
        heads = heads_of(length)
        batch, inside = max(1, heads // INSIDE), min(heads, INSIDE)
        weights = heads * length**2 * 8 if implementation == "eager" else 0
        if last * 16 > 4 * TOO_LONG_MS or weights > watch.room():
            break
        q, k, v = (make(batch, length, inside, width).transpose(1, 2) for _ in range(3))
        mask = None
        if implementation == "eager" and causal:
            mask = torch.full((1, 1, length, length), -math.inf, device=q.device, dtype=q.dtype).triu(1)
        call = partial(run, module, q, k, v, mask, dropout=0.0, scaling=width**-0.5, is_causal=causal)
        last = watch.add((batch * inside, length), call)
    return monotone([(length, max(1e-6, ms / heads)) for (heads, length), ms in watch.medians().items()])


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


def _rotate_wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As vision towers do, in float32."""
    return rotate(x.float(), cos.float(), sin.float()).to(x.dtype)


def elementwise(watch: Watch, make: Make, sizes: Sizes, width: int = 512, head: int = 64) -> dict[str, Points]:
    """Times of `OPERATIONS` by elements."""
    weight, bias = make(width), make(width)
    longest: dict[str, float] = {}
    for elements in sizes.elements:
        if elements * 16 * weight.element_size() > watch.room():
            break
        rows = max(1, elements // width)
        x, y = make(rows, width), make(rows, width)
        heads = x.view(1, rows, width // head, head).transpose(1, 2)
        fused = make(rows, 3, width // head, head)[:, 0]
        cos, sin = make(1, 1, rows, head), make(1, 1, rows, head)
        across = make(width, rows).T
        calls: dict[str, Callable[[], Any]] = {
            "add": partial(torch.add, x, y),
            "copy": x.clone,
            "rmsnorm": partial(_rms_norm, x, weight),
            "layernorm": partial(functional.layer_norm, x, (width,), weight, bias),
            "gelu": partial(functional.gelu, x, approximate="tanh"),
            "silu_mul": partial(_silu_mul, x, y),
            "rotary": partial(rotate, heads, cos, sin),
            "rotary_fused": partial(_rotate_wide, fused, cos[0, 0, :, None], sin[0, 0, :, None]),
            "transpose": partial(heads.clone, memory_format=torch.contiguous_format),
            "layernorm_across": partial(functional.layer_norm, across, (width,), weight, bias),
            "add_across": partial(torch.add, across, y),
        }
        for name, call in calls.items():
            if longest.get(name, 0.0) * 2 < TOO_LONG_MS / 4:
                longest[name] = watch.add((name, elements), call)
    for frames, depth in sizes.pooled:
        if frames * _EDGE_OF_MAP**2 * depth * 4 * weight.element_size() > watch.room():
            break
        maps = make(frames, _EDGE_OF_MAP**2, depth)
        watch.add(("pool", maps.numel()), partial(_pool, maps))
    found = watch.medians()
    return {name: points_of(found, name) for name in dict.fromkeys(name for name, _ in found)}


def received(watch: Watch, make: Make, sizes: Sizes, width: int = 64) -> Points:
    """Times of one head's received attention by patches of its frame."""
    for patches in sizes.patches:
        q, k = make(sizes.units, 1, patches, width), make(sizes.units, 1, patches, width)
        watch.add(("received", patches), partial(received_attention, q, k, 0.125))
    return monotone([(n, ms / sizes.units) for n, ms in points_of(watch.medians(), "received")])


CONVOLVED = (1024, 1176, 256)  # patches, values of a patch, width


def convolutions(watch: Watch, make: Make) -> dict[str, float]:
    """Patch embeddings, flat (LLaVA) and of two frames (Qwen), of as many multiplications as `CONVOLVED`."""
    rows, _, width = CONVOLVED
    images, flat = make(4, 3, 14 * 16, 14 * 32), make(width, 3, 14, 14)
    patches, deep = make(rows, 3, 2, 14, 14), make(width, 3, 2, 14, 14)
    watch.add("convolution_2", lambda: functional.conv2d(images, flat, stride=14))
    watch.add("convolution_3", lambda: functional.conv3d(patches, deep, stride=(2, 14, 14)))
    return watch.medians()


def embedding(watch: Watch, make: Make, vision: VisionShape, sizes: Sizes) -> Points:
    """Times of a tower's own patch embedding by patches, at `sizes.rows` of at least a frame."""
    c, t, p, side = vision.channels, vision.temporal_patch, vision.patch, vision.side
    cells, last, before = 1 if side is None else side**2, 0.0, 1
    for count in dict.fromkeys(max(1, rows // cells) for rows in sizes.rows[1:]):
        if count * cells * (c * t * p * p + vision.width) * 4 * make(1).element_size() > watch.room():
            break
        if last * count / before > TOO_LONG_MS:
            break
        if side is None:
            patches, weight = make(count, c, t, p, p), make(vision.width, c, t, p, p)
            call = partial(functional.conv3d, patches, weight, stride=(t, p, p))
        else:
            images, weight = make(count, c, side * p, side * p), make(vision.width, c, p, p)
            call = partial(functional.conv2d, images, weight, stride=p)
        last, before = watch.add(("embed", count * cells), call), count
    return points_of(watch.medians(), "embed")


# ---------------------------------------------------------------------- the outer reduction


def reduction(where: torch.device, dtype: torch.dtype, method: str, sizes: Sizes) -> tuple[float, ...]:
    """(constant, per frame, per token, per feature value): the best of them with no negative one, by relative error.

    From a device at rest to a device at rest, launches and all.
    """
    found = method_module(method).METHOD
    assert found.reduce is not None
    assert found.options is not None
    options, watch = found.options(), Watch(where)
    terms: list[tuple[float, ...]] = []
    for frames, side, width in sizes.reduced:
        tokens = _scenes(frames, side * side, width, where, dtype)
        total = frames * side * side
        target = Target(max(1, total // 8), 0.125)
        watch.add(len(terms), partial(found.reduce, tokens, target, options))
        terms.append((1.0, frames, total, total * width))
    times = watch.medians()
    return positive_fit(np.array(terms, dtype=float), np.array([times[i] for i in range(len(terms))]))


def _scenes(frames: int, per_frame: int, width: int, where: torch.device, dtype: torch.dtype) -> VideoTokens:
    """Two still scenes in whose second half of the tokens every frame is new."""
    base = torch.randn(2, per_frame, width, device=where, dtype=dtype)
    x = base[torch.arange(frames, device=where) * 2 // frames].clone()
    x[:, per_frame // 2 :] = torch.randn(frames, per_frame - per_frame // 2, width, device=where, dtype=dtype)
    return VideoTokens(x, torch.rand(frames, per_frame, device=where))


def positive_fit(terms: Any, times: Any) -> tuple[float, ...]:
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
