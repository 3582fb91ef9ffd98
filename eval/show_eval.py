"""What `holimerge eval` shows: how far it is, on stderr, and a table of results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from .plain import plain
from .show import flops_text

_EVERY = 15.0  # seconds between two lines of a log


def duration_text(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class EvalProgress:
    """Answers given, their rate and the time left, on stderr: a moving line on a terminal, else a line now and then.

    Use it as `with EvalProgress() as meter: evaluate(..., meter=meter)`.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total = self.done = self.before = 0
        self.since, self.told = time.monotonic(), float("-inf")
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
        )
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.task = self.progress.add_task("", total=None, rate="")

    def __enter__(self) -> EvalProgress:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def begin(self, total: int, done: int) -> None:
        """There are `total` answers to give, `done` of them are there from an earlier start."""
        self.total, self.done, self.before = total, done, done
        if done:
            self.say(f"{done} of {total} answers are there already")

    def say(self, text: str) -> None:
        """Tell what else is going on; the clock of the rate starts anew."""
        self.since, self.before = time.monotonic(), self.done
        if self.console.is_terminal:
            self.progress.update(self.task, description=plain(text), completed=self.done, total=self.total, rate="")
        else:
            self._line(plain(text))

    def step(self, what: str, count: int) -> None:
        """`count` more answers are there."""
        self.done += count
        text, rate = plain(what), self.rate()
        if self.console.is_terminal:
            self.progress.update(self.task, description=text, completed=self.done, total=self.total, rate=rate)
        elif self.done == self.total or time.monotonic() - self.told >= _EVERY:
            self.told = time.monotonic()
            self._line(f"{text}: {self.done} of {self.total}, {rate}")

    def rate(self) -> str:
        """Answers a second (or a minute) since the model was there, and the time left at this rate."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        speed = (self.done - self.before) / seconds
        if not speed:
            return ""
        text = f"{speed:.1f} a second" if speed >= 1 else f"{60 * speed:.1f} a minute"
        return f"{text}, {duration_text((self.total - self.done) / speed)} left"

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def interval_text(found: Mapping[str, Any]) -> str:
    """62.5 [58.1, 66.7]"""
    if found["percent"] is None:
        return "-"
    return f"{found['percent']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"


def median_text(values: Mapping[str, Any] | None, form: str = ".0f") -> str:
    """The median of a spread."""
    return "-" if not values else format(values["median"], form)


def changed_conditions(results: Mapping[str, Any]) -> list[str]:
    """Conditions that were others when a run began than when it was resumed, by name."""
    now = results["conditions"]
    names = {
        name for one in now.get("earlier", []) for name in {*one, *now} - {"earlier"} if one.get(name) != now.get(name)
    }
    return sorted(names - {"load_average", "date"})


def show_results(results: Mapping[str, Any], console: Console) -> None:
    """Print a table of each task, and below it what could not be read."""
    for name, task in results["tasks"].items():
        run = results["run"]["tasks"][name]
        console.print(_task_table(name, run, task))
        for config, found in task["configs"].items():
            for line in _remarks(found):  # words of data sets are in it
                console.print(plain(f"{config}: {line}"), markup=False, highlight=False, soft_wrap=True, style="yellow")
    if changed := changed_conditions(results):
        console.print(
            f"resumed under other conditions ({', '.join(changed)}): times and memory are a mixture",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        "accuracy in % with 95 % intervals clustered by video; tokens, FLOPs and ms are medians; "
        "ms to first token without decoding and preprocessing",
        style="dim",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _task_table(name: str, run: Mapping[str, Any], task: Mapping[str, Any]) -> Table:
    title = f"{name}, {run['samples']} samples, protocol {run['protocol']}"
    table = Table(title=Text(plain(title)), title_justify="left", title_style="bold")
    table.add_column("")
    for config in task["configs"]:
        table.add_column(Text(plain(config)), justify="right", no_wrap=True)
    found = list(task["configs"].values())

    def row(label: str, values: list[str], end: bool = False) -> None:
        table.add_row(Text(plain(label)), *values, end_section=end)

    row("accuracy", [interval_text(f["accuracy"]) for f in found])
    for label in (name for name in found[0]["headline"] if name != "accuracy"):
        row(label, [f"{f['headline'][label]:.1f}" if label in f["headline"] else "-" for f in found])
    for title, parts in (("", "by_category"), *((f"{g} ", g) for g in found[0]["by_group"])):
        table.add_section()
        divided = [f["by_category"] if parts == "by_category" else f["by_group"][parts] for f in found]
        for label in sorted({label for d in divided for label in d}):
            row(f"  {title}{label}", [interval_text(d[label]) if label in d else "-" for d in divided])
    table.add_section()
    row("video tokens made", [median_text(f["tokens"].get("features")) for f in found])
    row("entering the LLM", [median_text(f["tokens"].get("entering")) for f in found])
    if any("after_inner" in f["tokens"] for f in found):
        row("left after the inner merge", [median_text(f["tokens"].get("after_inner")) for f in found])
    row("FLOPs to the first token", [flops_text((f["flops"].get("total") or {}).get("median")) for f in found])
    for stage, label in (("decode", "decode"), ("preprocess", "preprocess"), ("ttft", "to first token")):
        row(f"ms {label}", [median_text(f["ms"].get(stage), ".1f") for f in found])
    peaks = [f["peak_memory_bytes"] for f in found]
    row("MB peak memory", ["-" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks])
    return table


def _remarks(found: Mapping[str, Any]) -> list[str]:
    counts = found["counts"]
    lines = []
    if (first := found.get("first_error")) is not None:
        lines.append(f"first error: {first}")
    if counts["unreadable"]:
        lines.append(
            f"{counts['unreadable']} samples of {counts['unreadable_videos']} videos that cannot be read are in no "
            f"accuracy; counted as wrong it is {interval_text(found['errors_wrong'])}"
        )
        lines.append("once they can be read: take their lines out of records.jsonl and go on with --resume")
    for key, text in (
        ("unshowable", "samples could not be made into a prompt and are in no accuracy"),
        ("no_answer", "answers held no choice and count as wrong"),
        ("fallback", "choices were drawn at random, as the protocol wants where none can be read"),
        ("secret", "samples have no published answer and are not scored"),
    ):
        if counts[key]:
            lines.append(f"{counts[key]} {text}")
    if lost := found.get("unscored_categories"):
        lines.append(f"no sample of these categories is scored, so means over categories lack them: {', '.join(lost)}")
    return lines
