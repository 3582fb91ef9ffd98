"""Milliseconds by stage and peak memory of a prompt, from sizes and from what a device was measured to do.

Every matrix product, attention and pass over the activations of the stock classes (transformers 5.23) is looked up in
the device's tables and summed; the stages are those of `holimerge.report.Report.milliseconds`, and `other` (token
embedding, lm_head, `generate` itself). Memory is arithmetic alone: weights, the cache, and the largest set of
activations alive at once. Both are of one prompt (a batch of one row), and never fall when a token is added.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cost import inner_kept, llm_prefill_exact
from ..shapes import Grid, ModelShape, TextShape
from .device import Device

STAGES = ("vision", "reduce", "project", "splice", "prefill", "other")
GIB = 2**30
_RMS = ("qwen2_5_vl",)  # towers with RMS norms; the others have layer norms


@dataclass(frozen=True)
class Clip:
    """One video of a prompt: temporal steps and, where the resolution is free, (rows, columns) of patches."""

    steps: int
    grid: Grid | None = None


@dataclass(frozen=True)
class Scheme:
    """What of a configuration costs time.

    method: of the outer reduction; None for the stock model. at: where it works. layer, retain: of the inner merge.
    chunk: temporal steps per call of the tower. tower_share: FLOPs that a setting inside the vision tower leaves of
    it; 1 without one.
    """

    method: str | None = "holitom"
    at: str = "projector_input"
    layer: int | None = None
    retain: float | None = None
    chunk: int | None = None
    tower_share: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """One row: a model's shape, its videos, and everything that is no video token (`rest`, separators included).

    weights: bytes. element: bytes of an activation.
    """

    shape: ModelShape
    clips: tuple[Clip, ...]
    rest: int
    weights: int = 0
    element: int = 4

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
    reduced = scheme.method is not None
    ms = dict.fromkeys(STAGES, 0.0)
    share = entering / max(1, prompt.total)
    for clip in prompt.clips:
        ms["vision"] += _vision(prompt, device, scheme, clip)
        if reduced:
            kept = share * prompt.tokens(clip)
            width = _decision_width(prompt.shape, scheme)
            steps = clip.steps
            ms["reduce"] += device.reduce_ms(str(scheme.method), steps, prompt.tokens(clip) // steps, width)
            ms["project"] += _project(prompt, device, scheme, clip, kept)
    length, text = prompt.rest + prompt.total, prompt.shape.text
    if reduced:
        ms["splice"] = device.overhead.get("splice", 0.0) + _passes(device, 5, length * text.width)
    ms["prefill"] = _prefill(prompt, device, scheme, entering)
    ms["other"] = (
        device.overhead.get("other", 0.0)
        + _passes(device, 4, length * text.width)
        + device.matmul_ms(1, text.width, text.vocab)
    )
    return ms


def _passes(device: Device, count: float, elements: float) -> float:
    return count * device.elementwise_ms("copy", elements)


def _decision_width(shape: ModelShape, scheme: Scheme) -> int:
    return shape.vision.decision_width if scheme.at == "projector_input" else shape.text.width


def tower_layer(device: Device, shape: ModelShape, patches: int, attention: float) -> float:
    """One block of the vision tower over `patches` rows. attention: ms of its attention calls."""
    v = shape.vision
    n, d, m = patches, v.width, v.mlp
    flat = shape.model_type in ("llava_onevision", "llava_video")
    products = [(d, d)] * 4 if flat else [(d, 3 * d), (d, d)]
    products += [(d, m)] * (2 if v.gated else 1) + [(m, d)]
    norm = "rmsnorm" if shape.model_type in _RMS else "layernorm"
    ms = attention + sum(device.matmul_ms(n, a, b) for a, b in products)
    ms += 2 * device.elementwise_ms(norm, n * d) + 2 * device.elementwise_ms("add", n * d)
    ms += device.elementwise_ms("silu_mul" if v.gated else "gelu", n * m)
    ms += 2 * device.elementwise_ms("transpose", n * d)
    if not flat:
        ms += 2 * device.elementwise_ms("rotary_fused", n * d)
    return ms + device.overhead.get("tower_layer", 0.0)


def _vision(prompt: Prompt, device: Device, scheme: Scheme, clip: Clip) -> float:
    v, shape = prompt.shape.vision, prompt.shape
    cells = v.frame_grid(clip.grid)
    per_step = cells[0] * cells[1]
    width = v.width // v.heads
    ms = device.overhead.get("vision", 0.0)
    for steps in _pieces(clip.steps, scheme.chunk):
        rows = steps * per_step
        blocks = 0.0
        for block in range(v.layers):
            attention = sum(
                device.attention_ms(n, v.heads * parallel, width, causal=False, calls=calls)
                for n, parallel, calls in _spans(shape, cells, block, steps)
            )
            blocks += tower_layer(device, shape, rows, attention)
        ms += blocks * scheme.tower_share
        convolution = device.overhead.get(f"convolution_{1 + v.temporal_patch}", 1.0)
        ms += convolution * device.matmul_ms(rows, v.channels * v.temporal_patch * v.patch**2, v.width)
        ms += _passes(device, 2, rows * v.channels * v.temporal_patch * v.patch**2)
        ms += device.elementwise_ms("layernorm", rows * v.width)
    rows = clip.steps * per_step
    if scheme.method is not None:
        ms += device.received_ms(clip.steps, v.heads, per_step)
        ms += _passes(device, 2, rows * v.width)  # the queries and keys that were captured
    if scheme.method is None or scheme.at == "projector_output":
        ms += _projector(device, shape, rows // v.merge**2)
    if v.pooled:
        late = scheme.method is None or scheme.at == "projector_output"
        ms += device.elementwise_ms("pool", rows * (shape.text.width if late else v.width))
    return ms


def _pieces(steps: int, chunk: int | None) -> list[int]:
    if chunk is None or chunk >= steps:
        return [steps]
    return [chunk] * (steps // chunk) + ([steps % chunk] if steps % chunk else [])


def _spans(shape: ModelShape, cells: Grid, block: int, steps: int) -> list[tuple[float, int, int]]:
    """(length, attentions computed together, calls) of a block's attention over `steps` frames."""
    v = shape.vision
    whole = cells[0] * cells[1]
    if v.side is not None:  # frames are a batch
        return [(whole, steps, 1)]
    if not v.window or block in v.full_layers:
        return [(whole, 1, steps)]
    rows, columns = ([v.window] * (edge // v.window) + [edge % v.window] * bool(edge % v.window) for edge in cells)
    return [(r * c, 1, steps) for r in rows for c in columns]


def _projector(device: Device, shape: ModelShape, rows: float) -> float:
    """All projectors over `rows` of their input."""
    wide, hidden, out = shape.vision.projector
    one = device.matmul_ms(rows, wide, hidden) + device.matmul_ms(rows, hidden, out)
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
    products = [(d, queries), (d, keys), (d, keys), (queries, d), (d, text.mlp), (d, text.mlp), (text.mlp, d)]
    ms = sum(device.matmul_ms(n, a, b) for a, b in products)
    ms += device.attention_ms(n, text.heads, text.head_dim, causal=True)
    ms += 2 * device.elementwise_ms("rmsnorm", n * d) + 2 * device.elementwise_ms("add", n * d)
    ms += device.elementwise_ms("silu_mul", n * text.mlp)
    ms += device.elementwise_ms("rotary", n * queries) + device.elementwise_ms("rotary", n * keys)
    ms += 2 * device.elementwise_ms("transpose", n * keys)  # into the cache
    ms += device.elementwise_ms("transpose", n * queries)
    if head_norms:
        ms += device.elementwise_ms("rmsnorm", n * queries) + device.elementwise_ms("rmsnorm", n * keys)
    return ms + device.overhead.get("decoder_layer", 0.0)


def _prefill(prompt: Prompt, device: Device, scheme: Scheme, entering: int) -> float:
    text = prompt.shape.text
    below, above = prompt.lengths(entering, scheme)
    normed = prompt.shape.model_type == "qwen3_vl"
    ms = device.overhead.get("prefill", 0.0)
    layer = text.layers if scheme.layer is None else scheme.layer
    ms += layer * decoder_layer_ms(device, text, below, head_norms=normed)
    ms += (text.layers - layer) * decoder_layer_ms(device, text, above, head_norms=normed)
    ms += device.elementwise_ms("rmsnorm", above * text.width)
    if scheme.layer is not None and entering:
        dropped, kept = below - above, above - prompt.rest
        ms += device.overhead.get("inner", 0.0) + device.matmul_ms(dropped, text.width, kept)
        ms += _passes(device, 6, below * text.width)
    if prompt.shape.model_type == "qwen3_vl":  # deepstack: added to the first layers
        ms += (prompt.shape.vision.projectors - 1) * _passes(device, 2, below * text.width)
    return ms


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

    The tower's are gone when the decoder runs, but the features (and the prompt's embeddings) stay. eager: attention
    holds its weights, one layer at a time.
    """
    text, v, e = prompt.shape.text, prompt.shape.vision, prompt.element
    below, _ = prompt.lengths(entering, scheme)
    tower = pixels = 0
    for clip in prompt.clips:
        cells = v.frame_grid(clip.grid)
        patches = cells[0] * cells[1]
        steps = max(_pieces(clip.steps, scheme.chunk))
        block = 3 * v.width + max(4 * v.width, (3 if v.gated else 2) * v.mlp)
        weights = v.heads * steps * patches**2 * (4 + e) if eager and v.side else 0
        late = scheme.method is None or scheme.at == "projector_output"
        rows = clip.steps * patches
        after = rows // v.merge**2 * (v.projector[1] + v.projector[2]) + rows * v.width if late else 2 * rows * v.width
        tower = max(tower, e * max(steps * patches * block, after) + weights)
        pixels += e * rows * v.channels * v.temporal_patch * v.patch**2
    length = prompt.rest + prompt.total
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    block = 3 * text.width + max(2 * queries + 2 * keys + text.width, 3 * text.mlp)
    weights = text.heads * below**2 * (4 + e) if eager else 0
    features = v.projectors * prompt.total * text.width + length * text.width
    return {
        "weights": prompt.weights,
        "cache": cache_bytes(prompt, scheme, entering),
        "pixels": pixels,
        "tower": tower,
        "decoder": e * (below * block + features) + weights + 4 * text.vocab,
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
]
