"""From limits to counts: how many tokens may enter, whether an inner merge is worth it, how many frames fit.

Every limit that is given holds. Costs never fall when a token is added (see `holimerge.planning.predict`), so the
largest count is found by bisection; the whole video, of which nothing is merged, is looked at by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from ..allocation import largest_remainder
from ..config import Budget, Config, ConfigError, Inner, load_config
from ..cost import inner_kept, llm_prefill_exact, tower, tower_work
from ..encoder.options import Encoder, Tokens
from ..shapes import Grid, ModelShape, TextShape, VisionShape
from .device import Device
from .predict import (
    STAGES,
    Clip,
    Prompt,
    Scheme,
    TowerLeft,
    flops_share,
    later_steps,
    memory_gib,
    memory_parts,
    predict,
    vision_steps,
)
from .timeline import Step, by_stage

INNER = {"layer": 0.643, "retain": 0.5}  # the presets'
ENOUGH = 0.1  # share of tokens below which a milder setting gives way to a stronger one; the lowest one published
MERGED = (0.25, 0.5)  # shares of a frame's tokens that settings inside the tower merge away over its depth
_PRESETS = (0.05, 0.1, 0.15, 0.25)
_MOST_FRAMES = 2**20


class ImpossibleError(ConfigError):
    """Limits that no number of tokens meets. least: of the limit that is named, the least that is possible."""

    def __init__(self, text: str, least: float = math.inf) -> None:
        super().__init__(text)
        self.least = least


@dataclass(frozen=True)
class Row:
    """One prompt as the solver sees it.

    text: the decoder. totals: T N of each video. rest: everything that is no video token. scheme: what runs.
    prompt, device: needed for a time; prompt alone for a memory.
    """

    text: TextShape
    totals: tuple[int, ...]
    rest: int
    scheme: Scheme
    prompt: Prompt | None = None
    device: Device | None = None
    eager: bool = False

    def ttft_ms(self, entering: int) -> float:
        assert self.prompt is not None
        assert self.device is not None
        later = later_steps(self.prompt, self.device, self.scheme, entering)
        return sum(by_stage([*self._vision, *later], STAGES).values())

    @cached_property
    def _vision(self) -> list[Step]:
        """The same for every number of tokens, of which a solver tries many."""
        assert self.prompt is not None
        assert self.device is not None
        return vision_steps(self.prompt, self.device, self.scheme)

    def memory_gib(self, entering: int) -> float:
        assert self.prompt is not None
        return memory_gib(self.prompt, self.scheme, entering, eager=self.eager)

    def flops(self, entering: int) -> Fraction:
        """Of the prefill, as a share of the unpatched one's; exact."""
        after = None if self.scheme.retain is None else self.rest + inner_kept(entering, self.scheme.retain)
        reduced = llm_prefill_exact(self.text, self.rest + entering, after, self.scheme.layer)
        return Fraction(reduced, llm_prefill_exact(self.text, self.rest + sum(self.totals)))


def share_out(budget: Budget, row: Row) -> list[int]:
    """Tokens to keep of each video of a prompt: the most that meet every limit, at least one of each.

    `retain` and `tokens` bound each video, `flops`, `ttft_ms` and `memory_gib` the prompt. Where the prompt's limits
    bind, its videos share in proportion to what they may keep.

    Raises:
        ImpossibleError: (a ConfigError) naming the limit and the least value that is possible.
    """
    caps = [budget.cap(n) for n in row.totals]
    limits = _limits(budget, row)
    least, most, total = len(caps), sum(caps), sum(row.totals)

    def fits(entering: int) -> bool:
        return all(cost(entering) <= limit for _, limit, cost in limits)

    entering = largest(fits, least, most, whole=total)
    if entering is None:
        raise _impossible(limits, row, least, most)
    if entering == most:
        return caps
    return [1 + more for more in largest_remainder([cap - 1 for cap in caps], entering - least)]


def largest(fits: Callable[[int], bool], least: int, most: int, *, whole: int) -> int | None:
    """The largest K in least..most that fits, or None.

    fits: true up to some K and false beyond, except that `whole` may fit where fewer do not: nothing is merged then.
    """
    if most >= whole and fits(whole):
        return whole
    low, high = least, min(most, whole - 1)
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _limits(budget: Budget, row: Row) -> list[tuple[str, Any, Callable[[int], Any]]]:
    """(name, value, what it bounds) of the limits on the whole prompt."""
    found: list[tuple[str, Any, Callable[[int], Any]]] = []
    if budget.flops is not None:
        found.append(("flops", Fraction(str(budget.flops)), row.flops))  # the share as it is written
    if budget.ttft_ms is not None:
        found.append(("ttft_ms", budget.ttft_ms, row.ttft_ms))
    if budget.memory_gib is not None:
        found.append(("memory_gib", budget.memory_gib, row.memory_gib))
    return found


