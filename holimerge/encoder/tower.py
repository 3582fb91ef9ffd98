"""A vision tower as its family describes it, and the hooks that make its stock blocks work on less for one call.

On entering a block its arguments are swapped for shorter ones; behind the last block every row is back in its place,
with the features of the frame or token that stands for it. No forward of transformers is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..spans import Spans, spans_left

Hooks = list[tuple[Any, str, Any]]


@dataclass(frozen=True)
class Tower:
    """One call of a vision tower.

    blocks: those that make the features, in order; called with the hidden states first.
    videos: (T, P) of each video: frames (temporal steps) and rows of the hidden states for each.
    output: the module that returns every hidden state, where frames are the batch of the hidden states, [F, P, C]; None
        where all rows are one sequence [S, C], called with `cu_seqlens` and `position_embeddings`, and no attention
        leaves a frame.
    states: which of those hidden states are read (0 is what enters the first block).
    readers: modules that read hidden states between the blocks of a sequence (deepstack).
    windows: rows of consecutive parts of the frames, inside which tokens may merge; empty for the frames themselves.
    unit: consecutive rows that stay together.
    fixed: leading rows of a frame that never merge.
    names: of a block's modules, dotted: what its MLP's input comes from, its MLP, its attention, and the module of that
        whose output holds keys.
    spans: what is known of the attention spans of a sequence.
    """

    blocks: Sequence[Any]
    videos: list[tuple[int, int]]
    output: Any = None
    states: Sequence[int] = ()
    readers: Sequence[Any] = ()
    windows: Sequence[int] = ()
    unit: int = 1
    fixed: int = 0
    names: tuple[str, str, str, str] = ("norm2", "mlp", "attn", "qkv")
    spans: Spans = field(default_factory=Spans)

    @property
    def batched(self) -> bool:
        """Whether frames are the batch of the hidden states."""
        return self.output is not None

    @property
    def attentions(self) -> list[Any]:
        """The attention of every block."""
        return [block.get_submodule(self.names[2]) for block in self.blocks]

    @property
    def rows(self) -> int:
        """Rows of all videos."""
        return sum(t * p for t, p in self.videos)


@dataclass
class EncoderReport:
    """What the tower worked on in the last prompt.

    kind: frames, tokens or gate.
    total: rows of hidden states that each block would have seen (class tokens among them), all videos together.
    rows: those that each block did see.
    frames: per video, the frames (temporal steps) that the last block saw.
    pairs: query-key pairs of a head in each block, where parts of frames were left of a sequence; else empty.
    """

    kind: str
    total: int = 0
    rows: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Rows seen as a share of those that there are, over all blocks."""
        return sum(self.rows) / (self.total * len(self.rows)) if self.rows and self.total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "kind": self.kind,
            "total": self.total,
            "rows": self.rows,
            "frames": self.frames,
            "share": round(self.share, 6),
        }

    def add(self, total: int, rows: list[int], frames: list[int], pairs: list[int] | None = None) -> None:
        """Count another call of the tower."""
        self.total += total
        self.rows = [a + b for a, b in zip(self.rows or [0] * len(rows), rows, strict=True)]
        self.frames += frames
        if pairs:
            self.pairs = [a + b for a, b in zip(self.pairs or [0] * len(pairs), pairs, strict=True)]


