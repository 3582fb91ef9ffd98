"""What a device can do, as tables of measured times; how they are read between their points, and kept on disk.

A table is a list of (size, milliseconds). Between two points time follows a power law (a line on logarithmic axes);
below the first point it stays (what is left is launching), beyond the last it grows with the power that the arithmetic
has. Tables are made monotone, so that what is larger never looks faster: a planner may then bisect.

On a CPU a table holds what a call takes. On a GPU it holds how long the device is busy, and what the host takes to
issue the work stands beside it (`Device.host`), see `holimerge.planning.timeline`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = 3  # of what is measured; a file of another version is measured anew

OPERATIONS = (
    *("add", "copy", "transpose", "rmsnorm", "layernorm", "gelu", "silu_mul", "rotary"),
    "rotary_fused",  # on queries that lie between keys and values
    "pool",
    *("layernorm_across", "add_across"),  # on rows that lie transposed in memory
)

Points = tuple[tuple[float, float], ...]


def processor() -> str:
    """The CPU's name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def monotone(points: Sequence[Sequence[float]]) -> Points:
    """Points by ascending size, no time above a later one: what disturbs a measurement only ever makes it longer."""
    found: list[tuple[float, float]] = []
    for size, ms in sorted(((float(a), float(b)) for a, b in points), reverse=True):
        found.append((size, min(ms, found[-1][1]) if found else ms))
    return tuple(reversed(found))


def read_table(points: Points, size: float, power: float = 1.0) -> float:
    """Milliseconds at `size`; beyond the last point they grow as size ** power. 0 for a size of 0."""
    if size <= 0:
        return 0.0
    first, last = points[0], points[-1]
    if size <= first[0]:
        return first[1]
    if size >= last[0]:
        return last[1] * (size / last[0]) ** power
    right = bisect_left(points, (size, -1.0))
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    share = math.log(size / x0) / math.log(x1 / x0)
    return min(y1, y0 * (y1 / y0) ** share)  # not above it by rounding


def product_name(inner: float, outer: float) -> str:
    """The key of a matrix product in `Device.products`."""
    return f"{inner} x {outer}"