def _impossible(limits: Sequence[tuple[str, Any, Callable[[int], Any]]], row: Row, least: int, most: int) -> Exception:
    """The error of the first limit that cannot be met by itself, or of all together."""
    counts = [least, most] if most == sum(row.totals) else [least]
    for name, limit, cost in limits:
        lowest, at = min((cost(n), n) for n in counts)
        if lowest > limit:
            smallest = round_up(lowest)
            of = "1 token" if at == 1 else f"{at} tokens"
            text = f"budget.{name}: {float(limit):g} "
            if name == "flops":
                each = f" (one for each of {least} videos)" if least > 1 else ""
                return ImpossibleError(f"{text}leaves no video token{each}; the smallest share that fits is {smallest}")
            unit = "ms" if name == "ttft_ms" else "GiB"
            return ImpossibleError(
                f"{text}is impossible for this prompt of {sum(row.totals)} video tokens and {row.rest} others: the "
                f"least is {smallest} {unit}, at {of}; {_alone(name, row, at)}",
                smallest,
            )
    names = " and ".join(f"{name} {float(limit):g}" for name, limit, _ in limits)
    return ImpossibleError(f"budget: no number of tokens meets {names} together, though each can be met alone")


def _alone(name: str, row: Row, entering: int) -> str:
    assert row.prompt is not None
    if name == "ttft_ms":
        assert row.device is not None
        vision = predict(row.prompt, row.device, row.scheme, entering)["vision"]
        return f"the vision tower alone takes {vision:.4g} ms"
    weights = memory_parts(row.prompt, row.scheme, entering)["weights"]
    return f"the weights alone take {weights / 2**30:.4g} GiB"


def round_up(value: float | Fraction, digits: int = 4) -> float:
    """The next number of that many significant digits that is not below the value."""
    if value <= 0:
        return 0.0
    step = Fraction(10) ** (math.floor(math.log10(value)) + 1 - digits)
    found = math.ceil(Fraction(value) / step) * step
    return float(found) if Fraction(float(found)) >= Fraction(value) else float(found + step)


# ---------------------------------------------------------------------- plans


@dataclass(frozen=True)
class EncoderSetting:
    """A setting inside the vision tower that a plan may choose.

    config: keys it adds to the configuration. left: what it leaves of the tower.
    """

    config: Mapping[str, Any]
    left: TowerLeft


def encoder_settings(shape: ModelShape, grid: Grid | None = None) -> list[EncoderSetting]:
    """What may be set inside the tower of such a model, mildest first: merging tokens in every block, whose work is
    known before a video is seen."""
    encoders = [Encoder(tokens=Tokens(layers=None, keep=1 - share)) for share in MERGED]
    return [
        EncoderSetting({"encoder": {"tokens": {"keep": found.tokens.keep}}}, tower_left(shape.vision, found, grid))
        for found in encoders
        if found.tokens is not None
    ]


def tower_left(vision: VisionShape, encoder: Encoder | None, grid: Grid | None) -> TowerLeft:
    """What an `encoder` block leaves of the tower: all of it where that depends on the video."""
    work = tower_work(vision, encoder, 1, grid)
    if work is None:
        return TowerLeft()
    share = tower(vision, 1, grid, work) / tower(vision, 1, grid)
    return TowerLeft(share, sum(flops > 0 for flops in work.matched), work.blocks[-1][1] / work.blocks[0][1])


@dataclass(frozen=True)
class Choice:
    """A configuration that meets a budget, and what is expected of it.

    entering, after_inner: video tokens. total: T N. stages: ms, see `predict`. memory_gib, flops: predicted.
    """

    config: Config
    frames: int
    total: int
    entering: int
    after_inner: int | None
    stages: Mapping[str, float]
    memory_gib: float
    flops: float

    @property
    def ttft_ms(self) -> float:
        return sum(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "config": self.config.to_dict(),
            "frames": self.frames,
            "tokens": {"video": self.total, "entering": self.entering, "after_inner": self.after_inner},
            "predicted": {
                "stages": {name: round(ms, 3) for name, ms in self.stages.items()},
                "ttft_ms": round(self.ttft_ms, 3),
                "memory_gib": round(self.memory_gib, 4),
                "flops": round(self.flops, 5),
            },
        }


@dataclass(frozen=True)
class Setting:
    """The model and prompt that plans are made for.

    shape: of the model. device: its tables. text_tokens: prompt tokens besides the video's. separators,
    separators_per_step: newlines and the like. weights: bytes. element: bytes of an activation. inner: whether an
    inner merge may be chosen. grid: (rows, columns) of patches of a frame where the resolution is free.
    """

    shape: ModelShape
    device: Device
    text_tokens: int = 40
    grid: Grid | None = None
    separators: int = 0
    separators_per_step: int = 0
    weights: int = 0
    element: int = 4
    inner: bool = True
    eager: bool = False
    encoders: Sequence[EncoderSetting] = field(default_factory=list)

    def row(self, frames: int, scheme: Scheme) -> Row:
        """The prompt of one video of `frames` frames."""
        steps = self.shape.vision.steps(frames)
        rest = self.text_tokens + self.separators + self.separators_per_step * steps
        kind = self.device.conditions.kind
        prompt = Prompt(self.shape, (Clip(steps, self.grid),), rest, self.weights, self.element, kind)
        return Row(self.shape.text, (prompt.total,), rest, scheme, prompt, self.device, self.eager)