class Run:
    """One call of a tower, with hooks for `holimerge.capture.captured`."""

    def __init__(self, tower: Tower, layers: list[int], report: EncoderReport) -> None:
        self.tower, self.layers, self.report = tower, layers, report
        self.seen = [0] * len(tower.blocks)  # rows
        self.kept: Tensor | None = None  # [S'] ascending, the rows whose places are left in a sequence; None for all
        self.at = -1  # the block that runs
        self._left = False  # the last block of a sequence has run
        self._swapped: dict[int, tuple[Any, Any]] = {}  # shorter arguments by the id of the long ones, which stay alive
        for block in tower.blocks:
            if block.training and getattr(block, "gradient_checkpointing", False):
                raise ValueError(
                    "encoder: gradient checkpointing would compute the tower's blocks again without the merge; turn it "
                    "off, or use a configuration without an encoder block"
                )

    def enter(self, block: int, hidden: Tensor) -> Tensor:
        """The hidden states that a block is to see."""
        raise NotImplementedError

    def restored(self, hidden: Tensor, block: int) -> Tensor:
        """[F, P, C] or [S, C]: every row again, from what a block returned."""
        raise NotImplementedError

    def spread(self, received: Tensor) -> Tensor:
        """[F, P] or [S]: received attention of every row from that of the rows the last block saw.

        A row takes its part of what stands for it: all of a merged frame's row, 1/s of a merged token of s.
        """
        raise NotImplementedError

    def frames(self) -> list[int]:
        """Frames of each video that are left."""
        return [t for t, _ in self.tower.videos]

    def parts_left(self) -> list[tuple[int, int]]:
        """Of consecutive parts of a sequence (rows, rows that the block which runs sees)."""
        raise NotImplementedError

    def spans_left(self, lengths: list[int]) -> list[int]:
        """Lengths of the spans of what is left of a sequence whose spans had these, empty ones left out."""
        return spans_left(lengths, self.parts_left())

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[F, 1, 1 or n, n]: what a batch of frames adds to the logits of its attention."""
        return None

    def query_weight(self) -> Tensor | None:
        """[F, n] or [S'], how many rows each query of the last block stands for; None for one each."""
        return None

    def widened(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rotary tables for the width that keys have."""
        return tables

    def count(self) -> None:
        """Note what the call worked on."""
        self.report.add(self.tower.rows, self.seen, self.frames())

    def hooks(self) -> Hooks:
        tower = self.tower
        hooks: Hooks = [(block, "arguments", self._entering(i)) for i, block in enumerate(tower.blocks)]
        if tower.batched:
            return [*hooks, (tower.output, "replace", self._all_states)]
        hooks += [(reader, "swap", self._read) for reader in tower.readers]
        return [*hooks, (tower.blocks[-1], "replace", self._leave)]

    def _read(self, hidden: Tensor) -> Tensor:
        return hidden if self._left else self.restored(hidden, self.at)

    def _leave(self, hidden: Tensor) -> Tensor:
        hidden = self._read(hidden)
        self._left = True
        self.count()
        return hidden

    def _all_states(self, output: Any) -> Any:
        # hidden state i + 1 is what block i returned
        output.hidden_states = tuple(
            self.restored(x, i - 1) if i and i in self.tower.states else x for i, x in enumerate(output.hidden_states)
        )
        self.count()
        return output

    def _entering(self, block: int) -> Callable[[Any, Any], Any]:
        def swap(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            self.at = block
            hidden, *rest = args  # every tower hands it over by place
            shorter = self.enter(block, hidden)
            self.seen[block] = shorter.shape[:-1].numel()
            if not self.tower.batched:
                return (shorter, *rest), kwargs if self.kept is None else self._shorter(kwargs, self.kept)
            bias = self.bias(shorter.dtype)
            if bias is None:
                return (shorter, *rest), kwargs
            return (shorter, bias), {k: v for k, v in kwargs.items() if k != "attention_mask"}

        return swap

    def _shorter(self, kwargs: dict[str, Any], kept: Tensor) -> dict[str, Any]:
        """A block's arguments for a sequence of which only the rows `kept` are left."""

        def once(value: Any, make: Callable[[], Any]) -> Any:
            if id(value) not in self._swapped:
                self._swapped[id(value)] = (value, make())
            return self._swapped[id(value)][1]

        spans, tables = kwargs["cu_seqlens"], kwargs["position_embeddings"]

        def ends() -> Tensor:
            known = self.tower.spans
            return known.marked(self.spans_left(known.stock(spans)), spans)

        return {
            **kwargs,
            "cu_seqlens": once(spans, ends),
            "position_embeddings": once(tables, lambda: self.widened(tuple(table[kept] for table in tables))),
        }

    def shorten(self, kept: Tensor | None) -> None:
        """From now on only these rows are left (None where frames are a batch)."""
        self.kept = kept
        self._swapped.clear()
