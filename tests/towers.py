"""The reductions of `holimerge.encoder` done by hand on a stock tower: every row stays, and merged rows are equal.

Frames do not see each other and a token of size s is s equal tokens to attention, so this must give the same features
and scores as towers that work on less. Gated patches are done frame by frame, each stock block called on its rows.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import oracle_encoder as oracle
import torch
from torch import Tensor

from holimerge.attention import received_attention
from holimerge.encoder.options import Encoder
from holimerge.encoder.stage import EncoderStage
from holimerge.encoding import Encoded, Request
from holimerge.registry import family_module
from holimerge.spans import Spans


def encoded(
    model: Any, x: dict[str, Tensor], options: dict[str, Any] | None, **request: Any
) -> tuple[list[Encoded], Any]:
    """What the family makes of the prompt's videos, and the report of the reduction inside its tower."""
    family, core = family_module(model.config.model_type).FAMILY, model.model
    names = ("pixel_values_videos", "video_grid_thw", "video_merge_sizes")
    arguments = {name: x[name] for name in names if name in x}
    stage = None if options is None else EncoderStage(Encoder(**options))
    asked = {"at": "projector_input", "scored": True, "chunk": None, **request}
    with torch.no_grad():
        found = family.encode(core, core.get_video_features, arguments, Request(**asked, encoder=stage))
    return found, stage.report if stage else None


def tower_of(model: Any, x: dict[str, Tensor]) -> Any:
    family, core = family_module(model.config.model_type).FAMILY, model.model
    videos = x["pixel_values_videos"]
    names = ("pixel_values_videos", "video_grid_thw")
    frames = [videos.shape[1]] * videos.shape[0] if videos.ndim == 5 else []
    return family.encoder_tower(core, {name: x[name] for name in names if name in x}, frames)


def frames_of(tower: Any, hidden: Tensor) -> list[Tensor]:
    """[P, C] of every frame of every video."""
    sizes = [p for t, p in tower.videos for _ in range(t)]
    return list(hidden.reshape(-1, hidden.shape[-1]).split(sizes))


@contextmanager
def frames_by_hand(model: Any, x: dict[str, Tensor], layers: list[int], **rule: Any) -> Iterator[list[int]]:
    """Frames that merge are equal from there on. Yields, in the end, how many different ones each video has."""
    tower, left = tower_of(model, x), []
    groups = [[[i] for i in range(t)] for t, _ in tower.videos]

    def merge(_module: Any, args: Any) -> Any:
        every, start, result = frames_of(tower, args[0]), 0, []
        for video, (t, _) in enumerate(tower.videos):
            mine = every[start : start + t]
            start += t
            different = torch.stack([mine[members[0]] for members in groups[video]]).double().numpy()
            merged = oracle.merged_frames(different, rule["similarity"], rule["longest"], rule["merge"])
            groups[video] = [[i for old in members for i in groups[video][old]] for members, _ in merged]
            new: list[Any] = [None] * t
            for members, (_, y) in zip(groups[video], merged, strict=True):
                for i in members:
                    new[i] = torch.from_numpy(y).float()
            result += new
        left[:] = [len(g) for g in groups]
        return (torch.cat(result).reshape(args[0].shape), *args[1:])

    hooks = [tower.blocks[layer].register_forward_pre_hook(merge) for layer in layers]
    try:
        yield left
    finally:
        for hook in hooks:
            hook.remove()


