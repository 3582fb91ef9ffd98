"""Milliseconds by stage and peak memory of a prompt, from sizes and from what a device was measured to do.

Every matrix product, attention and pass over the activations of the stock classes (transformers 5.23) is looked up in
the device's tables and summed, beside what the host takes to issue it (`holimerge.planning.timeline`). The stages are
those of `holimerge.report.Report.milliseconds`, and `other` (token embedding, lm_head, `generate` itself). Memory is
arithmetic alone: weights, the cache, and the largest set of activations alive at once. Both are of one prompt (a batch
of one row), and never fall when a token is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..attention import frames_at_once
from ..cost import inner_kept, llm_prefill_exact
from ..shapes import Grid, ModelShape, TextShape, VisionShape, window_rows
from .device import Device
from .timeline import Step, by_stage

STAGES = ("vision", "reduce", "project", "splice", "prefill", "other")
GIB = 2**30
_RMS = ("qwen2_5_vl",)  # towers with RMS norms; the others have layer norms
_MERGING_PASSES = 14  # over a block's rows, as copies: matched, merged twice in float32, spread


@dataclass(frozen=True)
class Clip:
    """One video of a prompt: temporal steps and, where the resolution is free, (rows, columns) of patches."""

    steps: int
    grid: Grid | None = None


class TowerLeft(NamedTuple):
    """What a setting inside the vision tower leaves of it.

    share: of its FLOPs. merging: blocks in which tokens merge. rows: share of the patches that the last block sees.
    """

    share: float = 1.0
    merging: int = 0
    rows: float = 1.0


WHOLE = TowerLeft()


@dataclass(frozen=True)
class Scheme:
    """What of a configuration costs time.

    method: of the outer reduction; None for the stock model. at: where it works. layer, retain: of the inner merge.
    chunk: temporal steps per call of the tower. left: what a setting inside the vision tower leaves of it.
    tower_attention: of the configuration. graphed: whether a GPU replays the tower's calls.
    """

    method: str | None = "holitom"
    at: str = "projector_input"
    layer: int | None = None
    retain: float | None = None
    chunk: int | None = None
    left: TowerLeft = WHOLE
    tower_attention: str = "auto"
    graphed: bool = False

    def batched(self, device: Device) -> bool:
        """Whether a tower's spans of one length attend together; a GPU's tables are apart from the host's."""
        if self.method is None or self.tower_attention == "stock":
            return False
        return self.tower_attention == "batched" or device.apart


@dataclass(frozen=True)
class Prompt:
    """One row: a model's shape, its videos, and everything that is no video token (`rest`, separators included).

    weights: bytes. element: bytes of an activation. kind: of device, cpu or cuda.
    """

    shape: ModelShape
    clips: tuple[Clip, ...]
    rest: int
    weights: int = 0
    element: int = 4
    kind: str = "cpu"

    def tokens(self, clip: Clip) -> int:
        """T N of one video."""
        return clip.steps * self.shape.vision.tokens_per_step(clip.grid)

    @property
    def total(self) -> int:
        """Video tokens of the unreduced prompt."""
        return sum(map(self.tokens, self.clips))

    def lengths(self, entering: int, scheme: Scheme) -> tuple[int, int]:
        """Sequence lengths below and from the inner layer on."""
        after = entering if scheme.retain is None else inner_kept(entering, scheme.retain)
        return self.rest + entering, self.rest + after


def flops_share(prompt: Prompt, scheme: Scheme, entering: int) -> float:
    """The LLM's prefill (last lm_head row included) over the unpatched one's."""
    text = prompt.shape.text
    before, after = prompt.lengths(entering, scheme)
    reduced = llm_prefill_exact(text, before, None if scheme.layer is None else after, scheme.layer)
    return reduced / llm_prefill_exact(text, prompt.rest + prompt.total)


def predict(prompt: Prompt, device: Device, scheme: Scheme, entering: int) -> dict[str, float]:
    """Milliseconds by stage (`STAGES`) of a prompt of which `entering` video tokens enter the LLM."""
    return by_stage(steps_of(prompt, device, scheme, entering), STAGES)


def steps_of(prompt: Prompt, device: Device, scheme: Scheme, entering: int) -> list[Step]:
    """What host and device do, in order; on a CPU, whose tables hold both, as if it were the device alone."""
    return [*vision_steps(prompt, device, scheme), *later_steps(prompt, device, scheme, entering)]


