"""A device that does not exist, whose times follow from arithmetic."""

from __future__ import annotations

from holimerge.planning.device import OPERATIONS, Conditions, Device, monotone

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
