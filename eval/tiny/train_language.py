"""Second half of the training: the LLM learns to answer, first about the code itself, then about the tower's tokens.

Many questions share one video: each sees the video and itself, so a video is read once a step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .architecture import WIDTH
from .language import INDEX, WORDS, encode
from .meaning import Code, Labels, labels
from .optimize import Log, Optimizers, part_of, rate_at, restore, save
from .questions import ANY, CATEGORIES, Question, ask
from .world import DIRECTIONS, PLACES, Story, World, describe, draw_story, render

BEFORE = [INDEX["<|im_start|>"], INDEX["user"]]
AFTER = [INDEX["<|im_end|>"], INDEX["<|im_start|>"], INDEX["assistant"]]
HINT_LAYER = 2  # after so many layers the video tokens should know what only time tells:
HINTS = {"direction": len(DIRECTIONS) + 1, "before": len(PLACES) + 1, "scene": 6}


class Asked(NamedTuple):
    """Questions of a batch of videos, K each, padded on the right.

    `ids` `[B, K, Lq]`; `last` `[B, K]`, where the answer is predicted; `options` `[B, K, 4]`; `answer` `[B, K]`;
    `category` `[B, K]`, -1 where there is no question; `evidence` bool `[B, K, T * N]`, the video tokens that show the
    answer.
    """

    ids: Tensor
    last: Tensor
    options: Tensor
    answer: Tensor
    category: Tensor
    evidence: Tensor


def pack(asked: Sequence[Sequence[Question]], found: Sequence[Labels]) -> Asked:
    """Questions of several videos, and what these show, as tensors."""
    rows = [[[*encode(q.text), *AFTER] for q in questions] for questions in asked]
    count, width = max(map(len, rows)), max(len(ids) for row in rows for ids in row)
    ids = torch.full((len(rows), count, width), INDEX["<pad>"])
    last = torch.zeros(len(rows), count, dtype=torch.long)
    options, answer = torch.zeros(len(rows), count, 4, dtype=torch.long), torch.zeros_like(last)
    category = torch.full_like(last, -1)
    evidence = torch.zeros(len(rows), count, found[0].shape.numel(), dtype=torch.bool)
    for b, questions in enumerate(asked):
        for k, question in enumerate(questions):
            ids[b, k, : len(rows[b][k])] = torch.tensor(rows[b][k])
            last[b, k] = len(rows[b][k]) - 1
            options[b, k] = torch.tensor([INDEX[word] for word in question.options])
            answer[b, k] = question.answer
            category[b, k] = CATEGORIES.index(question.category)
            scene, thing = question.evidence
            shown = found[b].scene == scene
            if thing == ANY:
                shown = shown & (found[b].shape >= 0)
            elif thing is not None:
                shown = shown & (found[b].shape == thing[0]) & (found[b].color == thing[1])
            evidence[b, k] = shown.flatten()
    return Asked(ids, last, options, answer, category, evidence)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class States(NamedTuple):
    """What `answer_states` gives. `answers` `[B, K, D]`: at the answer positions, after the last norm; `prefix`
    `[B, P, D]`: after `HINT_LAYER` layers; `looks` `[B, H/2, K, P]`: attention logits of half the heads of the layer
    after that, from the answer positions to the prefix; `follows` `[B, H/2, W, P]`: the same of the layer before it,
    from the watched positions to what came before them."""

    answers: Tensor
    prefix: Tensor
    looks: Tensor
    follows: Tensor


def answer_states(llm: Any, prefix: Tensor, asked: Asked, watch: Tensor) -> States:
    """Run the Qwen2 layers over `prefix` and, in the same pass, over every question behind it.

    Equal to one forward per question (tested); the video is read once.

    Args:
        llm: a `Qwen2Model`.
        prefix: embeddings before the questions `[B, P, D]`.
        asked: the questions.
        watch: positions in the prefix whose attention is given back too, `[B, W]`.
    """
    B, P, D = prefix.shape
    _, K, L = asked.ids.shape
    hidden = torch.cat([prefix, llm.embed_tokens(asked.ids).flatten(1, 2)], 1)
    count = functools.partial(torch.arange, device=hidden.device)
    positions = torch.cat([count(P), (P + count(L)).repeat(K)])[None]
    cos, sin = llm.rotary_emb(hidden, positions)
    block = torch.block_diag(*[torch.ones(L, L, device=hidden.device).tril()] * K).bool()
    mask = torch.cat([block.new_ones(K * L, P), block], 1)
    hint = looks = follows = hidden
    rows, heads = count(B)[:, None], llm.config.num_attention_heads // 2
    for index, layer in enumerate(llm.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        q, k, v = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if index in (HINT_LAYER - 1, HINT_LAYER):
            at = watch if index < HINT_LAYER else P + count(K) * L + asked.last
            asking = q[:, :heads].transpose(1, 2)[rows, at].transpose(1, 2)
            logits = asking @ k[:, :heads, :P].transpose(-1, -2) / attention.head_dim**0.5
            if index == HINT_LAYER:
                looks = logits
            else:
                follows = logits.masked_fill((count(P) > watch[..., None])[:, None], -1e9)
        video = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True)
        words = F.scaled_dot_product_attention(q[:, :, P:], k, v, attn_mask=mask)
        mixed = torch.cat([video, words], 2).transpose(1, 2).flatten(2)
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if index + 1 == HINT_LAYER:
            hint = hidden[:, :P]
    words = hidden[:, P:].unflatten(1, (K, L))
    ends = asked.last[..., None, None].expand(B, K, 1, D)
    return States(llm.norm(words.gather(2, ends).squeeze(2)), hint, looks, follows)


class Watched(NamedTuple):
    """What the hints of the video tokens are: `[B, T, N]`, -100 where there is none. `kind`: a number for each (scene,
    shape, color), -1 where there is no object."""

    direction: Tensor
    before: Tensor
    scene: Tensor
    kind: Tensor


def watched(found: Sequence[Labels]) -> Watched:
    """The hints of a batch of videos of equal length."""
    parts = []
    for truth in found:
        place, scene = truth.place, truth.scene
        direction = torch.where(truth.shape >= 0, truth.direction + 1, torch.tensor(-100))
        first = torch.zeros(6, dtype=torch.long)
        for index in range(int(scene.max())):
            first[index + 1] = place[scene == index][0] + 1
        kind = torch.where(truth.shape >= 0, (scene * 100 + truth.shape) * 100 + truth.color, torch.tensor(-1))
        parts.append((direction, first[scene], scene.clamp_max(5), kind))
    return Watched(*(torch.stack(kind) for kind in zip(*parts, strict=True)))


class Hints(nn.Module):
    """Linear readers of the video tokens' states; thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in HINTS.items()})

    def forward(self, states: Tensor, truth: Watched) -> tuple[Tensor, dict[str, float]]:
        """states `[B, T, N, D]` -> loss, and how often each hint is read right."""
        states, total, report = self.norm(states), states.new_zeros(()), {}
        for name, head in self.head.items():
            wanted, said = getattr(truth, name), head(states)
            weight = None
            if name == "direction":  # objects at rest are many
                weight = states.new_tensor([0.2, *[1.0] * len(DIRECTIONS)])
                report[f"hint {name}"] = (said.argmax(-1) == wanted)[wanted > 0].float().mean().item()
            else:
                report[f"hint {name}"] = (said.argmax(-1) == wanted).float().mean().item()
            total = total + F.cross_entropy(said.flatten(0, 2), wanted.flatten(), weight=weight)
        return total, report