def plan(setting: Setting, budget: Budget, frames: int) -> Choice:
    """The mildest configuration that meets every limit of a budget.

    In this order: nothing is reduced; without a setting inside the tower, the most tokens that may enter (with or
    without the presets' inner merge, whichever lets more enter, without it if both let the same); the same with each
    setting inside the tower, mildest first, as long as less than a tenth of the tokens may enter.

    Raises:
        ImpossibleError: no configuration meets the budget; names the least that is possible.
    """
    if frames < 1:
        raise ValueError(f"frames: {frames}; at least 1 is needed")
    stock = setting.row(frames, Scheme(None))
    total = stock.totals[0]
    if budget.cap(total) == total and all(cost(total) <= limit for _, limit, cost in _limits(budget, stock)):
        return _choice(stock, frames, total, {"method": "keep_all"})
    best: tuple[int, Choice] | None = None
    errors: list[ImpossibleError] = []
    for encoder in (None, *(setting.encoders or encoder_settings(setting.shape, setting.grid))):
        left = TowerLeft() if encoder is None else encoder.left
        for inner in (None, INNER) if setting.inner else (None,):
            scheme = _scheme(setting.shape, inner, left)
            row = setting.row(frames, scheme)
            try:
                (entering,) = share_out(budget, row)
            except ImpossibleError as error:
                errors.append(error)
                continue
            if best is None or entering > best[0]:
                best = entering, _choice(row, frames, entering, _configuration(entering, total, inner, encoder))
        if best is not None and best[0] >= ENOUGH * total:
            break
    if best is None:
        raise min(errors, key=lambda error: error.least)
    return best[1]


def _scheme(shape: ModelShape, inner: Mapping[str, Any] | None, left: TowerLeft) -> Scheme:
    scheme = Scheme(left=left)
    if inner is None:
        return scheme
    found = Inner(**inner)
    return replace(scheme, layer=found.resolve(shape.text.layers), retain=found.retain)


def _configuration(
    entering: int, total: int, inner: Mapping[str, Any] | None, encoder: EncoderSetting | None
) -> dict[str, Any]:
    """The preset whose share is nearest, with exactly that many tokens."""
    share = min(_PRESETS, key=lambda known: abs(math.log(known * total / entering)))
    found: dict[str, Any] = {"base": f"holimerge-{round(100 * share):02d}", "budget": {"tokens": entering}}
    found["inner"] = None if inner is None else dict(inner)
    if encoder is not None:
        found |= encoder.config
    return found


def _choice(row: Row, frames: int, entering: int, config: Mapping[str, Any]) -> Choice:
    assert row.prompt is not None
    assert row.device is not None
    scheme = row.scheme
    return Choice(
        config=load_config(config),
        frames=frames,
        total=row.totals[0],
        entering=entering,
        after_inner=None if scheme.retain is None else inner_kept(entering, scheme.retain),
        stages=predict(row.prompt, row.device, scheme, entering),
        memory_gib=row.memory_gib(entering),
        flops=flops_share(row.prompt, scheme, entering),
    )


def most_frames(setting: Setting, budget: Budget, *, least: float = ENOUGH) -> Choice:
    """The plan for the most frames of which at least the share `least` of the tokens may enter.

    A `retain` in the budget takes the place of `least`.

    Raises:
        ImpossibleError: not even one frame fits; names the least that is possible.
        ConfigError: nothing in the budget bounds the number of frames.
    """
    if budget.ttft_ms is None and budget.memory_gib is None and budget.tokens is None:
        raise ConfigError("budget: only ttft_ms, memory_gib and tokens bound the number of frames; give one of them")
    least = least if budget.retain is None else budget.retain

    def enough(frames: int) -> Choice | None:
        try:
            found = plan(setting, budget, frames)
        except ImpossibleError:
            return None
        # a count is rounded: half a token less than the share is still the share
        return found if found.entering + 0.5 >= least * found.total else None

    best = enough(1)
    if best is None:
        found = plan(setting, budget, 1)
        raise ImpossibleError(
            f"budget: one frame is too much: {found.entering} of its {found.total} tokens may enter, {least:g} of them "
            "are asked for"
        )
    low, high = 1, 2
    while (more := enough(high)) is not None:
        best, low, high = more, high, 2 * high
        if high > _MOST_FRAMES:
            return best
    while high - low > 1:
        middle = (low + high) // 2
        found_here = enough(middle)
        if found_here is None:
            high = middle
        else:
            best, low = found_here, middle
    return best