def vision_steps(prompt: Prompt, device: Device, scheme: Scheme) -> list[Step]:
    """Those of the vision tower, which does not know how many tokens will enter."""
    host = _host(prompt.shape, device, scheme)
    return [step for clip in prompt.clips for step in _vision(prompt, device, scheme, clip, host)]


def later_steps(prompt: Prompt, device: Device, scheme: Scheme, entering: int) -> list[Step]:
    """Those behind it."""
    host, reduced = _host(prompt.shape, device, scheme), scheme.method is not None
    share = entering / max(1, prompt.total)
    steps: list[Step] = []
    for clip in prompt.clips if reduced else ():
        per_step = prompt.tokens(clip) // clip.steps
        ms = device.reduce_ms(str(scheme.method), clip.steps, per_step, _decision_width(prompt.shape, scheme))
        # launching little things, on a GPU
        steps.append(Step("reduce", 0.0, ms + host("reduce")) if device.apart else Step("reduce", ms))
    for clip in prompt.clips if reduced else ():
        ms = _project(prompt, device, scheme, clip, share * prompt.tokens(clip))
        steps.append(Step("project", ms, host("project")))
    length, text = prompt.rest + prompt.total, prompt.shape.text
    # token embedding and `generate` itself; models ask the device whether features and placeholders are as many
    other = device.overhead.get("other", 0.0) + _passes(device, 4, length * text.width)
    steps.append(Step("other", other, host("other"), waits=True))
    if reduced:
        moved = device.overhead.get("splice", 0.0) + _passes(device, 5, length * text.width)
        steps.append(Step("splice", moved, host("splice")))
    steps += _prefill(prompt, device, scheme, entering, host)
    steps.append(Step("other", device.matmul_ms(1, text.width, text.vocab)))
    return steps


def flow_name(model_type: str, *, stock: bool) -> str:
    """The key of a model's times in `Device.host`."""
    return f"{model_type}, {'stock' if stock else 'patched'}"


def _host(shape: ModelShape, device: Device, scheme: Scheme) -> Callable[[str], float]:
    """ms that the host takes to issue something; 0 on a CPU."""
    times = device.host.get(flow_name(shape.model_type, stock=scheme.method is None), {})
    if scheme.graphed:  # one launch for all blocks
        times = {name: ms for name, ms in times.items() if name not in ("tower_layer", "merging", "attention_call")}
    return lambda name: times.get(name, 0.0)


def _passes(device: Device, count: float, elements: float) -> float:
    return count * device.elementwise_ms("copy", elements)


def _decision_width(shape: ModelShape, scheme: Scheme) -> int:
    return shape.vision.decision_width if scheme.at == "projector_input" else shape.text.width


def tower_products(shape: ModelShape) -> list[tuple[int, int]]:
    """(inner, outer) of the matrix products of one block of the vision tower."""
    v = shape.vision
    d, m = v.width, v.mlp
    products = [(d, d)] * 4 if v.side is not None else [(d, 3 * d), (d, d)]
    return products + [(d, m)] * (2 if v.gated else 1) + [(m, d)]


def decoder_products(text: TextShape) -> list[tuple[int, int]]:
    """(inner, outer) of the matrix products of one decoder layer."""
    d, queries, keys = text.width, text.heads * text.head_dim, text.kv_heads * text.head_dim
    return [(d, queries), (d, keys), (d, keys), (queries, d), (d, text.mlp), (d, text.mlp), (text.mlp, d)]


def projector_products(vision: VisionShape) -> list[tuple[int, int]]:
    """(inner, outer) of the matrix products of one projector."""
    wide, hidden, out = vision.projector
    return [(wide, hidden), (hidden, out)]


def tower_layer(device: Device, shape: ModelShape, patches: int, *, across: bool = False) -> float:
    """One block of the vision tower over `patches` rows, without its attention. across: they lie transposed."""
    v = shape.vision
    n, d, m = patches, v.width, v.mlp
    norm, add = "rmsnorm" if shape.model_type in _RMS else "layernorm", "add"
    if across:
        norm, add = "layernorm_across", "add_across"
    ms = sum(device.matmul_ms(n, a, b) for a, b in tower_products(shape))
    ms += 2 * device.elementwise_ms(norm, n * d) + 2 * device.elementwise_ms(add, n * d)
    ms += device.elementwise_ms("silu_mul" if v.gated else "gelu", n * m)
    if not device.apart:  # a GPU's kernels read and write heads where they lie
        ms += 2 * device.elementwise_ms("transpose", n * d)
    if v.side is None:
        ms += 2 * device.elementwise_ms("rotary_fused", n * d)
    return ms + device.overhead.get("tower_layer", 0.0)


