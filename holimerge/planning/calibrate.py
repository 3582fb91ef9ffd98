"""The micro-benchmark behind the planner: a few seconds, once for each device and set of conditions.

What a prompt spends its time on is timed at a handful of sizes, written as transformers writes it: matrix products,
attention through the model's own attention implementation, norms, activations, rotary embedding, plain passes over
memory, received attention, the outer reduction itself. Tiny models of the real classes then tell what is left when
there is next to no arithmetic: what a layer and a stage cost by being launched (`holimerge.planning.tiny`).

On a GPU the tables hold how long the device is busy, at the sizes that models have there; a model's own matrix
products and heads are timed when it is first asked about, as kernels differ from one width to the next.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from ..shapes import ModelShape
from ..timing import quiet_clock, reading
from . import tables
from .device import Conditions, Device, load_device, processor, product_name, save_device
from .predict import decoder_products, flow_name, projector_products, tower_products
from .tables import CPU, GPU, Sizes
from .tiny import host_times, overheads
from .watch import Watch, queue_of

_LOG = logging.getLogger("holimerge")
_KNOWN: dict[Conditions, Device] = {}  # of this process


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
    shape: ModelShape | None = None,
    again: bool = False,
) -> Device:
    """The device's tables: of this process, of the cache on disk, or measured now (seconds; a line is logged).

    Args:
        device, dtype, attention: as the model runs.
        method: a reduction method whose times are needed, measured when first asked for.
        shape: of the model that is asked about; on a GPU some of its own sizes are measured when first asked for.
        again: measure although there is a cached one.
    """
    key = conditions_of(device, dtype, attention)
    found = None if again else _KNOWN.get(key) or load_device(key)
    missing = found is None or _lacks_method(found, method) or _lacks_shape(found, shape)
    if found is None:
        _LOG.warning("measuring %s (%s, %s, %d threads), once; seconds", key.device, key.dtype, attention, key.threads)
    if missing:
        # a context of its own: this may run inside a forward of a patched model, whose hooks look into theirs
        found = contextvars.Context().run(_measure, torch.device(device), dtype, key, found, method, shape)
        save_device(found)
    assert found is not None
    _KNOWN[key] = found
    return found


def _lacks_method(device: Device, method: str | None) -> bool:
    return method is not None and method not in device.reduction


def _lacks_shape(device: Device, shape: ModelShape | None) -> bool:
    return device.apart and shape is not None and repr(shape) not in device.shapes


def _measure(
    where: torch.device,
    dtype: torch.dtype,
    key: Conditions,
    old: Device | None,
    method: str | None,
    shape: ModelShape | None,
) -> Device:
    begin, sizes = time.perf_counter(), GPU if where.type == "cuda" else CPU
    with _steady(where):
        found = old or primitives(where, dtype, key, sizes)
        if method is not None and method not in found.reduction:
            fitted = tables.reduction(where, dtype, method, sizes)
            found = replace(found, reduction={**found.reduction, method: fitted})
        if old is None and not found.apart:
            found = replace(found, overhead=overheads(where, dtype, found))
        if shape is not None and _lacks_shape(found, shape):
            found = with_shape(where, dtype, found, shape, sizes)
    if where.type == "cuda":
        torch.cuda.empty_cache()  # somebody's model may need the memory
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


def primitives(where: torch.device, dtype: torch.dtype, key: Conditions, sizes: Sizes) -> Device:
    """What holds for every model."""
    make = partial(torch.randn, device=where, dtype=dtype)
    watch = Watch(where, queue_of(where))
    squares = tables.products(watch, make, [(edge, edge) for edge in sizes.edges], sizes)
    found = Device(
        conditions=key,
        matmul=tuple((float(edge), points) for (edge, _), points in squares.items()),
        attention=tables.attention(watch, make, key.attention, {"causal": tables.WIDTHS, "full": tables.WIDTHS}, sizes),
        elementwise=tables.elementwise(watch, make, sizes),
        received=tables.received(watch, make, sizes),
    )
    rows, inner, outer = tables.CONVOLVED
    product = found.matmul_ms(rows, inner, outer)
    return replace(found, overhead={name: ms / product for name, ms in tables.convolutions(watch, make).items()})


def with_shape(where: torch.device, dtype: torch.dtype, device: Device, shape: ModelShape, sizes: Sizes) -> Device:
    """The device with what is a model's own: its matrix products, patch embedding and heads, and the host's times."""
    make = partial(torch.randn, device=where, dtype=dtype)
    watch = Watch(where, queue_of(where))
    vision, text = shape.vision, shape.text
    products = dict(device.products)
    for pair in dict.fromkeys([*tower_products(shape), *decoder_products(text), *projector_products(vision)]):
        if product_name(*pair) not in products:  # one by one: they are large
            products |= {product_name(*p): points for p, points in tables.products(watch, make, [pair], sizes).items()}
    embedded = tables.embedding(watch, make, vision, sizes)
    if embedded:
        values = vision.channels * vision.temporal_patch * vision.patch**2
        products[f"embed {product_name(values, vision.width)}"] = embedded
    widths = {"causal": [text.head_dim], "full": [vision.width // vision.heads]}
    widths = {kind: [w for w in listed if f"{kind}-{w}" not in device.attention] for kind, listed in widths.items()}
    attention = {**device.attention, **tables.attention(watch, make, device.conditions.attention, widths, sizes)}
    found = replace(device, products=products, attention=attention, shapes=(*device.shapes, repr(shape)))
    if flow_name(shape.model_type, stock=True) in device.host:
        return found
    return replace(found, host={**device.host, **host_times(where, dtype, found, shape)})
