"""The reductions of `holimerge.encoder` done by hand on a stock tower: every row stays, and merged rows are equal.

Frames do not see each other and a token of size s is s equal tokens to attention, so this must give the same features
and scores as towers that work on less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle_encoder as oracle
import torch
from torch import Tensor

from holimerge.encoder.options import Encoder
from holimerge.encoder.stage import EncoderStage
from holimerge.encoding import Encoded, Request
from holimerge.registry import family_module


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


@contextmanager
def tokens_by_hand(model: Any, x: dict[str, Tensor], layers: list[int], r: int) -> Iterator[None]:
    """Tokens that merge are equal from there on, all at the place of the first of their group."""
    tower = tower_of(model, x)
    norm, mlp, attention, _ = tower.names
    first = "layer_norm1" if norm == "layer_norm2" else "norm1"
    unit = tower.unit
    groups = [[[i] for i in range(p // unit)] for t, p in tower.videos for _ in range(t)]

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
            keys = keys.chunk(3, -1)[1].unflatten(-1, (module.num_heads, -1)).mean(-2)
        result = []
        for f, (frame, metric) in enumerate(zip(frames_of(tower, hidden), frames_of(tower, keys), strict=True)):
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