def windows_of(model: Any, x: dict[str, Tensor]) -> list[int]:
    """Rows of the parts of the blocks' sequence whose tokens may merge, counted: windows, or whole frames."""
    tower, visual = tower_of(model, x), getattr(model.model, "visual", None)
    if not hasattr(visual, "window_size"):
        return [p for t, p in tower.videos for _ in range(t)]
    found, edge = [], visual.window_size // visual.patch_size
    for t, h, w in x["video_grid_thw"].tolist():
        of_patch = Counter((row // edge, column // edge) for row in range(h) for column in range(w))
        found += [of_patch[window] for window in sorted(of_patch)] * t
    return found


@contextmanager
def tokens_by_hand(model: Any, x: dict[str, Tensor], layers: list[int], r: int) -> Iterator[None]:
    """Tokens that merge are equal from there on, all at the place of the first of their group."""
    tower = tower_of(model, x)
    norm, mlp, attention, _ = tower.names
    first = "layer_norm1" if norm == "layer_norm2" else "norm1"
    unit = tower.unit
    windows = windows_of(model, x)
    groups = [[[i] for i in range(p // unit)] for p in windows]

    def rows(group: list[int]) -> Tensor:
        """[s, unit]: the rows of a frame that belong to a group's tokens."""
        return torch.tensor(group)[:, None] * unit + torch.arange(unit)

    def places() -> Tensor:
        found, start = [], 0
        for frame in groups:
            place = torch.empty(sum(map(len, frame)) * unit, dtype=torch.long)
            for group in frame:
                place[rows(group)] = rows(group)[:1].expand(len(group), -1)
            found.append(start + place)
            start += len(place)
        return torch.cat(found)

    def block(i: int) -> Any:
        def instead(module: Any, args: Any, kwargs: Any, _output: Any) -> Tensor:
            hidden, given = args[0], dict(kwargs)
            if tower.batched:
                given["attention_mask"] = None
            else:
                given["position_embeddings"] = tuple(table[places()] for table in kwargs["position_embeddings"])
            seen: list[Tensor] = []
            keys = module.get_submodule(attention).get_submodule(tower.names[3])
            hook = keys.register_forward_hook(lambda _m, _a, out: seen.append(out))
            attended = module.get_submodule(attention)(getattr(module, first)(hidden), **given)
            hook.remove()
            hidden = hidden + (attended[0] if tower.batched else attended)
            if i in layers:
                hidden = merge(hidden, seen[0], module.get_submodule(attention))
            return hidden + getattr(module, mlp)(getattr(module, norm)(hidden))

        return instead

    def merge(hidden: Tensor, keys: Tensor, module: Any) -> Tensor:
        if tower.batched:
            keys = keys.unflatten(-1, (module.num_heads, -1)).mean(-2)
        else:
            keys = keys.chunk(3, -1)[1] if tower.names[3] == "qkv" else keys
            keys = keys.unflatten(-1, (module.num_heads, -1)).mean(-2)
        result = []
        flat = (y.reshape(-1, y.shape[-1]).split(windows) for y in (hidden, keys))
        for f, (frame, metric) in enumerate(zip(*flat, strict=True)):
            old = groups[f]
            of_group = torch.stack([metric[rows(group)[0]].flatten() for group in old]).double().numpy()
            groups[f] = [
                [i for g in merged for i in old[g]] for merged in oracle.merged_tokens(of_group, r, tower.fixed)
            ]
            new = frame.clone()
            for group in groups[f]:
                new[rows(group)] = frame[rows(group)].mean(0).expand(len(group), -1, -1)
            result.append(new)
        return torch.cat(result).reshape(hidden.shape)

    hooks = [b.register_forward_hook(block(i), with_kwargs=True, prepend=True) for i, b in enumerate(tower.blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def places_of(model: Any, x: dict[str, Tensor]) -> list[Tensor]:
    """[T, N, V]: pixels of every place of each video."""
    tower, videos = tower_of(model, x), x["pixel_values_videos"]
    if tower.batched:
        patch = model.config.vision_config.patch_size
        return [
            torch.stack([f.unfold(1, patch, patch).unfold(2, patch, patch).transpose(0, 1) for f in video])
            .transpose(2, 3)
            .flatten(3)
            .flatten(1, 2)
            for video in videos
        ]
    parts = videos.split([t * p for t, p in tower.videos])
    return [part.view(t, -1, 4 * part.shape[-1]) for part, (t, _) in zip(parts, tower.videos, strict=True)]


@contextmanager
def patches_by_hand(model: Any, x: dict[str, Tensor], threshold: float, changed: float) -> Iterator[list[list[bool]]]:
    """Places that changed run through each block alone, frame by frame; others take what their source has.

    Yields, per frame of all videos, which rows are encoded, in the order of the blocks' rows.
    """
    tower = tower_of(model, x)
    places = [oracle.place_sources(p.double().numpy(), threshold, changed) for p in places_of(model, x)]
    sources: list[list[int]] = []  # per frame of all videos, the row of all that each row is taken from
    start = 0
    for (t, p), video in zip(tower.videos, places, strict=True):
        unit = (p - tower.fixed) // len(video[0])
        last = 0
        for frame in range(t):
            last = frame if frame in video[frame] else last
            of_rows = [last] * tower.fixed + [s for s in video[frame] for _ in range(unit)]
            sources.append([start + s * p + row for row, s in enumerate(of_rows)])
        start += t * p
    every = torch.tensor([s for frame in sources for s in frame])
    embedded: list[Tensor] = []
    received = torch.zeros(len(every))

    def windows(_module: Any, args: Any) -> None:
        """The order of the blocks' rows in a windowed tower: each is an embedded row that no other equals."""
        nonlocal every
        order = (args[0][:, None] == embedded[0][None]).all(-1).long().argmax(1)
        assert sorted(order.tolist()) == list(range(len(order)))
        every = order.argsort()[every[order]]

    def block(module: Any, args: Any, kwargs: Any, _output: Any) -> Tensor:
        hidden, result, start = args[0].reshape(-1, args[0].shape[-1]), [], 0
        attention = module.get_submodule(tower.names[2])
        names = [n for n in ("qkv", "q", "k", "q_proj", "k_proj") if hasattr(attention, n)]
        result = torch.zeros_like(hidden)
        for p in (p for t, p in tower.videos for _ in range(t)):
            rows = torch.arange(start, start + p)
            mine = rows[every[rows] == rows]
            start += p
            if not len(mine):
                continue
            given = {**kwargs}
            if not tower.batched:
                ends = kwargs["cu_seqlens"].tolist()
                spans = [int(((mine >= a) & (mine < b)).sum()) for a, b in pairwise(ends)]
                given["cu_seqlens"] = torch.tensor([0, *(n for n in spans if n)]).cumsum(0).int()
                given["position_embeddings"] = tuple(table[mine] for table in kwargs["position_embeddings"])
            seen: dict[str, Any] = {"call": given}
            hooks = [
                attention.get_submodule(n).register_forward_hook(
                    lambda _m, _a, out, n=n, seen=seen: seen.update({n: out})
                )
                for n in names
            ]
            shown = hidden[mine][None] if tower.batched else hidden[mine]
            result[mine] = type(module).forward(module, shown, *args[1:], **given).reshape(len(mine), -1)
            for hook in hooks:
                hook.remove()
            if module is tower.blocks[-1]:
                if tower.batched:
                    q, k = (seen[n].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for n in names[-2:])
                    found = received_attention(q, k, attention.scale)[0]
                else:
                    found = by_patch(attention, seen, Spans())
                received[mine] = found * len(mine) / p
        received[:] = received[every]
        return result[every].reshape(args[0].shape)

    hooks = [b.register_forward_hook(block, with_kwargs=True, prepend=True) for b in tower.blocks]
    if not tower.batched and getattr(model.model, "visual", None) and hasattr(model.model.visual, "window_size"):
        hooks.append(model.model.visual.patch_embed.register_forward_hook(lambda _m, _a, out: embedded.append(out)))
        hooks.append(tower.blocks[0].register_forward_pre_hook(windows))
    module = family_module(model.config.model_type).FAMILY.encode.__module__
    name = "received_attention" if tower.batched else "received_by_patch"
    by_patch = getattr(sys.modules[module], name)
    shape = (-1, tower.videos[0][1]) if tower.batched else (-1,)
    left: list[list[bool]] = []
    try:
        with mock.patch.object(sys.modules[module], name, side_effect=lambda *_, **__: received.reshape(shape)):
            yield left
    finally:
        for hook in hooks:
            hook.remove()
    own = (every == torch.arange(len(every))).split([p for t, p in tower.videos for _ in range(t)])
    left[:] = [frame.tolist() for frame in own]