def _vision(prompt: Prompt, device: Device, scheme: Scheme, clip: Clip, host: Callable[[str], float]) -> Iterator[Step]:
    v, shape, stock = prompt.shape.vision, prompt.shape, scheme.method is None
    cells = v.frame_grid(clip.grid)
    per_step = cells[0] * cells[1]
    late = stock or scheme.at == "projector_output"
    values = v.channels * v.temporal_patch * v.patch**2
    ms = device.overhead.get("vision", 0.0)
    for count in _pieces(clip.steps, scheme.chunk):
        rows = count * per_step
        ms += device.embed_ms(rows, values, v.width, v.temporal_patch) + _passes(device, 2, rows * values)
        ms += device.elementwise_ms("layernorm", rows * v.width)
        yield Step("vision", ms, host("vision"))
        yield from _blocks(shape, device, scheme, cells, count, host)
        ms = 0.0
    rows = clip.steps * per_step
    if not stock:
        ms += device.received_ms(clip.steps, v.heads, per_step)
        ms += _passes(device, 2, rows * v.width)  # the queries and keys that were captured
    if late:
        ms += _projector(device, shape, rows // v.merge**2)
    if v.pooled:
        width = shape.text.width if late else v.width
        if stock:
            ms += device.elementwise_ms("pool", rows * width)
        else:  # its four taps gathered, and their sum in the features' dtype
            ms += _passes(device, 5, prompt.tokens(clip) * width)
    # a reduction begins by asking the device what the segments are made of, a stock model whether the features fit
    yield Step("vision", ms, waits=True)


def _blocks(
    shape: ModelShape, device: Device, scheme: Scheme, cells: Grid, steps: int, host: Callable[[str], float]
) -> Iterator[Step]:
    """All blocks of the tower over `steps` temporal steps."""
    v, batched = shape.vision, scheme.batched(device)
    rows = steps * cells[0] * cells[1]
    single = v.side is None and not batched  # one call a span
    # such towers ask the device for the spans' lengths and go through them one by one
    looped = device.apart and single and not device.conditions.attention.startswith("flash")
    # SigLIP's patch embedding hands its rows over transposed, and stock blocks work across them; a CPU hardly minds
    across = device.apart and scheme.method is None and v.pooled is not None
    plain = tower_layer(device, shape, rows, across=across)
    for count, spans in _kinds_of_blocks(shape, cells, steps):
        attention, calls = 0.0, 0
        for length, many in spans:
            heads, times = (v.heads, many) if single else (v.heads * many, 1)
            attention += device.attention_ms(length, heads, v.width // v.heads, causal=False, calls=times)
            calls += times
        if looped:
            for _ in range(count):
                yield Step("vision", plain * scheme.left.share, host("tower_layer"), waits=True)
                yield Step("vision", attention * scheme.left.share, calls * host("attention_call"))
            continue
        if len(spans) > 1 and batched:  # gathered by length: queries, keys, values, and what comes out
            attention += _passes(device, 4, rows * v.width)
        issued = host("tower_layer") + (len(spans) - 1) * host("attention_call")
        yield Step("vision", count * (plain + attention) * scheme.left.share, count * issued)
    if scheme.left.merging:
        work = _passes(device, _MERGING_PASSES, rows * v.width)
        sizes = len(set(window_rows(cells, v.window))) if v.window else 1  # windows of each merge by themselves
        yield Step("vision", scheme.left.merging * work, scheme.left.merging * sizes * host("merging"))


def _pieces(steps: int, chunk: int | None) -> list[int]:
    if chunk is None or chunk >= steps:
        return [steps]
    return [chunk] * (steps // chunk) + ([steps % chunk] if steps % chunk else [])


def _kinds_of_blocks(shape: ModelShape, cells: Grid, steps: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Blocks that attend alike: how many, and (length, number) of their spans over `steps` frames, one for a length."""
    v = shape.vision
    whole = [(cells[0] * cells[1], steps)]
    if not v.window:
        return [(v.layers, whole)]
    windows = Counter(window_rows(cells, v.window))
    full = sum(block in v.full_layers for block in range(v.layers))
    return [(full, whole), (v.layers - full, [(length, steps * many) for length, many in windows.items()])]


def _projector(device: Device, shape: ModelShape, rows: float) -> float:
    """All projectors over `rows` of their input."""
    wide, hidden, _ = shape.vision.projector
    one = sum(device.matmul_ms(rows, a, b) for a, b in projector_products(shape.vision))
    one += device.elementwise_ms("gelu", rows * hidden)
    if shape.vision.side is None:
        one += device.elementwise_ms("rmsnorm" if shape.model_type in _RMS else "layernorm", rows * wide)
    return shape.vision.projectors * one


def _project(prompt: Prompt, device: Device, scheme: Scheme, clip: Clip, kept: float) -> float:
    """Merging by the record, the projector on what is kept, and the features in the places of the stock ones."""
    shape, v, total = prompt.shape, prompt.shape.vision, prompt.tokens(clip)
    wide, _, out = v.projector
    ms = device.overhead.get("project", 0.0) + _passes(device, 2 * v.projectors, total * out)
    if scheme.at == "projector_output":
        return ms + _passes(device, v.projectors, total * out)
    if kept >= total:  # the stock projector on the stock tensor
        rows = clip.steps * v.frame_grid(clip.grid)[0] * v.frame_grid(clip.grid)[1] // v.merge**2
        pool = device.elementwise_ms("pool", rows * out) if v.pooled else 0.0
        return ms + _projector(device, shape, rows) + pool
    corners = v.rows_per_token
    ms += _passes(device, v.projectors * corners, total * wide)
    return ms + _projector(device, shape, kept * corners)


def decoder_layer_ms(device: Device, text: TextShape, n: int, *, head_norms: bool = False) -> float:
    """One decoder layer over a prompt of `n` tokens. head_norms: queries and keys are normed (Qwen3)."""
    d, queries, keys = text.width, text.heads * text.head_dim, text.kv_heads * text.head_dim
    ms = sum(device.matmul_ms(n, a, b) for a, b in decoder_products(text))
    ms += device.attention_ms(n, text.heads, text.head_dim, causal=True)
    ms += 2 * device.elementwise_ms("rmsnorm", n * d) + 2 * device.elementwise_ms("add", n * d)
    ms += device.elementwise_ms("silu_mul", n * text.mlp)
    ms += device.elementwise_ms("rotary", n * queries) + device.elementwise_ms("rotary", n * keys)
    ms += 2 * device.elementwise_ms("transpose", n * keys)  # into the cache
    if not device.apart:
        ms += device.elementwise_ms("transpose", n * queries)
    if head_norms:
        ms += device.elementwise_ms("rmsnorm", n * queries) + device.elementwise_ms("rmsnorm", n * keys)
    return ms + device.overhead.get("decoder_layer", 0.0)


def _prefill(
    prompt: Prompt, device: Device, scheme: Scheme, entering: int, host: Callable[[str], float]
) -> Iterator[Step]:
    text = prompt.shape.text
    below, above = prompt.lengths(entering, scheme)
    normed = prompt.shape.model_type == "qwen3_vl"
    layer = text.layers if scheme.layer is None else scheme.layer

    def layers(count: int, length: int) -> Step:
        one = decoder_layer_ms(device, text, length, head_norms=normed)
        return Step("prefill", count * one, count * host("decoder_layer"))

    yield Step("prefill", device.overhead.get("prefill", 0.0), host("prefill"))
    yield layers(layer, below)
    if prompt.shape.model_type == "qwen3_vl":  # deepstack: added to the first layers
        yield Step("prefill", (prompt.shape.vision.projectors - 1) * _passes(device, 2, below * text.width))
    if scheme.layer is not None and entering:
        dropped, kept = below - above, above - prompt.rest
        work = device.overhead.get("inner", 0.0) + device.matmul_ms(dropped, text.width, kept)
        yield Step("prefill", work + _passes(device, 6, below * text.width), host("inner"))
    yield layers(text.layers - layer, above)
    yield Step("prefill", device.elementwise_ms("rmsnorm", above * text.width))


# ---------------------------------------------------------------------- memory


def cache_bytes(prompt: Prompt, scheme: Scheme, entering: int) -> int:
    """Keys and values of the prompt, shorter from the inner layer on."""
    text = prompt.shape.text
    below, above = prompt.lengths(entering, scheme)
    layer = text.layers if scheme.layer is None else scheme.layer
    per_token = 2 * text.kv_heads * text.head_dim * prompt.element
    return per_token * (layer * below + (text.layers - layer) * above)


def memory_parts(prompt: Prompt, scheme: Scheme, entering: int, *, eager: bool = False) -> dict[str, int]:
    """Bytes of `weights`, `cache`, and the activations alive at once in the `tower` and in the `decoder`.

    The tower's are gone when the decoder runs, but the features (and the prompt's embeddings) stay, and the stock
    model keeps what the tower returned. Frames that merge inside the tower are not counted. eager: attention holds its
    weights, one layer at a time.
    """
    text, v, e = prompt.shape.text, prompt.shape.vision, prompt.element
    below, _ = prompt.lengths(entering, scheme)
    stock, levels = scheme.method is None, v.projectors - 1
    late = stock or scheme.at == "projector_output"
    # in a block: what came in, the sum so far, what is normed, the embedding; queries and keys that were captured
    # (with the values, where one layer makes them) and the levels that are added to the LLM's first layers
    captured = 0 if stock else 2 if v.side is not None else 3
    inside = 4 * v.width + max(4 * v.width, (3 if v.gated else 2) * v.mlp)
    # the last block sees fewer where tokens merge, of which the first block sees all
    block = max(inside, scheme.left.rows * (inside + captured * v.width)) + (0 if stock else levels * v.width)
    after = v.width + (v.projector[1] + v.projector[2]) / v.merge**2 if late else 2 * v.width
    rows = called = heads = logits = 0
    for clip in prompt.clips:
        cells = v.frame_grid(clip.grid)
        patches = cells[0] * cells[1]
        steps = max(_pieces(clip.steps, scheme.chunk))
        rows += clip.steps * patches
        # the videos of a prompt share one call, unless it is made in pieces
        called = max(called, steps * patches) if scheme.chunk else called + steps * patches
        squares = v.heads * patches**2
        seen = round(squares * scheme.left.rows**2)
        heads = max(heads, steps * squares) if scheme.chunk else heads + steps * squares
        logits = max(logits, min(steps, frames_at_once(seen, prompt.kind)) * seen)
    weights = heads * (4 + e) if eager and v.side else 0
    tower = round(e * max(called * block, rows * after)) + weights
    if not stock:  # of these the logits and their softmax of some frames at a time
        scored = (4 + levels + scheme.left.rows * (2 + captured)) * v.width
        tower = max(tower, round(e * called * scored) + logits * (4 + e))
        if called < rows:  # and what earlier pieces gave
            tower += e * (rows - called) * (1 + levels) * v.width
    pixels = e * rows * v.channels * v.temporal_patch * v.patch**2
    returned = rows * v.width * (2 if v.side is not None else 1) if stock else 0
    length = prompt.rest + prompt.total
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    block = 3 * text.width + max(2 * queries + 2 * keys + text.width, 3 * text.mlp)
    weights = text.heads * below**2 * (4 + e) if eager else 0
    features = (v.projectors + (levels if stock else 0)) * prompt.total * text.width + length * text.width
    return {
        "weights": prompt.weights,
        "cache": cache_bytes(prompt, scheme, entering),
        "pixels": pixels,
        "tower": tower,
        "decoder": e * (below * block + features + returned) + weights + 4 * text.vocab,
    }


def memory_gib(prompt: Prompt, scheme: Scheme, entering: int, *, eager: bool = False) -> float:
    """Peak GiB of the prompt: weights, pixels, and the larger of the tower's and the decoder's (with its cache)."""
    parts = memory_parts(prompt, scheme, entering, eager=eager)
    return (parts["weights"] + parts["pixels"] + max(parts["tower"], parts["decoder"] + parts["cache"])) / GIB


__all__ = [
    "GIB",
    "STAGES",
    "Clip",
    "Prompt",
    "Scheme",
    "flops_share",
    "memory_gib",
    "memory_parts",
    "predict",
    "steps_of",
]
