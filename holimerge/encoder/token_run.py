"""Tokens that merge inside blocks of a tower, between attention and MLP.

A block computes x + mlp(norm(x)). Its norm is shown the merged tokens and the MLP's output is spread to their members;
the mean of the members, taken on entering the next block, is then the merged token plus its MLP, as the method has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spans import Batches, by_length
from .options import Tokens
from .tokens import TokenMerge, match_tokens
from .tower import EncoderReport, Hooks, Run, Tower

EXTRA = 8  # channels added to each head of queries and keys; kernels want multiples of eight


@dataclass(frozen=True)
class State:
    """Per part of the hidden states: the token that holds each original one [W, n0], and how many each holds [W, n]."""

    owner: list[Tensor]
    size: list[Tensor]


class TokenRun(Run):
    """Tokens, `tower.unit` rows each, merge inside windows: frames, or what a tower has of its own. Windows of one size
    lose equally many, and make a part."""

    def __init__(self, tower: Tower, layers: list[int], report: EncoderReport, options: Tokens) -> None:
        super().__init__(tower, layers, report)
        self.options = options
        windows = tower.windows or [p for t, p in tower.videos for _ in range(t)]
        self.windows = [rows // tower.unit for rows in windows]
        sizes = list(dict.fromkeys(self.windows))
        self.kinds = [sizes.index(n) for n in self.windows]  # the part of each
        self.counts = [(self.windows.count(n), n) for n in sizes]
        self._order: dict[tuple[Any, ...], Batches] = {}
        self.state: State | None = None  # until something merges
        self._plans: dict[int, list[TokenMerge]] = {}  # by block
        self._before: list[State | None] = []  # what each block saw

    def hooks(self) -> Hooks:
        hooks = super().hooks()
        norm, mlp, attention, keys = self.tower.names
        for i in [] if self.options.nothing else self.layers:
            block = self.tower.blocks[i]
            hooks += [
                (block.get_submodule(attention).get_submodule(keys), "replace", self._matching(i)),
                (block.get_submodule(norm), "swap", lambda x, i=i: self._merged(x, i)),
                (block.get_submodule(mlp), "replace", lambda x, i=i: self._spread(x, i)),
            ]
        if not self.tower.batched and not self.options.nothing:
            for block in self.tower.blocks[self.layers[0] + 1 :]:
                module = block.get_submodule(attention)
                # queries, keys and values of one layer, or each of its own
                layers = {keys: (0, 1, 2)} if keys == "qkv" else {"q": (0,), keys: (1,), "v": (2,)}
                hooks += [
                    (module.get_submodule(name), "replace", lambda x, m=module, of=of: self._widen(x, m, of))
                    for name, of in layers.items()
                ]
                hooks.append((module.proj, "swap", lambda x, m=module: self._narrow(x, m)))
        return hooks

    # ------------------------------------------------------------------ rows and tokens

    def _parts(self, counts: list[int], device: torch.device) -> Batches:
        """Where the windows lie in the sequence, when those of each part have so many tokens."""
        key = (*counts, device)
        if key not in self._order:
            self._order[key] = by_length([counts[kind] for kind in self.kinds], device, self.kinds)
        return self._order[key]

    def _split(self, tokens: Tensor, counts: list[int]) -> list[Tensor]:
        """[W, n, ...] of each part, whose windows have n tokens, from the tokens of the sequence."""
        sizes = [many * n for (many, _), n in zip(self.counts, counts, strict=True)]
        parts = self._parts(counts, tokens.device).grouped(tokens).split(sizes)
        return [part.unflatten(0, (many, -1)) for part, (many, _) in zip(parts, self.counts, strict=True)]

    def _tokens(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """[W, n, unit C] of each part, whose windows have n tokens."""
        return self._split(rows.reshape(-1, rows.shape[-1] * self.tower.unit), counts)

    def _in_place(self, parts: list[Tensor]) -> Tensor:
        """[tokens, ...] in the order of the sequence; parts: [W, n, ...]."""
        flat = torch.cat([part.flatten(0, 1) for part in parts])
        return self._parts([part.shape[1] for part in parts], flat.device).in_place(flat)

    def _rows(self, parts: list[Tensor]) -> Tensor:
        if self.tower.batched:
            return parts[0]
        return self._in_place(parts).unflatten(1, (self.tower.unit, -1)).flatten(0, 1)

    def _sizes(self, state: State | None, device: torch.device) -> list[Tensor]:
        return state.size if state else [torch.ones(t, n, device=device) for t, n in self.counts]

    def _merged(self, rows: Tensor, block: int) -> Tensor:
        """The rows that a block's attention saw, merged by its plan."""
        plans = self._plans.get(block, [])
        if all(plan.nothing for plan in plans):
            return rows
        parts = self._tokens(rows, [plan.owner.shape[1] for plan in plans])
        sizes = self._sizes(self._before[block], rows.device)
        return self._rows([plan.merged(x, size) for plan, x, size in zip(plans, parts, sizes, strict=True)])

    def _spread(self, rows: Tensor, block: int) -> Tensor:
        """The rows that a block's MLP saw, for every row that its attention saw."""
        plans = self._plans[block]
        if all(plan.nothing for plan in plans):
            return rows
        parts = self._tokens(rows, [plan.kept.shape[1] for plan in plans])
        return self._rows([plan.spread(x) for plan, x in zip(plans, parts, strict=True)])

    def _after(self, block: int, device: torch.device) -> State | None:
        before, plans = self._before[block], self._plans.get(block, [])
        if all(plan.nothing for plan in plans):
            return before
        sizes = [plan.sizes(size) for plan, size in zip(plans, self._sizes(before, device), strict=True)]
        if before is None:
            return State([plan.owner for plan in plans], sizes)
        return State([plan.owner.gather(1, o) for plan, o in zip(plans, before.owner, strict=True)], sizes)

    # ------------------------------------------------------------------ what hooks call

    def _matching(self, block: int) -> Callable[[Tensor], None]:
        attention = self.tower.blocks[block].get_submodule(self.tower.names[2])

        @torch.no_grad()
        def match(output: Tensor) -> None:
            x = output.detach()
            if self.tower.names[3] == "qkv":
                keys = x.unflatten(-1, (3, attention.num_heads, -1))[..., 1, :, :]
            else:
                keys = x.unflatten(-1, (-1, attention.head_dim))
            counts = [size.shape[1] for size in self._sizes(self.state, x.device)]
            parts = self._tokens(keys.mean(-2, dtype=torch.float32), counts)
            place, blocks = self.layers.index(block), len(self.layers)
            with torch.autocast(x.device.type, enabled=False):
                self._plans[block] = [
                    match_tokens(part, self.options.gone(place, blocks, total, part.shape[1]), self.tower.fixed)
                    for part, (_, total) in zip(parts, self.counts, strict=True)
                ]

        return match

    def enter(self, block: int, hidden: Tensor) -> Tensor:
        if block:
            hidden = self._merged(hidden, block - 1)
            before, self.state = self.state, self._after(block - 1, hidden.device)
            if self.state is not None and self.state is not before:
                self.shorten(None if self.tower.batched else self._places(self.state))
        self._before.append(self.state)
        return hidden

    def _places(self, state: State) -> Tensor:
        """[S']: the rows whose places are left. A merged token stands where the token of set B stood."""
        device, unit = state.size[0].device, self.tower.unit
        kept = self._split(torch.arange(sum(self.windows), device=device), [n for _, n in self.counts])
        for block in sorted(self._plans):
            kept = [x.gather(1, plan.kept) for x, plan in zip(kept, self._plans[block], strict=True)]
        return (self._in_place(kept)[:, None] * unit + torch.arange(unit, device=device)).flatten()

    def parts_left(self) -> list[tuple[int, int]]:
        assert self.state is not None
        unit, left = self.tower.unit, [size.shape[1] for size in self.state.size]
        return [(n * unit, left[kind] * unit) for n, kind in zip(self.windows, self.kinds, strict=True)]

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        if self.state is None:
            return None
        return self.state.size[0].log().to(dtype)[:, None, None, :]

    def _widen(self, rows: Tensor, attention: Any, of: tuple[int, ...]) -> Tensor:
        """Log sizes as one more channel of keys, against ones in the queries: attention of any kernel adds them.

        of: which of queries 0, keys 1 and values 2 the rows hold, side by side.
        """
        if self.state is None:
            return rows
        # rotary tables turn the halves of a head's channels
        x = rows.unflatten(-1, (len(of), attention.num_heads, 2, -1))
        more = x.new_zeros(*x.shape[:-1], EXTRA // 2)
        if 0 in of:
            more[:, of.index(0), :, 0, 0] = 1
        if 1 in of:
            sizes = (self._per_row(self.state).log() / attention.scaling).to(x.dtype)
            more[:, of.index(1), :, 0, 0] = sizes[:, None]
        return torch.cat([x, more], dim=-1).flatten(1)

    def widened(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        def wide(table: Tensor, fill: float) -> Tensor:
            halves = table.unflatten(-1, (2, -1))
            return torch.cat([halves, halves.new_full((*halves.shape[:-1], EXTRA // 2), fill)], dim=-1).flatten(-2)

        cos, sin = tables
        return wide(cos, 1.0), wide(sin, 0.0)

    def _narrow(self, rows: Tensor, attention: Any) -> Tensor:
        if self.state is None:
            return rows
        x = rows.unflatten(-1, (attention.num_heads, 2, -1))
        return x[..., : -(EXTRA // 2)].flatten(-3)

    # ------------------------------------------------------------------ behind the tower

    def restored(self, hidden: Tensor, block: int) -> Tensor:
        state = self._after(block, hidden.device)
        return hidden if state is None else self._every(self._merged(hidden, block), state)

    def _every(self, rows: Tensor, state: State) -> Tensor:
        parts = self._tokens(rows, [size.shape[1] for size in state.size])
        index = [owner[..., None].expand(-1, -1, x.shape[-1]) for owner, x in zip(state.owner, parts, strict=True)]
        return self._rows([x.gather(1, i) for x, i in zip(parts, index, strict=True)])

    def spread(self, received: Tensor) -> Tensor:
        state = self._before[-1]
        if state is None:
            return received
        share = received[..., None] / self._per_row(state)[..., None]
        return self._every(share, state)[..., 0]

    def query_weight(self) -> Tensor | None:
        state = self._before[-1]
        return None if state is None else self._per_row(state)

    def _per_row(self, state: State) -> Tensor:
        """[F, n] or [S']: the size of the token that each row belongs to."""
        if self.tower.batched:
            return state.size[0]
        return self._in_place(state.size).repeat_interleave(self.tower.unit)