@dataclass(frozen=True)
class Conditions:
    """Under which a table holds: everything that changes a time but is no size."""

    device: str
    kind: str  # cpu, cuda, ...
    dtype: str
    attention: str
    threads: int
    torch: str
    transformers: str
    version: int = VERSION

    @property
    def file(self) -> str:
        """The cache file's name."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


@dataclass(frozen=True)
class Device:
    """Measured times of one device under one set of conditions, milliseconds throughout.

    matmul: (edge of a square weight, times by rows of the other factor), ascending.
    attention: causal or full, and head width, as "causal-64" -> times by length of one head's attention.
    elementwise: operation -> times by elements.
    received: times by patches of a frame, of one head's received attention.
    overhead: what is left of a model whose arithmetic is nothing, by stage and layer; of a CPU.
    reduction: method -> (constant, per frame, per token, per feature value), see `reduce_ms`.
    seconds: how long measuring took.

    Of a GPU:
    attention: also the time of a call of a few heads, as "causal-64-call"; the others are of a device that is full.
    products: "inner x outer" of a model's matrix products and, with "embed ", of its patch embedding -> times by rows.
    host: "model type, stock" or ", patched" -> ms to issue a stage, a layer, a call; see `holimerge.planning.tiny`.
    shapes: the models whose products and heads were measured.
    """

    conditions: Conditions
    matmul: tuple[tuple[float, Points], ...]
    attention: Mapping[str, Points]
    elementwise: Mapping[str, Points]
    received: Points
    overhead: Mapping[str, float] = field(default_factory=dict)
    reduction: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    products: Mapping[str, Points] = field(default_factory=dict)
    host: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    shapes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def apart(self) -> bool:
        """Whether times are those of the device alone, beside those of the host."""
        return self.conditions.kind == "cuda"

    def matmul_ms(self, rows: float, inner: float, outer: float) -> float:
        """[rows, inner] times [inner, outer]."""
        if rows <= 0 or inner <= 0 or outer <= 0:
            return 0.0
        exact = self.products.get(product_name(inner, outer))
        if exact is not None:
            return read_table(exact, rows)
        edge = math.sqrt(inner * outer)
        by_edge = tuple((edge_of, read_table(points, rows)) for edge_of, points in self.matmul)
        return read_table(monotone(by_edge), edge, 2.0)

    def embed_ms(self, rows: float, inner: int, outer: int, temporal: int) -> float:
        """The patch embedding, a convolution of as many multiplications as [rows, inner] times [inner, outer]."""
        exact = self.products.get(f"embed {product_name(inner, outer)}")
        if exact is not None:
            return read_table(exact, rows) if rows > 0 else 0.0
        return self.overhead.get(f"convolution_{1 + temporal}", 1.0) * self.matmul_ms(rows, inner, outer)

    def attention_ms(self, length: float, heads: int, width: int, *, causal: bool, calls: int = 1) -> float:
        """`calls` attentions of `heads` heads over `length` tokens; between two head widths the line through both."""
        kind = "causal" if causal else "full"
        per_head = self._by_width(kind, length, width)
        call = self._by_width(kind, length, width, "-call") if self.apart else 0.0
        return calls * max(call, heads * per_head)

    def _by_width(self, kind: str, length: float, width: int, of: str = "") -> float:
        names = [name for name in self.attention if name.startswith(kind) and name.endswith("-call") == bool(of)]
        widths = sorted(int(name.split("-")[1]) for name in names)
        if not widths:
            return 0.0
        low = max((w for w in widths if w <= width), default=widths[0])
        high = min((w for w in widths if w >= width), default=widths[-1])
        at_low, at_high = (read_table(self.attention[f"{kind}-{w}{of}"], length, 2.0) for w in (low, high))
        if width > high:
            return at_high * width / high
        share = max(0.0, (width - low) / (high - low)) if high > low else 0.0
        return at_low + share * (max(at_low, at_high) - at_low)

    def elementwise_ms(self, operation: str, elements: float) -> float:
        return read_table(self.elementwise[operation], elements)

    def received_ms(self, frames: int, heads: int, patches: int) -> float:
        """Received attention of one tower layer."""
        return frames * heads * read_table(self.received, patches, 2.0)

    def reduce_ms(self, method: str, frames: int, per_frame: int, width: int) -> float:
        """The outer reduction of one video; a method that was not measured counts as the dearest that was."""
        if not self.reduction:
            return 0.0
        terms = (1.0, float(frames), float(frames * per_frame), float(frames * per_frame * width))
        known = [self.reduction[method]] if method in self.reduction else list(self.reduction.values())
        return max(sum(a * b for a, b in zip(found, terms, strict=True)) for found in known)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Device:
        """What `to_dict` gave. Raises ValueError, KeyError or TypeError for anything else."""

        def points(listed: Any) -> Points:
            found = tuple((float(a), float(b)) for a, b in listed)
            if not found or any(not (math.isfinite(a) and math.isfinite(b) and a > 0 and b > 0) for a, b in found):
                raise ValueError("a table is a list of positive numbers")
            return monotone(found)

        def numbers(listed: Any) -> tuple[float, ...]:
            found = tuple(float(x) for x in listed)
            if any(not math.isfinite(x) or x < 0 for x in found):
                raise ValueError("a time is a number of at least 0")
            return found

        missing = set(OPERATIONS) - set(plain["elementwise"])
        if missing:
            raise ValueError(f"no times of {', '.join(sorted(missing))}")
        return cls(
            conditions=Conditions(**plain["conditions"]),
            matmul=tuple(sorted((float(edge), points(p)) for edge, p in plain["matmul"])),
            attention={str(k): points(v) for k, v in plain["attention"].items()},
            elementwise={str(k): points(v) for k, v in plain["elementwise"].items()},
            received=points(plain["received"]),
            overhead={str(k): numbers([v])[0] for k, v in plain["overhead"].items()},
            reduction={str(k): numbers(v) for k, v in plain["reduction"].items()},
            products={str(k): points(v) for k, v in plain["products"].items()},
            host={str(k): {str(n): numbers([ms])[0] for n, ms in v.items()} for k, v in plain["host"].items()},
            shapes=tuple(map(str, plain["shapes"])),
            seconds=float(plain["seconds"]),
        )


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/holimerge/devices`, or `~/.cache/holimerge/devices`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "holimerge" / "devices"


def load_device(conditions: Conditions) -> Device | None:
    """The cached measurement of these conditions; None where there is none. A file that cannot be read is a warning."""
    path = cache_folder() / conditions.file
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"{path}: cannot be read ({error}); the device is measured anew", stacklevel=2)
        return None
    try:
        device = Device.from_dict(json.loads(text))
        if device.conditions != conditions:
            raise ValueError("it is of another device")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        warnings.warn(f"{path}: no calibration ({error!r}); the device is measured anew", stacklevel=2)
        return None
    return device


def save_device(device: Device) -> Path | None:
    """Write beside and rename, so that processes can share the folder; None (and a warning) where it is read-only."""
    folder = cache_folder()
    path = folder / device.conditions.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(device.to_dict(), file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"{path}: the calibration cannot be kept ({error})", stacklevel=2)
        return None
    return path
