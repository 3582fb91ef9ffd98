"""Analytic FLOPs of a video LLM with and without token reduction; needs no model, no weights and no torch.

Two conventions, never mixed:

* `paper` (HoliTom, arXiv 2505.21334; taken over from FastV): multiply-accumulates of the LLM prefill over the video
  tokens alone, ``sum over layers of 4 n d^2 + 2 n^2 d + 2 n d m``. It assumes multi-head attention and an MLP of two
  matrices and leaves out text, vision tower, projector and the reduction itself.
* `exact`: floating point operations (multiply-adds times two) of every matrix product, convolution and attention of
  one prompt, as `torch.utils.flop_counter` counts them: attention is the full n^2 (causal is not halved); norms,
  softmax, activations, rotary embeddings, interpolation and means are not counted.

Vocabulary: T frames, N tokens per frame entering the LLM unreduced, K kept tokens, k the inner layer. A model with a
temporal patch (Qwen: 2) makes one *step* out of that many frames; its T x N is steps x tokens per step.
The sizes are in `holimerge.shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from .shapes import Grid, ModelShape, TextShape, VisionShape, shape_of, window_rows

__all__ = [
    "Cost",
    "ModelShape",
    "TextShape",
    "TowerWork",
    "VisionShape",
    "cluster_cost",
    "decode_cost",
    "decoder_layer",
    "exact_cost",
    "inner_cost",
    "inner_kept",
    "largest_budget",
    "llm_prefill_exact",
    "lm_head",
    "merging_tokens",
    "paper_prefill",
    "paper_tokens",
    "project",
    "shape_of",
    "tower",
    "tower_work",
]

At = Literal["projector_output", "projector_input"]
SEGMENT_CHUNK = 64  # density-peak clustering: segments padded and batched together


@dataclass(frozen=True)
class Cost:
    """FLOPs by stage of one prompt (batch of one row)."""

    vision: int
    received_attention: int
    projector: int
    reduction: int
    prefill: int
    inner: int
    lm_head: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def decoder_layer(text: TextShape, rows: int, keys: int) -> int:
    """FLOPs of one decoder layer for `rows` new tokens that attend to `keys` tokens, themselves included."""
    d, queries = text.width, text.heads * text.head_dim
    projections = 2 * d * (2 * queries + 2 * text.kv_heads * text.head_dim)
    return rows * (projections + 6 * d * text.mlp + 4 * queries * keys)


def lm_head(text: TextShape, rows: int = 1) -> int:
    """FLOPs of the logits at `rows` positions."""
    return 2 * rows * text.width * text.vocab


@dataclass(frozen=True)
class TowerWork:
    """What a reduction inside the tower leaves its blocks to do for one video.

    embedded: temporal steps whose patches are embedded (fewer only behind a gate).
    blocks: per block (steps, patches of each in attention, patches of each in the MLP).
    matched: per block the FLOPs of comparing tokens in each step.
    pairs: per block the query-key pairs of a head, all steps together, where they do not follow from `blocks`; where
        steps differ, a step in `blocks` is a single patch.
    """

    embedded: int
    blocks: tuple[tuple[int, int, int], ...]
    matched: tuple[int, ...] = ()
    pairs: tuple[int, ...] = ()


def merging_tokens(
    vision: VisionShape, steps: int, grid: Grid | None, layers: Sequence[int], gone: Callable[[int, int, int, int], int]
) -> TowerWork:
    """The work where tokens of each step, or of each of its windows (a token being the patches that one of the LLM's
    takes in a tower with a merger, else a patch), merge in each of these blocks, as many as `gone` says
    (`holimerge.encoder.options.Tokens.gone`). It depends on no video."""
    cells, unit = vision.frame_grid(grid), vision.merge**2
    windows = window_rows(cells, vision.window) if vision.window else [cells[0] * cells[1]]
    totals = [rows // unit for rows in windows]
    left = totals
    blocks, matched, pairs = [], [], []
    for block in range(vision.layers):
        less = [0] * len(left)
        if block in layers:
            place = list(layers).index(block)
            less = [min(gone(place, len(layers), n, m), m // 2) for n, m in zip(totals, left, strict=True)]
        compared = sum((m - m // 2) * (m // 2) for m, gone_here in zip(left, less, strict=True) if gone_here)
        matched.append(2 * compared * unit * (vision.width // vision.heads))
        seen = sum(left) * unit
        blocks.append((steps, seen, seen - sum(less) * unit))
        whole = not vision.window or block in vision.full_layers
        pairs.append(steps * (seen**2 if whole else sum((m * unit) ** 2 for m in left)))
        left = [m - n for m, n in zip(left, less, strict=True)]
    return TowerWork(steps, tuple(blocks), tuple(matched), tuple(pairs))


def tower_work(vision: VisionShape, encoder: Any, steps: int, grid: Grid | None, seen: Any = None) -> TowerWork | None:
    """What an `encoder` block leaves of the tower's work on one video; None for all of it.

    seen: the `EncoderReport` of that video. Only merged tokens can be counted without.
    """
    if encoder is None:
        return None
    if encoder.tokens is not None:
        layers = encoder.tokens.resolve("tokens", vision.layers)
        return merging_tokens(vision, steps, grid, layers, encoder.tokens.gone)
    if seen is None or not seen.rows:
        return None
    embedded = sum(seen.frames) if encoder.gate is not None else steps
    if seen.pairs:
        return TowerWork(embedded, tuple((rows, 1, 1) for rows in seen.rows), pairs=tuple(seen.pairs))
    height, width = vision.frame_grid(grid)
    blocks = tuple((rows // (height * width), height * width, height * width) for rows in seen.rows)
    return TowerWork(embedded, blocks)


def tower(vision: VisionShape, steps: int, grid: Grid | None = None, work: TowerWork | None = None) -> int:
    """FLOPs of patch embedding and all blocks of the vision tower over `steps` temporal steps (images for SigLIP).

    work: what a reduction inside the tower leaves. The eight channels that carry the sizes of merged tokens in the keys
    of Qwen towers are not counted.
    """
    grid = vision.frame_grid(grid)
    n, d = grid[0] * grid[1], vision.width
    blocks = ((steps, n, n),) * vision.layers if work is None else work.blocks
    embed = 2 * n * vision.channels * vision.temporal_patch * vision.patch**2 * d
    total = embed * (steps if work is None else work.embedded)
    for block, (left, attended, transformed) in enumerate(blocks):
        pairs = work.pairs[block] if work is not None and work.pairs else left * vision.attention_pairs(grid, block)
        mlp = (3 if vision.gated else 2) * d * vision.mlp
        total += left * (2 * attended * 4 * d * d + 2 * transformed * mlp) + 4 * d * pairs
    if work is not None:
        total += steps * sum(work.matched)
    if vision.head:
        left, _, read = blocks[-1]
        total += left * (4 * d * d + 4 * read * d * d + 4 * read * d + 4 * d * vision.mlp)
    return total


def project(vision: VisionShape, rows: int) -> int:
    """FLOPs of the projector(s) on `rows` input rows."""
    wide, hidden, out = vision.projector
    return 2 * vision.projectors * rows * (wide * hidden + hidden * out)


def paper_tokens(frames: int, tokens: int, retain: float) -> int:
    """T ceil(r N), the token count of HoliTom's tables; 1e-9 keeps float error from adding a token to every frame."""
    return frames * math.ceil(retain * tokens - 1e-9)


