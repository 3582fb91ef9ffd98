"""Questions answered by the model as it is (patched or not), with what each of them cost.

By generation: greedy, several prompts in a left-padded batch where the family allows it. By likelihood: one prefill of
the prompt, then every option as its continuation (`holimerge.score_options`), one prompt at a time.

An option's tokens: its text without spaces around it, tokenised by itself without special tokens, put right after the
prompt's last token, with one space before it if the prompt ends in the words of an answer prefix. The likelihood is the
sum over the option's tokens (natural logarithm, no division by length); the highest wins, the lower index in a tie.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holimerge.api import _handle, _inner_model
from holimerge.config import Config
from holimerge.inputs import collate
from holimerge.planning.stock import watched
from holimerge.registry import family_module
from holimerge.scoring import score_options

from .measure import analytic_flops
from .reuse import Reuse
from .run import STAGES, Run, _peak, _reset_peak, _synchronise, devices_of, run_once, seen_by_tower

# Stages of the prompt that a video encoded before did not pay.
ENCODING = ("vision", "reduce", "project")


@dataclass
class Answer:
    """One question's answer.

    Attributes:
        raw: what was generated, special tokens left out; None by likelihood.
        likelihoods: log-likelihood of each option; None by generation.
        tokens: features, entering, after_inner (None without inner merge), text.
        ms: ttft and stages; of the whole batch, if it was one.
        reused: stages that were not paid, because the video had been encoded for another question.
        flops: analytic, of this prompt alone with everything paid: {total, prefill}; None where unknown.
        peak: bytes, of the batch.
        batch: prompts that ran together.
    """

    raw: str | None = None
    likelihoods: list[float] | None = None
    tokens: dict[str, int | None] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    flops: dict[str, int] | None = None
    peak: int | None = None
    batch: int = 1


def generate_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Tensor]],
    *,
    config: Config | None,
    max_new_tokens: int,
    reuse: Reuse | None = None,
) -> list[Answer]:
    """Answer prompts together, greedily.

    Args:
        model: patched with `config`, or unpatched for None.
        tokenizer: the model's.
        rows: results of `holimerge.inputs.build_inputs` on the model's device, one video each.
        config: what the model is patched with.
        max_new_tokens: longest answer.
        reuse: of `holimerge.eval.reuse.reusing`, if videos are reused.

    Raises:
        ValueError: rows that cannot share a batch.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = rows[0] if len(rows) == 1 else collate(rows, pad or 0)
    if reuse is not None:
        reuse.reset()
    run = run_once(model, inputs, max_new_tokens=max_new_tokens)
    assert run.answer is not None
    told = _tokens_of_rows(model, rows)
    answers = []
    for row, ids, (tokens, clusters) in zip(rows, run.answer, told, strict=True):
        answers.append(
            Answer(
                raw=tokenizer.decode(ids, skip_special_tokens=True),
                tokens=tokens,
                flops=_flops(model, row, config, tokens, clusters),
                peak=run.peak,
                batch=len(rows),
            )
        )
    _put_times(model, answers, run.ttft, run.stages, reuse)
    return answers


def option_tokens(tokenizer: Any, options: Sequence[str], answer_prefix: str = "") -> list[list[int]]:
    """Token ids of each option as the continuation of a prompt; the rule stands at the top of this module.

    Raises:
        ValueError: an option without any token.
    """
    space = " " if answer_prefix and not answer_prefix[-1].isspace() else ""
    found = [list(tokenizer(space + text.strip(), add_special_tokens=False)["input_ids"]) for text in options]
    for text, ids in zip(options, found, strict=True):
        if not ids:
            raise ValueError(f"option {text!r} has no tokens")
    return found