def begin_aligned(model: Any, code: Code) -> None:
    """Start where a pretrained pair would: words that name what is seen share the tower's directions, queries look
    for keys like themselves, and what attention reads it writes back (mimetic initialisation, arXiv 2305.09828)."""
    llm = model.model.language_model
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        embed = torch.randn(len(WORDS), WIDTH, generator=generator) / WIDTH**0.5
        for word, index in INDEX.items():
            if (direction := code.word(word)) is not None:
                embed[index] = direction
        llm.embed_tokens.weight.copy_(embed)
        model.lm_head.weight.copy_(embed)
        model.model.image_newline.copy_(torch.randn(WIDTH, generator=generator) / WIDTH**0.5)
        for layer in llm.layers:
            attention = layer.self_attn
            d, groups = attention.head_dim, attention.num_key_value_groups
            for head in range(attention.k_proj.weight.shape[0] // d):
                base = torch.linalg.qr(torch.randn(WIDTH, d, generator=generator)).Q.T
                value = torch.linalg.qr(torch.randn(WIDTH, d, generator=generator)).Q.T
                attention.k_proj.weight[head * d : (head + 1) * d] = base
                attention.v_proj.weight[head * d : (head + 1) * d] = value
                for q in range(head * groups, (head + 1) * groups):
                    attention.q_proj.weight[q * d : (q + 1) * d] = base
                    attention.o_proj.weight[:, q * d : (q + 1) * d] = value.T * 0.5


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Every step draws one of `worlds`, by its share in percent; batches hold about `tokens` video tokens. `real`: video
    tokens come from the tower, else from the code. `look`: weight of the loss that wants the answer to attend to what
    shows it. `each`: questions of a category asked of a video; `more` has its own numbers for some.
    """

    steps: int
    worlds: tuple[tuple[World, int], ...]
    tokens: int
    real: bool
    muon: float = 2e-3
    adamw: float = 1e-3
    fall: float = 0.3
    look: float = 0.2
    each: int = 3
    more: tuple[tuple[str, int], ...] = ()

    def ask(self, story: Story) -> list[Question]:
        """Questions about a video, as many of each category as this phase wants."""
        wanted = dict.fromkeys(CATEGORIES, self.each) | dict(self.more)
        return [
            q
            for number in sorted(set(wanted.values()))
            for q in ask(story, each=number, categories=[c for c in CATEGORIES if wanted[c] == number])
        ]


def fixed_length(world: World, rng: np.random.Generator) -> World:
    """The world with one number of frames, so that a batch has equal lengths."""
    frames = int(rng.integers(world.frames[0], world.frames[1] + 1))
    return replace(world, frames=(frames, frames))


def symbolic(code: Code, found: Labels, generator: torch.Generator) -> Tensor:
    """The code of a video's cells `[T, N, D]`, with the kind of errors that a tower makes."""
    wrong = torch.rand(found.shape.shape, generator=generator) < 0.02
    swapped = found._replace(color=torch.where(wrong, found.color.flip(0), found.color))
    tokens = code.tokens(swapped)
    return tokens + 0.06 * torch.randn(tokens.shape, generator=generator)


def draw_batch(phase: Phase, seed: tuple[int, ...], code: Code, tower: Any) -> tuple[Tensor, Asked, Watched, bool]:
    """One batch: video tokens `[B, T, N, D]`, its questions, its hints, and whether the videos are full length."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    shares = np.cumsum([share for _, share in phase.worlds])
    which = int(np.searchsorted(shares, rng.integers(shares[-1]), side="right"))
    world = fixed_length(phase.worlds[which][0], rng)
    count = max(2, phase.tokens // (world.frames[0] * 36))
    stories = [draw_story(world, (*seed, i)) for i in range(count)]
    found = [labels(describe(story)) for story in stories]
    asked = pack([phase.ask(story) for story in stories], found)
    if phase.real:
        tokens = torch.stack([see(tower, story) for story in stories])
    else:
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
        tokens = torch.stack([symbolic(code, truth, generator) for truth in found])
    return tokens, asked, watched(found), world.frames[0] >= 24


@torch.no_grad()
def see(tower: Any, story: Story) -> Tensor:
    """What the tower says about a video `[T, N, D]`."""
    from .train_vision import like_h264, pixels

    generator = torch.Generator().manual_seed(story.seed[-1])
    return tower(pixels(like_h264(torch.from_numpy(render(story)), generator)).to(tower.device))


def embed(model: Any, tokens: Tensor) -> Tensor:
    """Video tokens `[B, T, N, D]` as the model places them: opening words, tokens, newline `[B, P, D]`."""
    size = len(tokens)
    opening = model.model.language_model.embed_tokens(torch.tensor(BEFORE, device=tokens.device))[None].expand(
        size, -1, -1
    )
    newline = model.model.image_newline.expand(size, 1, -1)
    return torch.cat([opening, tokens.flatten(1, 2), newline], 1)


def grade(model: Any, states: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """Loss of the answers, and which of them are right `[B, K]`.

    The loss is over the four options, with a share over all words, so that the model also writes its answer.
    """
    logits = model.lm_head(states)
    real = asked.category >= 0
    chosen = logits.gather(-1, asked.options)
    loss = F.cross_entropy(chosen[real], asked.answer[real])
    free = real & (asked.category != CATEGORIES.index("order"))  # an order question has other right answers too
    words = asked.options.gather(-1, asked.answer[..., None]).squeeze(-1)
    loss = loss + 0.2 * F.cross_entropy(logits[free], words[free])
    return loss, chosen.argmax(-1) == asked.answer


def misses(looks: Tensor, asked: Asked) -> Tensor:
    """How little of the attention from the answer to the prefix falls on tokens that show it, as -log of its share."""
    share = looks.log_softmax(-1)[..., len(BEFORE) : -1].masked_fill(~asked.evidence[:, None], -1e9).logsumexp(-1)
    real = (asked.category >= 0) & asked.evidence.any(-1)
    return -share.transpose(1, 2)[real].mean()


def some_objects(truth: Watched, generator: torch.Generator, count: int = 48) -> Tensor:
    """Positions in the prefix of random video tokens with an object, moving ones first, `[B, count]`."""
    weight = (truth.kind >= 0).float() + 3 * (truth.direction > 0).float() + 1e-6
    return torch.multinomial(weight.flatten(1), count, generator=generator) + len(BEFORE)


def strays(follows: Tensor, watch: Tensor, truth: Watched) -> Tensor:
    """How little of an object token's attention falls on the same object in earlier frames, as -log of its share."""
    kind, tokens = truth.kind.flatten(1), truth.kind[0, 0].numel()
    own = kind.gather(1, watch - len(BEFORE))
    frame = torch.arange(kind.shape[1], device=kind.device) // tokens
    earlier = frame[None, None] < frame[watch - len(BEFORE)][..., None]
    same = (kind[:, None] == own[..., None]) & (own >= 0)[..., None] & earlier
    share = follows.log_softmax(-1)[..., len(BEFORE) : -1].masked_fill(~same[:, None], -1e9).logsumexp(-1)
    return -share.transpose(1, 2)[same.any(-1)].mean() if same.any() else follows.new_zeros(())


def train_language(model: Any, folder: Path, phases: Sequence[Phase], *, seed: int, tower: Any = None) -> None:
    """Train the LLM of `model` in place, phase after phase.

    Args:
        model: a `LlavaOnevisionForConditionalGeneration` of `tiny_config`; its tower stays as it is.
        folder: checkpoints and log; a run that was killed goes on from there.
        phases: see `Phase`.
        seed: of the data.
        tower: a `train_vision.Tower`, for phases with `real`.
    """
    device = model.device
    code, hints = Code(), Hints().to(device)
    llm = model.model.language_model
    modules: dict[str, nn.Module] = {"llm": llm, "lm_head": model.lm_head, "hints": hints}
    newline = model.model.image_newline
    weights, state = restore(folder) or ({}, {"at": [0, 0], "seconds": 0.0})
    log, begin = Log(folder / "log.jsonl", state["seconds"]), state["at"]
    begin_aligned(model, code)
    if weights:
        for name, module in modules.items():
            module.load_state_dict(part_of(weights, name))
        newline.data.copy_(weights["newline"])

    def keep(phase: int, step: int) -> None:
        tensors = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
        save(folder, {**tensors, "newline": newline}, {"at": [phase, step], "seconds": log.seconds})

    for number, phase in enumerate(phases):
        if number < begin[0]:
            continue
        optimizers = Optimizers([llm, model.lm_head, hints], muon=phase.muon, adamw=phase.adamw)
        totals: dict[str, list[float]] = {}
        for step in range(begin[1] if number == begin[0] else 0, phase.steps):
            tokens, asked, truth, full = draw_batch(phase, (seed, 2, number, step), code, tower)
            watch = some_objects(truth, torch.Generator().manual_seed(step)).to(device)
            tokens = tokens.to(device)
            asked, truth = Asked(*(x.to(device) for x in asked)), Watched(*(x.to(device) for x in truth))
            out = answer_states(llm, embed(model, tokens), asked, watch)
            loss, right = grade(model, out.answers, asked)
            seen = out.prefix[:, len(BEFORE) : -1].unflatten(1, tokens.shape[1:3])
            help_loss, report = hints(seen, truth)
            look_loss, follow_loss = misses(out.looks, asked), strays(out.follows, watch, truth)
            report |= {"looks": look_loss.item(), "follows": follow_loss.item()}
            total = loss + 0.5 * help_loss + phase.look * look_loss + 0.1 * follow_loss
            norm = optimizers.step(total, rate_at(step / phase.steps, fall=phase.fall))
            report.update(loss=loss.item(), norm=norm, full=float(full))
            for index, category in enumerate(CATEGORIES):
                if (chosen := asked.category == index).any():
                    report[f"{category}{'' if full else '~'}"] = right[chosen].float().mean().item()
            for key, value in report.items():
                totals.setdefault(key, []).append(value)
            if (step + 1) % 50 == 0 or step + 1 == phase.steps:
                log(phase=number, step=step + 1, **{key: float(np.mean(values)) for key, values in totals.items()})
                totals.clear()
            if (step + 1) % 100 == 0:
                keep(number, step + 1)
        keep(number + 1, 0)