def paper_prefill(text: TextShape, n: int, n_after: int | None = None, inner_layer: int | None = None) -> float:
    """Multiply-accumulates of the prefill in the paper's convention: 4 n d^2 + 2 n^2 d + 2 n d m summed over layers.

    Layers 0..k-1 see `n` tokens, layers k.. see `n_after` (n // 2 in the paper). Source: HoliTom, arXiv 2505.21334,
    main table (40.8 T for LLaVA-OneVision-7B with 32 x 196 tokens).
    """
    _inner_layer(text, n_after, inner_layer)

    def layer(count: int) -> int:
        return 4 * count * text.width**2 + 2 * count**2 * text.width + 2 * count * text.width * text.mlp

    if n_after is None or inner_layer is None:
        return float(text.layers * layer(n))
    return float(inner_layer * layer(n) + (text.layers - inner_layer) * layer(n_after))


def llm_prefill_exact(
    text: TextShape, tokens: int, tokens_after: int | None = None, inner_layer: int | None = None, *, logits: int = 1
) -> int:
    """FLOPs of the decoder over a prompt of `tokens` (video, separators and text) and of `logits` lm_head rows.

    With the inner merge, layers `inner_layer`.. see `tokens_after`. The merge itself is `inner_cost`.
    """
    _inner_layer(text, tokens_after, inner_layer)
    head = lm_head(text, logits)
    if tokens_after is None or inner_layer is None:
        return text.layers * decoder_layer(text, tokens, tokens) + head
    return (
        inner_layer * decoder_layer(text, tokens, tokens)
        + (text.layers - inner_layer) * decoder_layer(text, tokens_after, tokens_after)
        + head
    )