def score_answer(
    model: Any,
    inputs: Mapping[str, Tensor],
    options: Sequence[Sequence[int]],
    *,
    config: Config | None,
    reuse: Reuse | None = None,
) -> Answer:
    """Score the options of one prompt; the arguments are those of `generate_answers` and `option_tokens`.

    The time to first token ends when the prompt's logits are there: the options' own steps are not in it.
    """
    devices = devices_of(model)
    _reset_peak(devices)
    if reuse is not None:
        reuse.reset()
    with _prompt_clock(model, devices) as clock:
        _synchronise(devices)
        begin = time.perf_counter()
        likelihoods = score_options(model, inputs, options)
    tokens, clusters = _tokens_of_rows(model, [inputs])[0]
    answer = Answer(
        likelihoods=likelihoods,
        tokens=tokens,
        flops=_flops(model, inputs, config, tokens, clusters),
        peak=_peak(devices),
    )
    _put_times(model, [answer], (clock.end - begin) * 1000, clock.stages, reuse)
    return answer


def best_option(likelihoods: Sequence[float]) -> int:
    """Index of the most likely option, the first in a tie."""
    return max(range(len(likelihoods)), key=lambda i: (likelihoods[i], -i))


@dataclass
class _Clock:
    end: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


@contextmanager
def _prompt_clock(model: Any, devices: list[torch.device]) -> Iterator[_Clock]:
    """Note when the first forward in the block is done, and its stages."""
    handle, found = _handle(model), _Clock()
    timed: AbstractContextManager[Any] = nullcontext() if handle is not None else watched(model)
    with timed as stages:

        def done(*_: Any) -> None:
            if found.end:
                return
            _synchronise(devices)
            found.end = time.perf_counter()
            times = handle.report.milliseconds if handle is not None else stages.milliseconds()
            found.stages = {stage: times[stage] for stage in STAGES if stage in times}

        hook = _inner_model(model).register_forward_hook(done)
        try:
            yield found
        finally:
            hook.remove()


def _tokens_of_rows(
    model: Any, rows: Sequence[Mapping[str, Tensor]]
) -> list[tuple[dict[str, int | None], tuple[int, ...]]]:
    """Tokens and sizes of clustered sets of each prompt of the run that has just ended; one video a prompt."""
    handle = _handle(model)
    inner = _inner_model(model)
    family = family_module(inner.config.model_type).FAMILY
    found = []
    for i, row in enumerate(rows):
        (grid,) = family.grids(family.core(inner), dict(row))
        separators = family.separators(family.core(inner), grid)
        tokens: dict[str, int | None] = {"features": grid.total, "entering": grid.total, "after_inner": None}
        tokens |= {"separators": separators, "text": int(row["input_ids"].shape[1]) - grid.total - separators}
        clusters: tuple[int, ...] = ()
        if handle is not None:
            video = handle.report.videos[i]
            tokens |= {"entering": video.entering, "after_inner": video.after_inner, "separators": video.separators}
            clusters = video.record.clustered
        found.append((tokens, clusters))
    return found


def _flops(
    model: Any,
    row: Mapping[str, Tensor],
    config: Config | None,
    tokens: dict[str, int | None],
    clusters: tuple[int, ...],
) -> dict[str, int] | None:
    found = analytic_flops(model, row, config, Run(0.0, {}, tokens, clusters=clusters, seen=seen_by_tower(model)))
    return None if found is None else {key: int(found[key]) for key in ("total", "prefill")}


def _put_times(
    model: Any, answers: list[Answer], ttft: float, stages: Mapping[str, float], reuse: Reuse | None
) -> None:
    """Write times into the answers of one batch; stages that not every prompt of it paid are named, not timed."""
    handle = _handle(model)
    missing: tuple[str, ...] = ()
    if reuse is not None and reuse.reused:
        missing = ENCODING if handle is not None and handle.method.reduce is not None else ENCODING[:1]
    times = {"ttft": ttft, **{stage: ms for stage, ms in stages.items() if stage not in missing}}
    for answer in answers:
        answer.ms = {name: round(ms, 3) for name, ms in times.items()}
        answer.reused = list(missing)


def as_fields(answer: Answer) -> dict[str, Any]:
    """The answer's fields for a record; JSON has no infinity, so an impossible option's likelihood is null."""
    fields = dataclasses.asdict(answer)
    if answer.likelihoods is not None:
        fields["likelihoods"] = [value if math.isfinite(value) else None for value in answer.likelihoods]
    fields["peak_memory_bytes"] = fields.pop("peak")
    return fields
