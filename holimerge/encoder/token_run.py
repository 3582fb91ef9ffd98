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

from .options import Tokens
from .tokens import TokenMerge, match_tokens
from .tower import EncoderReport, Hooks, Run, Tower

EXTRA = 8  # channels added to each head of queries and keys; kernels want multiples of eight


@dataclass(frozen=True)
class State:
    """Per part of the hidden states: the token that holds each original one [T, n0], and how many each holds [T, n]."""

    owner: list[Tensor]
    size: list[Tensor]


class TokenRun(Run):
    """Parts are videos, or all of them at once where frames are a batch; tokens are `tower.unit` rows each."""

    def __init__(self, tower: Tower, layers: list[int], report: EncoderReport, options: Tokens) -> None:
        super().__init__(tower, layers, report)
        self.options = options
        videos = tower.videos
        if tower.batched:
            videos = [(sum(t for t, _ in videos), videos[0][1])]
        self.counts = [(t, p // tower.unit) for t, p in videos]
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
                hooks += [
                    (module.get_submodule(keys), "replace", lambda x, m=module: self._widen(x, m)),
                    (module.proj, "swap", lambda x, m=module: self._narrow(x, m)),
                ]
        return hooks

    # ------------------------------------------------------------------ rows and tokens

    def _tokens(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """[T, n, unit C] of each part, which has n tokens per frame."""
        flat = rows.reshape(-1, rows.shape[-1] * self.tower.unit)
        sizes = [t * n for (t, _), n in zip(self.counts, counts, strict=True)]
        return [part.unflatten(0, (t, -1)) for part, (t, _) in zip(flat.split(sizes), self.counts, strict=True)]

    def _rows(self, parts: list[Tensor]) -> Tensor:
        if self.tower.batched:
            return parts[0]
        return torch.cat([part.flatten(0, 1) for part in parts]).unflatten(1, (self.tower.unit, -1)).flatten(0, 1)

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
        parts, start, unit = [], 0, self.tower.unit
        for (frames, count), kept in zip(self.counts, self._kept(state), strict=True):
            tokens = (torch.arange(frames, device=kept.device)[:, None] * count + kept).flatten()
            parts.append((start + tokens[:, None] * unit + torch.arange(unit, device=kept.device)).flatten())
            start += frames * count * unit
        return torch.cat(parts)

    def _kept(self, state: State) -> list[Tensor]:
        """[T, n] of each part: the original token in whose place each one stands."""
        device = state.size[0].device
        kept = [torch.arange(n, device=device).expand(t, -1) for t, n in self.counts]
        for block in sorted(self._plans):
            kept = [x.gather(1, plan.kept) for x, plan in zip(kept, self._plans[block], strict=True)]
        return kept

    def rows_left(self) -> list[int]:
        assert self.state is not None
        return [size.shape[1] * self.tower.unit for size in self.state.size for _ in range(size.shape[0])]

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        if self.state is None:
            return None
        return self.state.size[0].log().to(dtype)[:, None, None, :]

    def _widen(self, qkv: Tensor, attention: Any) -> Tensor:
        """Log sizes as one more channel of keys, against ones in the queries: attention of any kernel adds them."""
        if self.state is None:
            return qkv
        x = qkv.unflatten(-1, (3, attention.num_heads, 2, -1))  # rotary tables turn the halves of a head's channels
        more = x.new_zeros(*x.shape[:-1], EXTRA // 2)
        more[:, 0, :, 0, 0] = 1
        more[:, 1, :, 0, 0] = (self._per_row(self.state).log() / attention.scaling).to(x.dtype)[:, None]
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
        return torch.cat([s.flatten() for s in state.size]).repeat_interleave(self.tower.unit)