def inner_cost(text: TextShape, tokens: int, dropped: int, kept: int, *, matched: bool = True) -> int:
    """FLOPs of the inner merge: one query row, its scores against `tokens` keys, cosines of dropped x kept tokens.

    `matched` is False for ``merge: drop``, which compares nothing.
    """
    scores = 2 * text.heads * text.head_dim * (text.width + tokens)
    return scores + (2 * dropped * kept * text.width if matched else 0)


def decode_cost(text: TextShape, cache: int, cache_after: int | None = None, inner_layer: int | None = None) -> int:
    """FLOPs of one generated token, lm_head included.

    It attends to itself and to `cache` earlier tokens in layers below `inner_layer`, to `cache_after` from there on.
    """
    _inner_layer(text, cache_after, inner_layer)
    if cache_after is None or inner_layer is None:
        return text.layers * decoder_layer(text, 1, cache + 1) + lm_head(text)
    above = (text.layers - inner_layer) * decoder_layer(text, 1, cache_after + 1)
    return inner_layer * decoder_layer(text, 1, cache + 1) + above + lm_head(text)


def cluster_cost(static_sets: Sequence[int], width: int, chunk: int = SEGMENT_CHUNK) -> int:
    """FLOPs of the density-peak distance matrices: at most `chunk` consecutive segments are batched, each padded to
    the largest static set among them, 2 S n_max^2 width per batch."""
    batches = (static_sets[i : i + chunk] for i in range(0, len(static_sets), chunk))
    return sum(2 * len(batch) * max(batch) ** 2 * width for batch in batches)


