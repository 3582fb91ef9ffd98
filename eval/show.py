"""What the command line shows: progress on stderr, one table of cases on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def stdout() -> Console:
    """The console for results. A log or a pipe has no width of its own: tables stay whole there."""
    return Console(width=None if sys.stdout.isatty() else 130)


class Steps:
    """Progress on stderr: `with Steps() as say: say("decoding"); say("run", 3, 12)`.

    A moving line on a terminal; elsewhere (a log) a plain line for each new text.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.last = ""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.task = self.progress.add_task("", total=None)

    def __enter__(self) -> Steps:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        if self.console.is_terminal:
            self.progress.update(self.task, description=text, completed=done, total=total or None)
        elif text != self.last:
            self.console.print(f"{text} ...", markup=False, highlight=False, soft_wrap=True)
        self.last = text


def flops_text(value: float | None) -> str:
    """1.23 T, 45.6 G, ..."""
    if value is None:
        return "-"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def milliseconds_text(values: Mapping[str, float] | None) -> str:
    """The median, and the range where there is one."""
    if values is None:
        return "-"
    text = _number(values["median"])
    return text if values["n"] < 2 else f"{text} ({_number(values['min'])}-{_number(values['max'])})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def cases_table(
    title: str,
    cases: Mapping[str, Mapping[str, Any]],
    *,
    before: Mapping[str, Mapping[str, float]] | None = None,
    layer: int | None = None,
) -> Table:
    """One column per case of `holimerge.eval.measure.measure_cases`; the first one is what the others are compared to.

    before: ms of what comes before the model and is the same for all (decode, preprocess).
    layer: k, for the label.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in cases:
        table.add_column(name, justify="right", no_wrap=True)
    results = list(cases.values())

    def row(label: str, values: list[str], end: bool = False) -> None:
        table.add_row(label, *values, end_section=end)

    row("video tokens made", [str(r["tokens"]["features"]) for r in results])
    row("entering the LLM", [str(r["tokens"]["entering"]) for r in results])
    after = [r["tokens"]["after_inner"] for r in results]
    if any(n is not None for n in after):
        left = [str(r["tokens"]["entering"] if n is None else n) for r, n in zip(results, after, strict=True)]
        row(f"left after layer {layer}" if layer is not None else "left after layer k", left)
    if all(r["flops"] for r in results):
        row("FLOPs, vision and projector", [flops_text(_vision_flops(r["flops"])) for r in results])
        row("FLOPs, reduction", [flops_text(_reduction_flops(r["flops"])) for r in results])
        row("FLOPs, LLM prefill", [flops_text(r["flops"]["prefill"] + r["flops"]["lm_head"]) for r in results])
        row("FLOPs, all", [flops_text(r["flops"]["total"]) for r in results], end=True)
    for label, values in (before or {}).items():
        row(f"ms {label}", [milliseconds_text(values)] * len(results))
    stages = [r["ms"]["stages"] for r in results]
    for stage, label in (
        ("vision", "vision"),
        ("reduce", "reduce"),
        ("project", "project what is kept"),
        ("splice", "splice"),
        ("prefill", "prefill"),
        ("inner", "  of it, merging inside"),
    ):
        if any(stage in s for s in stages):
            row(f"ms {label}", [milliseconds_text(s.get(stage)) for s in stages])
    row("ms other (embed, lm_head, generate)", [milliseconds_text(r["ms"]["other"]) for r in results])
    row("ms to first token", [milliseconds_text(r["ms"]["ttft"]) for r in results])
    row("ms each further token", [milliseconds_text(r["ms"]["decode_per_token"]) for r in results], end=True)
    if any(r["peak_memory_bytes"] for r in results):
        row("MB peak memory", [f"{(r['peak_memory_bytes'] or 0) / 1e6:.0f}" for r in results], end=True)
    base = results[0]["ms"]["ttft"]["median"]
    row("speed-up to first token", [f"{base / r['ms']['ttft']['median']:.2f}x" for r in results])
    if before:
        extra = sum(values["median"] for values in before.values())
        ratios = [(base + extra) / (r["ms"]["ttft"]["median"] + extra) for r in results]
        row("  from the video file on", [f"{ratio:.2f}x" for ratio in ratios])
    return table


def _vision_flops(flops: Mapping[str, int]) -> int:
    return flops["vision"] + flops["projector"]


def _reduction_flops(flops: Mapping[str, int]) -> int:
    return flops["reduction"] + flops["received_attention"] + flops["inner"]
