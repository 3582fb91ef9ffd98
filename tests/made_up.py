"""A device that does not exist, whose times follow from arithmetic."""

from __future__ import annotations

from dataclasses import replace

from holimerge.planning.device import OPERATIONS, Conditions, Device, Points, monotone
from holimerge.planning.predict import flow_name

HERE = Conditions("a made-up device", "cpu", "float32", "sdpa", 1, "2", "5")


def device(scale: float = 1.0, conditions: Conditions = HERE, **overhead: float) -> Device:
    """A device whose every operation takes as long as its arithmetic: `scale` ns a multiplication or element."""
    sizes = [2.0**p for p in range(4, 26, 3)]
    line = monotone([(n, 1e-6 * scale * n) for n in sizes])
    return Device(
        conditions=conditions,
        matmul=tuple(
            (float(edge), monotone([(rows, 1e-6 * scale * rows * edge**2) for rows in (1, 32, 1024)]))
            for edge in (8, 128, 2048)
        ),
        attention={
            f"{kind}-{width}": monotone([(n, 1e-6 * scale * n * n * width) for n in (4, 64, 1024)])
            for kind in ("causal", "full")
            for width in (64, 128)
        },
        elementwise=dict.fromkeys(OPERATIONS, line),
        received=monotone([(n, 1e-6 * scale * n * n) for n in (4, 729)]),
        overhead=overhead,
        reduction={"holitom": (0.01, 0.001, 1e-6, 1e-7)},
    )


def h200() -> Device:
    """A GPU whose tables follow from a few figures measured on an H200 (bfloat16, torch 2.11): matrix products of up to
    700 TFLOP/s, less where they are small, 4.2 TB/s of memory, 2 microseconds for anything, 10 for the host to launch.
    """
    least, bytes_a_ms, flops_a_ms = 2e-3, 4.2e9, {256: 0.15e12, 1024: 0.52e12, 4096: 0.6e12, 8192: 0.7e12}
    sizes = [2.0**p for p in range(4, 28)]

    def product(rows: float, edge: int) -> float:
        return max(least, (2 * edge * edge + 4 * rows * edge) / bytes_a_ms, 2 * rows * edge * edge / flops_a_ms[edge])

    def moved(per_element: float) -> Points:
        return monotone([(n, least + per_element * n / bytes_a_ms) for n in sizes])

    def attended(width: int, causal: bool) -> Points:
        flops = 4 * width / (2 if causal else 1)
        return monotone([(n, flops * n * n / 0.35e12) for n in sizes if n < 2**15])

    moves = {"add": 6, "copy": 4, "transpose": 4, "rmsnorm": 34, "layernorm": 4, "gelu": 4, "silu_mul": 10}
    moves |= {"rotary": 22, "rotary_fused": 50, "pool": 4.2e9 * 5.32e-7, "layernorm_across": 28, "add_across": 15}
    # a kernel of few heads runs on a part of the device
    call = monotone([(n, max(8e-3, n * n * 4e-9)) for n in sizes if n < 2**15])
    attention = {f"{kind}-{w}": attended(w, kind == "causal") for kind in ("causal", "full") for w in (72, 80, 128)}
    launch = 0.01
    stock = {"vision": 100 * launch, "tower_layer": 36 * launch, "attention_call": 5 * launch}
    stock |= {"prefill": 100 * launch, "decoder_layer": 1.03, "other": 8.0}
    patched = {**stock, "reduce": 1.0, "project": 1.8, "splice": 1.7, "inner": 1.0, "other": 10.0, "merging": 0.4}
    return Device(
        conditions=replace(HERE, kind="cuda", dtype="bfloat16"),
        matmul=tuple(
            (float(edge), monotone([(rows, product(rows, edge)) for rows in sizes if rows < 2**16]))
            for edge in (256, 1024, 4096, 8192)
        ),
        attention={**attention, **{f"{name}-call": call for name in attention}},
        elementwise={name: moved(moves[name]) for name in OPERATIONS},
        received=monotone([(n, 12 * n * n / bytes_a_ms) for n in (64.0, 729.0)]),
        reduction={"holitom": (2.0, 0.02, 0.0, 2e-8)},
        host={
            flow_name(kind, stock=of is stock): of
            for kind in ("llava_onevision", "qwen2_5_vl", "qwen3_vl")
            for of in (stock, patched)
        },
    )