def exact_cost(
    shape: ModelShape,
    *,
    frames: int,
    grid: Grid | None = None,
    text_tokens: int,
    entering: int,
    separators: int,
    after_inner: int | None = None,
    inner_layer: int | None = None,
    at: At = "projector_output",
    static_sets: Sequence[int] = (),
    scored: bool = False,
    logits: Literal["last", "all"] = "last",
    matched: bool = True,
    decision_width: int | None = None,
    work: TowerWork | None = None,
) -> Cost:
    """FLOPs of one prompt (one row, one video) by stage, multiply-adds times two.

    frames: frames given to the tower (before temporal patching).
    grid: (rows, columns) of patches of a frame, only for towers of free resolution.
    text_tokens: prompt tokens that are neither video tokens nor separators. separators: newlines and the like.
    entering: video tokens entering layer 0 (T x N if nothing is removed).
    after_inner, inner_layer: video tokens that layers k.. see; both or neither.
    at: where the outer reduction happens; before the projector only the source patches of the kept tokens are
        projected (4 taps for each LLaVA token, its own 4 patches for each Qwen token, also in Qwen3-VL's deepstack
        mergers); if nothing is removed the stock projector runs.
    static_sets: sizes of the static sets that are clustered, in segment order.
    scored: an outer reduction ran that needs received attention (q k^T of one tower layer, for every frame). The
        cosines of neighbouring frames are elementwise products, no matrix work, and not counted.
    logits: "all" counts the caller's prompt length, which a patched model restores.
    matched: False for an inner ``merge: drop``.
    decision_width: width of the features that decide, default `VisionShape.decision_width` before the projector and
        the LLM's width after it.
    work: what a reduction inside the tower leaves its blocks to do.
    """
    if at not in ("projector_output", "projector_input"):
        raise ValueError(f"at: {at!r}; valid: projector_output, projector_input")
    if logits not in ("last", "all"):
        raise ValueError(f"logits: {logits!r}; valid: last, all")
    text, vision = shape.text, shape.vision
    steps, cells = vision.steps(frames), vision.frame_grid(grid)
    full = steps * vision.tokens_per_step(grid)
    if not 0 <= entering <= full:
        raise ValueError(f"entering: {entering} is not between 0 and the video's {full} tokens")
    if after_inner is not None and not 0 <= after_inner <= entering:
        raise ValueError(f"after_inner: {after_inner} is not between 0 and the {entering} tokens entering the LLM")
    rest = text_tokens + separators
    patches = cells[0] * cells[1]
    rows = steps * patches // vision.merge**2
    if at == "projector_input" and entering < full:
        rows = entering * vision.rows_per_token
    width = decision_width or (vision.decision_width if at == "projector_input" else text.width)
    inner = 0
    if after_inner is not None:
        inner = inner_cost(text, rest + entering, entering - after_inner, after_inner, matched=matched)
    return Cost(
        vision=tower(vision, steps, grid, work),
        received_attention=2 * steps * patches**2 * vision.width if scored else 0,
        projector=project(vision, rows),
        reduction=cluster_cost(static_sets, width),
        prefill=llm_prefill_exact(
            text, rest + entering, None if after_inner is None else rest + after_inner, inner_layer, logits=0
        ),
        inner=inner,
        lm_head=lm_head(text, 1 if logits == "last" else rest + full),
    )


def inner_kept(entering: int, retain: float) -> int:
    """Video tokens left after the inner merge: round(V x retain), at least one."""
    return max(1, round(entering * retain))


def largest_budget(
    text: TextShape,
    *,
    share: float,
    total_tokens: int,
    text_tokens: int,
    inner_layer: int | None = None,
    inner_retain: float | None = None,
) -> int:
    """The largest K in 1..total_tokens whose LLM prefill costs at most `share` of the unpatched one.

    Both sides are `llm_prefill_exact` with the lm_head on the last token; the reduced side has the inner merge where
    it is configured, the unpatched side never. text_tokens: everything in the prompt that is not a video token,
    separators included. `share` is taken as the decimal that was written (0.3 is 3/10). Raises ValueError where not
    even one video token fits, with the smallest share that does.
    """
    if not 0 < share <= 1:
        raise ValueError(f"budget.flops: {share} is not a share above 0 and at most 1")
    if total_tokens < 1:
        raise ValueError(f"total_tokens: {total_tokens}; a budget needs at least one video token")
    if (inner_layer is None) != (inner_retain is None):
        raise ValueError("inner_layer and inner_retain: give both or neither")

    def cost(kept: int) -> int:
        after = None if inner_retain is None else text_tokens + inner_kept(kept, inner_retain)
        return llm_prefill_exact(text, text_tokens + kept, after, inner_layer)

    full = llm_prefill_exact(text, text_tokens + total_tokens)
    limit = Fraction(str(share)) * full
    if cost(1) > limit:
        minimum = math.ceil(Fraction(cost(1), full) * 10**6) / 10**6
        raise ValueError(f"budget.flops: {share} leaves no video token; the smallest share that fits is {minimum}")
    low, high = 1, total_tokens
    while low < high:  # cost grows with K
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle - 1)
    return low


def _inner_layer(text: TextShape, after: int | None, layer: int | None) -> None:
    if (after is None) != (layer is None):
        raise ValueError("the tokens after the inner layer and the layer itself: give both or neither")
    if layer is not None and not 1 <= layer < text.layers:
        raise ValueError(f"inner layer: {layer} is not between 1 and {text.layers - 1}")
