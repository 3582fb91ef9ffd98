"""Taking dropped tokens out of a batch of sequences and putting outputs back in their places.

Rows of a batch lose different numbers of tokens. The kept ones are packed to the right (left padding), with their
positions and masks; the language model's output is scattered back to the caller's length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from .cache import CacheState, cache_state, held_length, set_cache_state
from .call import PROMPT
from .positions import new_positions
from .tokens import upload

if TYPE_CHECKING:
    from .call import Call, Source


@dataclass
class Packing:
    """A packed batch.

    index: [B, P] int64, the caller's column of every packed entry; padding names columns that nobody kept.
    real: [B, P] bool, entries that are tokens.
    lengths: tokens in each row, on the host.
    moved: whether entries left their columns (else `index` is the identity).
    lossless: whether all entries of all rows are there, if in other columns.
    arguments: what the language model gets in place of the caller's arguments.
    prior: [B, C] bool or None, the cache's entries that are tokens (None: all of them, or no cache).
    prior_padded: whether `prior` has a False.
    later: [B, n] bool or None, the part of `prior` that the cache's state did not know.
    state: what to leave in the cache after the forward.
    video: [B, P] bool, entering video tokens, separators excluded; counts: their number in each row, on the host.
    sizes: [B, P] float32, how many original tokens each entry holds (1 for text).
    """

    index: Tensor
    real: Tensor
    lengths: list[int]
    moved: bool
    lossless: bool
    arguments: dict[str, Any]
    cache: Cache | None
    prior: Tensor | None
    prior_padded: bool
    later: Tensor | None
    state: CacheState
    video: Tensor
    counts: list[int]
    sizes: Tensor


@dataclass
class Continuation:
    """A forward over a shortened cache.

    new: [B, L] bool or None (all tokens), which new entries are tokens.
    later: [B, n] bool or None (all tokens), which of the cache's entries that `state` does not know are tokens.
    arguments: what the layers from the inner merge's on get, built at the first of them.
    """

    state: CacheState
    new: Tensor | None
    later: Tensor | None
    length: int
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def padded(self) -> bool:
        """Whether layer 0 needs a mask."""
        return self.state.padded or self.new is not None or self.later is not None

    def known(self, known: Tensor, held: int) -> Tensor:
        """[B, held + L] bool: a cache's entries, of which the state knows the first ones, and the new ones."""
        before = extended(known, held, self.later)
        return extended(before, held + self.length, self.new)

    def mask(self, known: Tensor, cache: Cache, layer: int = 0) -> Tensor:
        """[B, C] bool: the same for one layer, up to the last column that its masks look at.

        What a static layer has not used yet counts as tokens: it comes after every query.
        """
        width = int(sum(cache.get_mask_sizes(self.length, layer)))  # a window's masks begin at an offset
        if self.new is not None or self.later is not None:
            known = self.known(known, held_length(cache, layer))
        return extended(known, width)


def right_aligned(keep: Tensor, width: int) -> Tensor:
    """[B, width] int64: the columns of the kept entries in order, at the right; others in order before them."""
    return keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]


