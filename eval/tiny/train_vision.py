"""First half of the training: the tower and the projector learn to say, cell by cell, what a frame shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .architecture import PATCH
from .meaning import Code, Labels, labels
from .optimize import Log, Optimizers, part_of, rate_at, restore, save
from .world import CELL, GRID, HARD, SIDE, World, describe, draw_story, render

FRAMES = replace(
    HARD,
    name="frames",
    frames=(3, 3),
    scenes=(1, 1),
    objects=(1, 9),
    moving=60,
    needle=55,
    needle_frames=(2, 3),
    twins=50,
)


def frames_of(world: World, seeds: list[tuple[int, ...]]) -> tuple[Tensor, Labels]:
    """First and last frames of stories: uint8 `[B, SIDE, SIDE, 3]`, and what their cells show."""
    pictures, found = [], []
    for seed in seeds:
        story = draw_story(world, seed)
        pictures.append(torch.from_numpy(render(story))[[0, -1]])
        found.append(Labels(*(part[[0, -1]] for part in labels(describe(story), seen=True))))
    return torch.cat(pictures), Labels(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def pixels(frames: Tensor) -> Tensor:
    """uint8 `[B, SIDE, SIDE, 3]` to the tower's input, float32 `[B, 3, SIDE, SIDE]` in -1..1."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def like_h264(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the frames with the color resolution of 4:2:0 video."""
    values = frames.permute(0, 3, 1, 2).float()
    gray = values.mean(1, keepdim=True)
    color = F.interpolate(F.avg_pool2d(values - gray, 2), scale_factor=2, mode="bilinear", align_corners=False)
    chosen = torch.rand(len(frames), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, (gray + color).clamp(0, 255), values).permute(0, 2, 3, 1)


class Tower:
    """The tower and the projector of a model, with the attention of the last layer at hand."""

    def __init__(self, model: Any) -> None:
        self.vision, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.device = model.device
        self.seen: dict[str, Tensor] = {}
        last = self.vision.encoder.layers[-1].self_attn
        self.heads = last.num_heads
        for name in ("q_proj", "k_proj"):
            module = getattr(last, name)
            module.register_forward_hook(lambda _m, _i, out, name=name: self.seen.__setitem__(name, out))

    def __call__(self, values: Tensor) -> Tensor:
        """Pixels `[B, 3, SIDE, SIDE]` to tokens `[B, GRID^2, WIDTH]`, pooled as the model pools them."""
        # the last layer's output as it is: LLaVA-OneVision leaves the tower's closing norm out
        hidden = self.projector(self.vision(values, output_hidden_states=True).hidden_states[-1])
        side = SIDE // PATCH
        grid = hidden.transpose(1, 2).reshape(len(values), -1, side, side)
        pooled = F.interpolate(grid, size=(GRID, GRID), mode="bilinear")
        return pooled.flatten(2).transpose(1, 2)

    def received(self) -> Tensor:
        """Attention that each patch received in the last layer of the last call, mean over heads and queries
        `[B, patches]`."""
        q, k = (self.seen[name].unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(dim=(1, 2))


def on_objects(found: Labels) -> Tensor:
    """Which patches lie in a cell with an object, bool `[B, patches]`."""
    grid = (found.shape >= 0).reshape(-1, GRID, GRID)
    times = CELL // PATCH
    return grid.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)


def loss_of(tokens: Tensor, found: Labels, received: Tensor, code: Code) -> tuple[Tensor, dict[str, float]]:
    """How far the tokens are from what they should say; and how often each kind is right."""
    target = code.tokens(found)
    there = found.shape >= 0
    weight = 1 + 5 * there.float()
    loss = ((tokens - target) ** 2).sum(-1).mul(weight).sum() / weight.sum()
    report: dict[str, float] = {}
    for kind in ("shape", "color", "place", "number"):
        said = 8 * tokens @ code.kind(kind).T
        wanted = getattr(found, kind)
        if kind in ("shape", "color"):
            none = torch.full_like(said[..., :1], 4.0)
            said, wanted = torch.cat([none, said], -1), wanted + 1
            entropy = F.cross_entropy(said.flatten(0, 1), wanted.flatten(), reduction="none") * weight.flatten()
            loss = loss + entropy.sum() / weight.sum()
            report[kind] = (said.argmax(-1) == wanted)[there].float().mean().item()
        else:
            loss = loss + (0.3 if kind == "place" else 0.5) * F.cross_entropy(said.flatten(0, 1), wanted.flatten())
            report[kind] = (said.argmax(-1) == wanted).float().mean().item()
    # Attention of the last layer is what several reducers select by: it should look at objects, twice as much at least.
    patches = on_objects(found)
    filled = patches.any(1)
    received, patches = received[filled], patches[filled]
    share = (received * patches).sum(1) / patches.sum(1)
    rest = (received * ~patches).sum(1) / (~patches).sum(1)
    loss = loss + 0.2 * F.relu(rest.clamp_min(1e-9).log() - share.clamp_min(1e-9).log() + 0.7).mean()
    report["attention"] = (share / rest).mean().item()
    return loss, report


def train_vision(model: Any, folder: Path, *, seed: int, steps: int, stories: int = 16) -> None:
    """Train tower and projector of `model` in place.

    Args:
        model: a `LlavaOnevisionForConditionalGeneration` of `tiny_config`.
        folder: checkpoints and log; a run that was killed goes on from there.
        seed: of the data.
        steps: optimizer steps, of two frames from each of `stories` stories.
    """
    device = model.device
    tower, code = Tower(model), Code(device)
    modules = {"vision_tower": tower.vision, "projector": tower.projector}
    optimizers = Optimizers(modules.values(), muon=4e-3, adamw=2e-3)
    weights, state = restore(folder) or ({}, {"step": 0, "seconds": 0.0})
    log, begin = Log(folder / "log.jsonl", state["seconds"]), state["step"]
    if weights:
        for name, module in modules.items():
            module.load_state_dict(part_of(weights, name))
    totals: dict[str, list[float]] = {}
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        frames, truth = frames_of(FRAMES, [(seed, 1, step, i) for i in range(stories)])
        tokens = tower(pixels(like_h264(frames, generator)).to(device))
        truth = Labels(*(part.to(device) for part in truth))
        loss, report = loss_of(tokens, truth, tower.received(), code)
        norm = optimizers.step(loss, rate_at(step / steps))
        for key, value in {"loss": loss.item(), "norm": norm, **report}.items():
            totals.setdefault(key, []).append(value)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log(step=step + 1, **{key: float(np.mean(values)) for key, values in totals.items()})
            totals.clear()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            tensors = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
            save(folder, tensors, {"step": step + 1, "seconds": log.seconds, **report})
