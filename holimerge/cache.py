"""A cache that holds fewer tokens than the caller counts.

`generate` and multi-turn code ask a cache how many tokens it has seen; masks need to know how many it holds. After a
reduction the two differ, and above the inner merge's layer it holds fewer still. The class of the cache object is
swapped for a subclass that answers each question with the right number; nothing else about it changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache as memoize
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer


@dataclass(frozen=True)
class CacheState:
    """What a reduction left behind in a cache.

    hidden: tokens the caller counts that layer 0 does not hold (equal for all rows: rows are padded).
    mask: [B, P] bool, which of layer 0's first P entries are tokens and not padding; later entries all are.
    padded: whether `mask` has a False.
    dropped: [B] int64, tokens that really left each row (the rest of `hidden` is padding).
    axis_shift: [3, B] int64, how far mRoPE positions moved (contiguous positions only), else None.
    inner_layer: k, or None if there was no inner merge.
    inner_mask: [B, P'] bool, the same as `mask` for layers k and above.
    inner_padded: whether `inner_mask` has a False.
    contiguous: the rule the positions of its tokens follow.
    whole: how many of the last columns of `mask` come after every reduced video: what may be cropped.
    """

    hidden: int
    mask: Tensor
    padded: bool
    dropped: Tensor
    axis_shift: Tensor | None = None
    inner_layer: int | None = None
    inner_mask: Tensor | None = None
    inner_padded: bool = False
    contiguous: bool = False
    whole: int = 0

    def rows(self, index: Tensor) -> CacheState:
        """The state of the rows `index` [B'] int64."""

        def pick(x: Tensor, dim: int = 0) -> Tensor:
            return x.index_select(dim, index.to(x.device))

        return replace(
            self,
            mask=pick(self.mask),
            dropped=pick(self.dropped),
            axis_shift=None if self.axis_shift is None else pick(self.axis_shift, 1),
            inner_mask=None if self.inner_mask is None else pick(self.inner_mask),
        )


class _MergedCache(Cache):
    """Mixed in before the cache's own class."""

    _holimerge: CacheState | None
    _stock: type[Cache]

    def __reduce__(self) -> Any:
        return _restored, (self._stock, self.__dict__)

    def held(self, layer: int = 0) -> int:
        """Entries layer `layer` holds, padding included."""
        return int(super().get_seq_length(layer))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, as the caller counts them."""
        state = self._holimerge
        if state is None:
            return super().get_seq_length(layer_idx)
        return super().get_seq_length(0) + state.hidden

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Where the next query stands among the entries this layer holds."""
        return super().get_seq_length(layer_idx)

    def reset(self) -> None:
        super().reset()
        self._holimerge = None
        for layer in self.layers:
            room = layer.__dict__.pop("_holimerge_room", None)
            if room is not None and isinstance(layer, StaticLayer):  # made for more than the prompt now forgotten
                layer.max_cache_len, layer.is_initialized = room, False
                layer.keys = layer.values = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # the deprecated meaning: the length to keep, in the caller's count
            tokens_to_remove = min(0, tokens_to_remove - int(self.get_seq_length()))
        state = self._holimerge
        if state is not None:
            free = self.held() - state.mask.shape[1] + state.whole
            if -tokens_to_remove > free:
                raise ValueError(
                    f"crop: {-tokens_to_remove} tokens reach into a reduced video, which cannot be cut; at most the "
                    f"last {free} can be removed; keep a copy of the cache from before the video, or start a new one"
                )
        super().crop(tokens_to_remove)
        if state is not None and (cut := state.mask.shape[1] - self.held()) > 0:
            inner = state.inner_mask
            self._holimerge = replace(
                state,
                mask=state.mask[:, :-cut],
                inner_mask=None if inner is None else inner[:, :-cut],
                whole=state.whole - cut,
            )

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._holimerge is not None:
            rows = torch.arange(self._holimerge.mask.shape[0], device=self._holimerge.mask.device)
            self._select(rows.repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        if self._holimerge is not None:
            index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
            self._holimerge = self._holimerge.rows(index)


@memoize
def _merged_class(cls: Any) -> type[Cache]:
    return type(f"Merged{cls.__name__}", (_MergedCache, cls), {"_stock": cls})


def _restored(cls: Any, attributes: dict[str, Any]) -> Cache:
    """A copied or unpickled cache."""
    cache = cls.__new__(_merged_class(cls))
    cache.__dict__.update(attributes)
    return cache


def cache_state(cache: Cache | None) -> CacheState | None:
    """The state a reduction left in this cache, or None."""
    return cache._holimerge if isinstance(cache, _MergedCache) else None


def held_length(cache: Cache | None, layer: int = 0) -> int:
    """Entries a layer of the cache holds (padding included, 0 without a cache)."""
    if cache is None:
        return 0
    return cache.held(layer) if isinstance(cache, _MergedCache) else int(cache.get_seq_length(layer))


def set_cache_state(cache: Cache, state: CacheState) -> None:
    """Leave `state` in the cache, in place."""
    if not isinstance(cache, _MergedCache):
        cls: Any = type(cache)
        cache.__class__ = _merged_class(cls)
    cache._holimerge = state  # type: ignore[attr-defined]


def make_smaller(cache: Cache | None, entries: int, first: int = 0) -> None:
    """Take room for so many entries from the layers of a static cache, from `first` on, that hold nothing yet."""
    for layer in [] if cache is None or entries < 1 else cache.layers[first:]:
        if type(layer) is StaticLayer and not layer.is_initialized:
            layer.__dict__.setdefault("_holimerge_room", layer.max_cache_len)
            layer.max_cache_len -= entries
