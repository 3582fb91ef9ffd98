"""From records to results: accuracies with intervals, what could not be read, tokens, times, FLOPs.

What counts: a sample whose video was read and whose answer the data set tells. An answer from which no choice could be
read is wrong. A sample whose video or question could not be used is in no accuracy; it is counted beside them, and
`errors_wrong` is the accuracy that takes such samples as wrong.

Time statistics are over answers that paid everything: `decode`, `preprocess` and `ttft` of a video's first question
(where the frames came from the cache, `decode` is not counted). `ttft` is from prepared inputs to the first token (by
likelihood: to the prompt's logits), without decoding and preprocessing. Other stages are over all answers that ran
them. With a batch of several prompts, times are the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from holimerge.config import Config

from .intervals import clustered_interval
from .measure import spread
from .plan import Plan
from .records import SCHEMA, Record

STAGES = ("decode", "preprocess", "ttft", "vision", "reduce", "project", "splice", "prefill", "inner")
TOKENS = ("features", "entering", "after_inner", "text")


def results_of(
    identity: Mapping[str, Any],
    plans: Sequence[Plan],
    configs: Mapping[str, Config | None],
    records: Sequence[Record],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """What results.json holds; keys: kind, schema, run (the identity), conditions, tasks.

    `tasks[name]` has source, samples {id, video_id} (in one order) and configs; each configuration has accuracy,
    errors_wrong, headline, by_category, by_group, counts, first_error (why the first sample that could not be used
    could not), unscored_categories (of samples that have an answer), tokens, ms, flops, peak_memory_bytes and
    `correct`: per sample 1, 0, or null where nothing was scored.

    Args:
        identity: of the run; plans, configs: what it did.
        records: all of them.
        machine: conditions of the answers.
    """
    found = {(r["task"], r["config"], r["id"]): r for r in records}
    tasks = {}
    for plan in plans:
        name = plan.task.name
        tasks[name] = {
            "source": plan.source,
            "samples": {"id": [s.id for s in plan.samples], "video_id": [s.video_id for s in plan.samples]},
            "configs": {
                config: summary([found[name, config, s.id] for s in plan.samples], plan.task.headline)
                for config in configs
            },
        }
    return {"kind": "eval", "schema": SCHEMA, "run": dict(identity), "conditions": dict(machine), "tasks": tasks}


Headline = Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]


def summary(records: Sequence[Record], headline: Headline) -> dict[str, Any]:
    """The results of one task under one configuration; the keys are those of `results_of`."""
    scored = [r for r in records if r["correct"] is not None]
    unusable = [r for r in records if r["error"] is not None]
    # a data set that keeps its answers secret does not tell whether an unreadable video would have been answered
    strict = scored + [{**r, "correct": False} for r in unusable if r["answer"] is not None]
    groups = sorted({name for r in records for name in r["groups"]})
    return {
        "accuracy": _accuracy(scored),
        "errors_wrong": _accuracy(strict),
        "headline": _rounded(headline(scored)) if scored else {},
        "headline_errors_wrong": _rounded(headline(strict)) if strict else {},
        "by_category": _divided([(r["category"], r) for r in scored]),
        "by_group": {
            name: _divided([(r["groups"][name], r) for r in scored if name in r["groups"]]) for name in groups
        },
        "counts": {
            "samples": len(records),
            "scored": len(scored),
            "correct": sum(r["correct"] for r in scored),
            "no_answer": sum(r["choice"] is None for r in records if r["error"] is None),
            "fallback": sum(r["fallback"] for r in records),
            "left_out": sum(not r.get("counted", True) for r in records),  # by the protocol, of the headline
            "secret": sum(r["answer"] is None for r in records),
            "unreadable": sum(r["error"]["at"] == "video" for r in unusable),
            "unreadable_videos": len({r["video_id"] for r in unusable if r["error"]["at"] == "video"}),
            "unshowable": sum(r["error"]["at"] == "prompt" for r in unusable),
        },
        "first_error": unusable[0]["error"]["text"] if unusable else None,
        "unscored_categories": sorted({r["category"] for r in strict} - {r["category"] for r in scored}),
        "tokens": _spreads(((k, r["tokens"].get(k)) for r in records if "tokens" in r for k in TOKENS), TOKENS),
        "ms": _spreads(_times(records), STAGES),
        "flops": _spreads(
            ((k, r["flops"][k]) for r in records if r.get("flops") for k in ("total", "prefill")), ("total", "prefill")
        ),
        "peak_memory_bytes": max((r["peak_memory_bytes"] for r in records if r.get("peak_memory_bytes")), default=None),
        "correct": [None if r["correct"] is None else int(r["correct"]) for r in records],
    }


def _accuracy(records: Sequence[Record]) -> dict[str, Any]:
    return clustered_interval([r["correct"] for r in records], [r["video_id"] for r in records]).to_dict()


def _divided(records: Iterable[tuple[str, Record]]) -> dict[str, Any]:
    """The accuracy of each part, from (part, record)."""
    parts: dict[str, list[Record]] = {}
    for part, record in records:
        parts.setdefault(part, []).append(record)
    return {name: _accuracy(parts[name]) for name in sorted(parts)}


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in scores.items()}


def _times(records: Iterable[Record]) -> Iterable[tuple[str, float | None]]:
    for record in records:
        for stage, ms in record.get("ms", {}).items():
            if stage != "ttft" or "vision" not in record["reused"]:
                yield stage, ms


def _spreads(values: Iterable[tuple[str, float | None]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """median, min, max, p90 and n of every name that has values, in the order of `names`."""
    lists: dict[str, list[float]] = {name: [] for name in names}
    for name, value in values:
        if value is not None and name in lists:
            lists[name].append(value)
    return {name: spread(listed) for name, listed in lists.items() if listed}
