"""Where the inner merge sits in a decoder: hooks on layer k - 1's attention and on layers k and above."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

from .attention import query_attention
from .cache import CacheState, cache_state, held_length, make_smaller
from .call import PROMPT
from .config import ConfigError, Inner
from .inner import choose_owners, merge_owned
from .splice import extended, joined, right_aligned
from .tokens import upload

if TYPE_CHECKING:
    from .call import Call
    from .handle import Handle
    from .splice import Packing


@dataclass
class InnerRun:
    """The inner merge of one prefill.

    query: [B] int64, the packed column whose attention ranks the video tokens.
    held, alike: entries that layer k's cache holds, and whether layer 0's holds as many.
    scores: [B, P] float32, filled at layer k - 1.
    index, real: [B, P'] columns of the packing that go on above layer k (None: all).
    owners: per row, the owner of each entering video token.
    compacted: how many entries the layers below k lost to `compact_cache`.
    arguments: what layers from k on get in place of the language model's; linear_mask: their mask if they are linear.
    """

    query: Tensor
    layer: int
    cache: Cache | None
    prior: Tensor | None = None
    prior_padded: bool = False
    held: int = 0
    alike: bool = True
    scores: Tensor | None = None
    index: Tensor | None = None
    real: Tensor | None = None
    padded: bool = False
    owners: list[Tensor] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    linear_mask: Tensor | None = None
    compacted: int = 0

    def state_after(self, state: CacheState) -> CacheState:
        """The cache's state with the shorter upper layers in it."""
        if self.real is None:  # nothing went, and the cache's layers are all alike
            return replace(state, inner_layer=self.layer, inner_mask=state.mask, inner_padded=state.padded)
        mask = joined(self.prior, self.real, self.held)
        state = replace(state, inner_layer=self.layer, inner_mask=mask, inner_padded=self.padded)
        if self.compacted:  # all layers hold the same now
            state = replace(state, hidden=state.hidden + self.compacted, mask=mask, padded=self.padded)
        return state


class InnerStage:
    """The inner merge of one patched model."""

    def __init__(self, handle: Handle, options: Inner) -> None:
        self.handle, self.options = handle, options
        config: Any = handle.lm.config
        self.layers: Any = handle.lm.layers
        depth, deepstack = len(self.layers), handle.family.deepstack(handle.core)
        self.types = list(getattr(config, "layer_types", None) or ["full_attention"] * depth)
        full = [i for i, kind in enumerate(self.types) if kind == "full_attention"]
        # full attention below it, whose scores rank the tokens; no windows above it; above what deepstack adds
        windows = [i for i, kind in enumerate(self.types) if kind not in ("full_attention", "linear_attention")]
        lowest = max([1, deepstack, *(i + 1 for i in windows)])
        valid = [i + 1 for i in full if lowest <= i + 1 <= max(full)]  # and some above it that keeps tokens
        self.layer = options.resolve(depth, valid)
        if self.layer not in valid:
            kinds = ", ".join(sorted(set(self.types)))
            added = f", and it adds features of its vision tower up to layer {deepstack - 1}" if deepstack else ""
            raise ConfigError(
                f"inner.layer: {self.layer} cannot be used: the layer below must be one of full attention, with no "
                f"windows above (this model has {kinds}{added}); valid: {', '.join(map(str, valid)) or 'none'}"
            )
        # where the shorter cache's length can be read: linear layers keep no tokens
        self.measured = next((i for i in full if i >= self.layer), self.layer)
        # the modules themselves: a user may wrap the entries of `layers` later
        self.first, self.first_measured = self.layers[self.layer], self.layers[self.measured]
        self.linear = [x for x, kind in zip(self.layers, self.types, strict=True) if kind == "linear_attention"]
        if options.compact_cache and windows:
            raise ConfigError(
                f"inner.compact_cache: layers of this model below layer {self.layer} attend to windows, whose caches "
                "cannot lose tokens; leave it out"
            )
        if (getattr(handle.model, "_tp_size", None) or 1) > 1:
            raise ConfigError(
                "inner: the model runs tensor-parallel, where each rank sees its own heads and would choose other "
                "tokens; remove the inner block or load the model without a tensor-parallel plan"
            )

    def attach(self) -> list[Any]:
        """Set the hooks and return them."""
        before = self.layers[self.layer - 1].self_attn
        hooks = [before.register_forward_hook(self._score, with_kwargs=True)]
        hooks += [
            layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True) for layer in self.layers[self.layer :]
        ]
        return hooks

    def check_cache(self, cache: Cache | None) -> None:
        """Refuse a later turn over a cache whose keys cannot be read."""
        below = self.layer - 1
        if cache is None or len(cache.layers) <= below or not held_length(cache, below):
            return
        store = cache.layers[below]
        if type(store) not in (DynamicLayer, StaticLayer):
            raise ValueError(
                f"the inner merge cannot read the keys of a {type(store).__name__} in a later turn; "
                "use a dynamic or static cache, or a configuration without an inner block"
            )

    def check_compact(self, cache: Cache | None) -> None:
        """Refuse a cache whose layers below k cannot lose tokens, where they should."""
        if not self.options.compact_cache or cache is None:
            return
        for store, linear in zip(cache.layers[: self.layer], self._kinds_below(), strict=False):
            if not linear and type(store) is not DynamicLayer:
                raise ValueError(
                    f"inner.compact_cache: a {type(store).__name__} cannot lose tokens; use a dynamic cache, or leave "
                    "compact_cache out"
                )

    def compact(self, call: Call) -> None:
        """After a prompt: take the merged tokens out of the cache's layers below k too, if that is wanted."""
        run, packing = call.inner, call.packing
        if not self.options.compact_cache or run is None or run.index is None or packing is None or run.cache is None:
            return
        new = packing.index.shape[1]
        for store, linear in zip(run.cache.layers[: self.layer], self._kinds_below(), strict=False):
            if linear:
                continue
            for name in ("keys", "values"):
                held: Tensor = getattr(store, name)
                where = run.index.to(held.device)[:, None, :, None]
                before, here = held[:, :, : held.shape[2] - new], held[:, :, held.shape[2] - new :]
                kept = here.gather(2, where.expand(-1, held.shape[1], -1, held.shape[3]))
                setattr(store, name, torch.cat([before, kept], dim=2))
        run.compacted = new - run.index.shape[1]

    def _kinds_below(self) -> list[bool]:
        """Whether each layer below k is linear."""
        return [kind == "linear_attention" for kind in self.types[: self.layer]]

    def begin(self, call: Call) -> None:
        """Before the language model runs on a packed prompt: find the query.

        Raises:
            ValueError: labels are given and a row with a video has no answer token, or a video stands after it.
        """
        packing = call.packing
        assert packing is not None
        query = _last(packing.real)
        if call.labels is not None:
            query = self._before_answer(call, call.labels.to(packing.real.device))
        elif (prompt := PROMPT.get()) is not None and prompt.handle is self.handle:
            # assisted generation runs guesses behind the prompt, in the same forward
            query = _last(packing.real & (packing.index < prompt.unseen))
        cache = packing.cache
        self.check_compact(cache)
        state = cache_state(cache)
        held = held_length(cache, self.measured)
        prior, padded = packing.prior, packing.prior_padded
        if state is not None and state.inner_mask is not None:
            prior = extended(state.inner_mask, held, packing.later)
            padded = state.inner_padded or (packing.later is not None and packing.prior_padded)
        alike = held == held_length(cache)
        call.inner = InnerRun(query, self.layer, cache, prior, padded, held, alike)

    def _before_answer(self, call: Call, labels: Tensor) -> Tensor:
        packing = call.packing
        assert packing is not None
        answer = labels != -100
        first = answer.long().argmax(1)
        with_video = upload([n > 0 for n in packing.counts], labels.device)
        for row in (with_video & (~answer.any(1) | (first == 0))).nonzero().flatten().tolist():
            raise ValueError(
                f"labels: row {row} has no answer token after its prompt (every label is -100, or the first is at 0), "
                "so the inner merge has no query; give labels, or none at all"
            )
        late = packing.video & (packing.index >= first[:, None])
        for row in (with_video & late.any(1)).nonzero().flatten().tolist():
            raise ValueError(f"labels: row {row} has video tokens after its first answer token")
        asked = _last(packing.real & (packing.index < first[:, None]))
        return torch.where(with_video, asked, _last(packing.real))

    # ------------------------------------------------------------------ hooks

    def _score(self, attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call, replay = self.handle.current(), self.handle.replay
        if call is None or call.inner is None or call.packing is None:
            return
        if replay is not None and replay.inner is not None:  # nothing is left to choose
            return
        self._rank(call, attention, args, kwargs)

    @torch.compiler.disable  # as all that happens once a prompt
    def _rank(self, call: Call, attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert call.inner is not None
        assert call.packing is not None
        assert call.report is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        with call.report.clock.stage("inner", hidden.device):
            call.inner.scores = self._scores(call.inner, call.packing, attention, hidden, kwargs)

    def _scores(
        self, run: InnerRun, packing: Packing, attention: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        batch, width, depth = hidden.shape
        query, real = run.query.to(hidden.device), packing.real.to(hidden.device)
        cos, sin = (_for_rows(x, batch) for x in kwargs["position_embeddings"])
        here = query[:, None]
        at_query = hidden.gather(1, here[..., None].expand(-1, -1, depth))
        q = self.handle.family.query(attention, at_query, *(_take(x, here) for x in (cos, sin))).squeeze(2)
        cache = packing.cache
        held = held_length(cache, self.layer - 1) - width if cache is not None else 0
        store: Any = cache.layers[self.layer - 1] if cache is not None else None
        if type(store) in (DynamicLayer, StaticLayer):
            keys = store.keys[:, :, : held + width].to(hidden.device)
        else:  # no cache, or one whose keys cannot be read
            if held:
                self.check_cache(cache)
            keys = self.handle.family.keys(attention, hidden, cos, sin)
        column = torch.arange(held + width, device=hidden.device)
        allowed = joined(packing.prior, real, held) & (column <= held + here)
        with torch.autocast(hidden.device.type, enabled=False):
            return query_attention(q, keys, allowed, attention.scaling)[:, held:]

    def _enter_layer(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = self.handle.current()
        if call is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if call.inner is not None:
            if layer is self.first:
                hidden = self._merged(call, hidden, kwargs)
            arguments = call.inner.arguments
            if arguments and self._linear(layer):
                arguments = {**arguments, "attention_mask": call.inner.linear_mask}
            return (hidden, *args[1:]), {**kwargs, **_on(arguments, hidden.device)}
        step = call.continuation
        if step is None or step.state.inner_layer is None:
            return None
        # The language model built one mask for all layers from layer 0's length; these layers hold fewer entries. A
        # linear layer's mask is about the new tokens alone.
        if self._linear(layer):
            return None
        if layer is self.first_measured:
            padded = step.state.inner_padded or step.new is not None or step.later is not None
            needed = kwargs.get("attention_mask") is not None or padded
            mask = None
            if needed:
                cache = kwargs["past_key_values"]
                inner_mask = step.state.inner_mask
                assert inner_mask is not None
                flat = step.mask(inner_mask.to(hidden.device), cache, self.measured) if padded else None
                mask = self._causal(hidden, flat, cache)
            step.arguments = {"attention_mask": mask, "position_ids": None} if needed else {}
        return args, {**kwargs, **_on(step.arguments, hidden.device)}

    def _linear(self, layer: nn.Module) -> bool:
        return any(layer is x for x in self.linear)

    # ------------------------------------------------------------------ the merge

    @torch.compiler.disable
    def _merged(self, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        assert call.report is not None
        off = torch.autocast(hidden.device.type, enabled=False)
        with call.report.clock.stage("inner", hidden.device), torch.no_grad(), off:
            owners = self._owners(call, hidden)
        return self._merge(call, hidden, owners, kwargs)

    def _owners(self, call: Call, hidden: Tensor) -> Tensor | None:
        """[B, V] int64, the owner of every entering video token; None if nothing goes."""
        packing, run, replay = call.packing, call.inner, self.handle.replay
        assert packing is not None
        assert run is not None
        most = max(packing.counts)
        device = hidden.device
        if replay is not None and replay.inner is not None:
            owners = torch.arange(most, device=device).repeat(len(packing.counts), 1)
            for row, owner in enumerate(replay.inner):
                if owner.shape[0] != packing.counts[row]:
                    raise ValueError(
                        f"the replayed selection has {owner.shape[0]} video tokens in row {row}, "
                        f"the prompt {packing.counts[row]}"
                    )
                owners[row, : owner.shape[0]] = owner.to(device)
            return owners
        keep = [self.options.keep(n) for n in packing.counts]
        if keep == packing.counts:
            # an earlier turn's merge left these layers a shorter cache, so that they need masks of their own
            return None if run.alike else torch.arange(most, device=device).repeat(len(keep), 1)
        assert run.scores is not None
        where = _columns(packing.video.to(device), most)
        states = hidden.detach().gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))
        return choose_owners(states, run.scores.gather(1, where), packing.counts, keep)

    def _merge(self, call: Call, hidden: Tensor, owners: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        packing, run = call.packing, call.inner
        assert packing is not None
        assert run is not None
        counts = packing.counts
        if owners is None:
            run.owners = [torch.arange(n, device=hidden.device) for n in counts]
            run.arguments = {}
            return hidden
        run.owners = [owners[row, :n] for row, n in enumerate(counts)]
        assert call.report is not None
        device = hidden.device
        with call.report.clock.stage("inner", device):
            batch, _, depth = hidden.shape
            most = owners.shape[1]
            position = torch.arange(most, device=device)
            where = _columns(packing.video.to(device), most)
            states = hidden.gather(1, where[..., None].expand(-1, -1, depth))
            sizes = packing.sizes.to(device).gather(1, where)
            states = merge_owned(states, sizes, owners, self.options.merge)
            # rows of padding in `where` are written back as they were
            hidden = hidden.scatter(1, where[..., None].expand(-1, -1, depth), states)
            # what the rest of `where` names, padding and text, owns itself and stays as it was
            keep = packing.real.to(device)
            keep = keep.scatter(1, where, keep.gather(1, where) & (owners == position))
            if self.handle.replay is None:
                lengths = [n - (v - self.options.keep(v)) for n, v in zip(packing.lengths, counts, strict=True)]
            else:
                lengths = keep.sum(1).tolist()
            width = max(lengths)
            if call.roomy:
                make_smaller(run.cache, keep.shape[1] - width, self.layer)
            run.index = right_aligned(keep, width)
            run.real = keep.gather(1, run.index)
            run.padded = run.prior_padded or min(lengths) < width
            hidden = hidden.gather(1, run.index[..., None].expand(-1, -1, depth))
            cos, sin = (_take(_for_rows(x, batch), run.index) for x in kwargs["position_embeddings"])
            flat = joined(run.prior, run.real, run.held) if run.padded else None
            run.linear_mask = run.real.long() if min(lengths) < width else None
            run.arguments = {
                "position_embeddings": (cos, sin),
                "attention_mask": self._causal(hidden, flat, run.cache),
                "position_ids": None,  # only flash attention reads them, to find packed sequences
            }
        return hidden

    def _causal(self, hidden: Tensor, mask: Tensor | None, cache: Cache | None) -> Any:
        return create_causal_mask(
            config=self.handle.lm.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=cache,
            layer_idx=self.measured,
        )


def _last(flags: Tensor) -> Tensor:
    """[B] int64: the last column that is true."""
    return flags.long().cumsum(1).argmax(1)


def _columns(flags: Tensor, most: int) -> Tensor:
    """[B, most] int64: the columns that are true, in order; then others."""
    return (~flags).long().argsort(dim=1, stable=True)[:, :most]


def _for_rows(x: Tensor, batch: int) -> Tensor:
    """A rotary table [..., 1 or B, L, d] for B rows."""
    return x.expand(*x.shape[:-3], batch, -1, -1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [..., B, L, d] by column index [B, P]."""
    where = index.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(-2, where.expand(*x.shape[:-3], -1, -1, -1))


def _on(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same arguments on a layer's device."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in arguments.items()}