def token_mask(
    call: Call, mask: Any, batch: int, length: int, cache: Cache | None, device: torch.device
) -> Tensor | None:
    """[B, seen + L] bool, which of the caller's tokens are no padding; None: all are.

    Raises:
        ValueError: a custom 4-D mask, which cannot be shortened.
    """
    if isinstance(mask, dict):  # one per kind of layer, each maybe None; a linear layer's is about the new tokens alone
        mask = next((value for kind, value in mask.items() if kind != "linear_attention"), None)
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask.to(device).bool().expand(batch, -1)
    if cache is None or not cache.is_compileable:
        raise ValueError(
            f"a custom attention mask of shape {tuple(mask.shape)} cannot be shortened with the sequence; "
            "pass the 2-D padding mask"
        )
    # Prepared by `generate` for a static cache, by the number of tokens that the cache holds. What the caller gave:
    prompt = PROMPT.get()
    given = None if prompt is None or prompt.handle is not call.handle else prompt.attention_mask
    if given is not None and given.ndim == 2:
        given = given.to(device).bool()
        given = given.repeat_interleave(batch // given.shape[0], dim=0)  # beams
        return extended(given, call.seen + length)
    if cache_state(cache) is not None:
        return None
    # its last query sees every token there is
    seen = mask[:, 0, -1, : held_length(cache) + length]
    seen = seen if seen.dtype == torch.bool else seen == 0
    return seen.to(device).expand(batch, -1)


def _prior(
    cache: Cache | None, state: CacheState | None, mask: Tensor | None, call: Call
) -> tuple[Tensor | None, bool]:
    """Which of the cache's entries are tokens, and whether some are not."""
    held = held_length(cache)
    if held == 0:
        return None, False
    if state is not None:
        later = later_entries(state, held, mask, call)
        padded = state.padded or (later is not None and not bool(later.all()))
        return extended(state.mask, held, later), padded
    if mask is None or mask.shape[1] < held:
        return None, False
    prior = mask[:, :held]
    return prior, not bool(prior.all())


def later_entries(state: CacheState, held: int, mask: Tensor | None, call: Call) -> Tensor | None:
    """[B, n] bool: which of the entries after those that `state` knows are tokens, by the caller's mask."""
    count = held - state.mask.shape[1]
    if mask is None or count <= 0 or mask.shape[1] < call.seen:
        return None
    return mask[:, call.seen - count : call.seen]


def extended(mask: Tensor, width: int, later: Tensor | None = None) -> Tensor:
    """A mask of a cache's first entries, extended by later ones (all tokens, if not given) to `width`, or cut to it."""
    missing = width - mask.shape[1]
    if missing <= 0:
        return mask[:, :width]
    more = mask.new_ones(mask.shape[0], missing) if later is None else later.to(mask)
    return torch.cat([mask, more], dim=1)


def joined(prior: Tensor | None, real: Tensor, held: int) -> Tensor:
    """[B, held + P] bool: the cache's entries and the new ones."""
    if held == 0:
        return real
    if prior is None:
        prior = real.new_ones(real.shape[0], held)
    return torch.cat([prior.to(real.device), real], dim=1)


def placeholder_values(sources: Iterable[Source], device: torch.device) -> tuple[Tensor, Tensor]:
    """Per column, how many original tokens it holds, and how far from it its token's anchor stands.

    Returns:
        sizes [B, L] float32 (1 for what is no video, 0 for a dropped token, -1 for a separator) and offset [B, L]
        int64 (not 0 only out of raster order).
    """
    sizes, offsets = torch.empty(0), torch.empty(0)
    for number, source in enumerate(sources):
        mask = source.mask.to(device)
        if number == 0:
            sizes = torch.ones(mask.shape, device=device)
            offsets = torch.zeros(mask.shape, dtype=torch.long, device=device)
        assert source.placements is not None
        values = [placement.values for placement in source.placements]
        if not values:
            continue
        sizes = sizes.masked_scatter(mask, torch.cat([size.to(device) for size, _ in values]))
        if any(not p.record.raster for p in source.placements):
            # text may stand between placeholders, so that a step among them is more than a step in the sequence
            first = accumulate((p.placeholders for p in source.placements), initial=0)
            anchor = torch.cat([place.to(device) + start for (_, place), start in zip(values, first, strict=False)])
            column = (~mask).flatten().long().argsort(stable=True)[: anchor.shape[0]] % mask.shape[1]
            offsets = offsets.masked_scatter(mask, column[anchor] - column)
    return sizes, offsets


def pack(call: Call, kwargs: dict[str, Any], cache: Cache | None) -> Packing | None:
    """Pack the arguments of the language model; None if they can stay as they are.

    Args:
        call: the running call; its videos' features are in `inputs_embeds`, dropped rows marked by NaN.
        kwargs: the language model's arguments.
        cache: the cache it will write to.
    """
    handle = call.handle
    embeds: Tensor = kwargs["inputs_embeds"]
    batch, length, _ = embeds.shape
    device = embeds.device
    state = cache_state(cache)
    placeholder = call.video_mask.to(device)
    dropping = call.dropping
    if not dropping and not handle.force_packing and handle.inner is None and state is None:
        return None
    columns = token_mask(call, kwargs.get("attention_mask"), batch, length, cache, device)
    if columns is not None and columns.shape[1] > length:  # also of a chunk of a longer prompt
        columns = columns[:, : call.seen + length]
    valid = torch.ones(batch, length, dtype=torch.bool, device=device) if columns is None else columns[:, -length:]
    if call.placements is not None:
        sizes, offset = placeholder_values(call.sources.values(), device)
        marked = placeholder & (sizes == 0)
    else:  # a chunk of a prompt: only the features themselves still tell
        sizes = torch.ones(batch, length, device=device)
        offset = torch.zeros(batch, length, dtype=torch.long, device=device)
        marked = placeholder & embeds[..., 0].isnan() & dropping
    keep = valid & ~marked
    dropped = valid & marked

    video = placeholder & keep & (sizes > 0)
    # the one read of the device: how long the rows become, and how many video tokens and placeholders they hold
    tail = (keep & ~(dropped | video).flip(1).cummax(1).values.flip(1)).sum(1)  # what comes after all videos
    held_by = [source.mask.to(device).sum(1) for source in call.sources.values()]
    visual = _visual(kwargs, device)
    if visual is not None:
        held_by.append((visual & keep).sum(1))
    numbers = torch.stack([keep.sum(1), dropped.sum(1), video.sum(1), tail, *held_by]).tolist()
    lengths, gone, counts, after = numbers[:4]
    if call.placements is not None:
        for source, placeholders in zip(call.sources.values(), numbers[4:], strict=False):
            source.rows_of(placeholders)  # refuses a row that ends inside a video

    moved = any(gone) or handle.force_packing
    if not moved and handle.inner is None and state is None:
        return None
    # a chunk of dropped tokens alone still needs one entry, which is padding
    width = max(1, *lengths) if any(gone) else length
    if handle.recurrent and any(gone) and held_length(cache) and min(lengths) < width:
        raise ValueError(
            "this model's linear layers cannot skip padding after the first tokens, and the rows of this batch keep "
            "different numbers of tokens in a later turn; run the rows one by one"
        )
    index = right_aligned(keep, width) if moved else torch.arange(length, device=device).expand(batch, -1)
    real = keep.gather(1, index)
    prior, prior_padded = _prior(cache, state, columns, call)
    held = held_length(cache)
    padded = prior_padded or min(lengths) < width

    arguments: dict[str, Any] = {}
    if moved:
        packed = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        # padding that stands for a dropped token holds NaN; other padding stays what it was
        arguments["inputs_embeds"] = packed.masked_fill(marked.gather(1, index)[..., None], 0)
        if visual is not None:
            arguments |= _deepstack(kwargs["deepstack_visual_embeds"], visual, keep, index, real, sum(numbers[-1]))
    if any(gone) or state is not None:
        # An explicit mask wherever there is no cache: without one, gapped positions would be read as packed sequences.
        needed = padded or cache is None
        arguments["attention_mask"] = joined(prior, real, held).long() if needed else None
    axis_shift = None if state is None else state.axis_shift
    if moved or state is not None:
        given = _with_axes(kwargs.get("position_ids"))
        given = (torch.arange(length, device=device) + call.seen)[None] if given is None else given.to(device)
        positions, axis_shift = new_positions(
            given.expand(*given.shape[:-2], batch, length),
            contiguous=handle.contiguous,
            placeholder=placeholder,
            keep=keep,
            dropped=dropped,
            offset=offset,
            state=state,
        )
        arguments["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-2], -1, -1))

    lost = upload(gone, device)
    after = CacheState(
        hidden=(state.hidden if state is not None else 0) + length - width,
        mask=joined(prior, real, held),
        padded=padded,
        dropped=lost if state is None else lost + state.dropped.to(device),
        axis_shift=axis_shift,
        contiguous=handle.contiguous,
        whole=min(after),
    )
    return Packing(
        index=index,
        real=real,
        lengths=lengths,
        moved=moved,
        lossless=not any(gone),
        arguments=arguments,
        cache=cache,
        prior=prior,
        prior_padded=prior_padded,
        later=None if state is None else later_entries(state, held, columns, call),
        state=after,
        video=video.gather(1, index),
        counts=counts,
        sizes=sizes.gather(1, index).clamp_min(1),
    )


def _with_axes(positions: Tensor | None) -> Tensor | None:
    """Positions [1, B, L] stand for three equal axes."""
    if positions is None or positions.ndim == 2 or positions.shape[0] > 1:
        return positions
    return positions.expand(3, -1, -1)


def _visual(kwargs: dict[str, Any], device: torch.device) -> Tensor | None:
    """[B, L] bool: the columns whose features are also added to the first layers' hidden states; None without any."""
    levels, where = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    return None if levels is None or where is None else where.to(device)


def _deepstack(
    levels: list[Tensor], where: Tensor, keep: Tensor, index: Tensor, real: Tensor, left: int
) -> dict[str, Any]:
    """The packed rows of such features, and where they go. left: how many of them are kept."""
    # a mask would ask the device how many they are
    columns = (~where).flatten().long().argsort(stable=True)[: levels[0].shape[0]]
    rows = (~keep.flatten()[columns]).long().argsort(stable=True)[:left]
    return {
        "visual_pos_masks": where.gather(1, index) & real,
        "deepstack_visual_embeds": [level[rows.to(level.device)] for level in levels],
    }


def continue_over(call: Call, kwargs: dict[str, Any], state: CacheState) -> dict[str, Any]:
    """The language model's arguments for a forward over a shortened cache (decoding, or a later turn of text)."""
    embeds, cache, mask = kwargs["inputs_embeds"], kwargs["past_key_values"], kwargs.get("attention_mask")
    length, device = embeds.shape[1], embeds.device
    new = later = None
    if length > 1 or not call.decoding:  # else nothing to ask: a static cache's lengths are on the device
        given = token_mask(call, mask, embeds.shape[0], length, cache, device)
        new = None if given is None else given[:, -length:]
        if new is not None and (length == 1 or bool(new.all())):  # `generate`'s new tokens are all real
            new = None
        later = later_entries(state, held_length(cache), given, call)
        if later is not None and not state.padded and bool(later.all()):
            later = None
    step = call.continuation = Continuation(state, new, later, length)
    arguments = dict(kwargs)
    arguments["attention_mask"] = None
    if step.padded:
        arguments["attention_mask"] = step.mask(state.mask.to(device), cache).long()
    positions = _with_axes(kwargs.get("position_ids"))
    dropped = state.dropped.to(device)[:, None]
    if positions is None:
        if call.handle.contiguous:
            arguments["position_ids"] = torch.arange(length, device=device) + call.seen - dropped
    elif positions.ndim == 2:
        if call.handle.contiguous:
            arguments["position_ids"] = positions - dropped
    else:
        axes = positions[-3:] if state.axis_shift is None else positions[-3:] - state.axis_shift.to(device)[..., None]
        arguments["position_ids"] = axes if positions.shape[0] == 3 else torch.cat([positions[:1] - dropped, axes])
    return arguments


def remember_continuation(call: Call, cache: Cache) -> None:
    """After a forward over padding that the state does not know: later forwards must know it."""
    step = call.continuation
    if step is None or (step.new is None and step.later is None):
        return
    state, inner, stage = step.state, step.state.inner_mask, call.handle.inner
    if inner is not None and stage is not None:
        inner = step.known(inner, held_length(cache, stage.measured) - step.length)
    mask = step.known(state.mask, held_length(cache) - step.length)
    set_cache_state(
        cache,
        replace(
            state,
            mask=mask,
            padded=True,
            inner_mask=inner,
            inner_padded=inner is not None,
            whole=state.whole + mask.shape[1] - state.mask.shape[1],
        ),
    )


def unpack(call: Call, output: Any) -> None:
    """Put the language model's output back to the caller's length, and leave the state in the cache."""
    packing = call.packing
    assert packing is not None
    index, real, state, lossless = packing.index, packing.real, packing.state, packing.lossless
    run = call.inner
    if run is not None and run.index is not None:
        assert run.real is not None
        index, real, lossless = index.gather(1, run.index.to(index.device)), run.real.to(index.device), False
    if run is not None:
        state = run.state_after(state)
    if packing.moved or not lossless:
        hidden = output.last_hidden_state
        index, real = index.to(hidden.device), real.to(hidden.device)
        length, depth = call.video_mask.shape[1], hidden.shape[-1]
        if lossless:  # a permutation: padding returns to its column too
            source = index.argsort(dim=1)
        else:
            # A column that is gone shows the last kept token before it, which is what predicts the next one: a prompt
            # may end in video tokens, an answer may follow them. Before the first kept one it shows that one.
            kept = torch.zeros(real.shape[0], length, dtype=torch.long, device=hidden.device)
            kept.scatter_(1, index, real.long())
            first = real.shape[1] - real.sum(1, keepdim=True)
            source = (first + (kept.cumsum(1) - 1).clamp_min(0)).clamp_max(real.shape[1] - 1)
        output.last_hidden_state = hidden.gather(1, source[..., None].expand(-1, -1, depth))
    nothing = packing.lossless and state.inner_layer is None and cache_state(packing.cache) is None
    if packing.cache is not None and not nothing:
        set_cache_state(packing.cache, state)
