"""`holimerge compare`: results of several runs, or of one run's configurations, paired sample by sample.

Every column is compared with the first one. Pairs are samples scored in both; a sample that one of them could not read
is in no pair and is counted. p is McNemar's exact test, which takes samples as independent; the interval of the
difference is a bootstrap over videos, which does not. Where videos have several questions, trust the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .intervals import clustered_interval, mcnemar, paired_bootstrap
from .plain import markdown, plain
from .records import RESULTS, RUN, SCHEMA, differences, read_json, write_json
from .show import flops_text
from .show_eval import changed_conditions

# What must be the same of two runs for their samples to be the same questions.
_SAME = ("revision", "protocol")


class Column(NamedTuple):
    """One configuration of one run."""

    label: str
    results: Mapping[str, Any]
    config: str


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json, or the one in a run's folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no results of `holimerge eval`, or of another schema.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        unfinished = path.is_dir() and (path / RUN).is_file()
        hint = "the run there is not finished, go on with `holimerge eval --resume`" if unfinished else "no such file"
        raise FileNotFoundError(f"{file}: {hint}")
    found = read_json(file)
    if found.get("kind") != "eval":
        raise ValueError(f"{file}: holds no results of `holimerge eval` (its kind is {found.get('kind')!r})")
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{file}: has schema {found.get('schema')!r}; this version reads {SCHEMA}")
    return found


def columns_of(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Column]:
    """Every configuration of every run, in order; a name that occurs twice is told apart by its run's."""
    pairs = [(name, results, config) for name, results in named for config in results["run"]["configs"]]
    names = [config for _, _, config in pairs]
    return [
        Column(config if names.count(config) == 1 else f"{name}: {config}", results, config)
        for name, results, config in pairs
    ]


def compare_results(named: Sequence[tuple[str, Mapping[str, Any]]], *, seed: int = 0) -> dict[str, Any]:
    """Compare runs.

    Args:
        named: (name, what `read_results` gives) of one or several runs; names as `run_names` makes them.
        seed: of the bootstrap.

    Returns:
        ready for JSON: kind, schema, seed, columns, differs (settings in which the runs differ), mixed_conditions (of
        runs resumed under others: names of what changed), tasks; per task and
        column accuracy, tokens, flops and ttft (medians), and for all but the first column `against_first`
        {difference, low, high, p, only_first, only_second, n, clusters, unpaired}; difference in percentage points.

    Raises:
        ValueError: fewer than two configurations, or runs with other tasks, samples, data or protocols.
    """
    columns = columns_of(named)
    if len(columns) < 2:
        raise ValueError("a comparison needs two configurations: give two results, or one with several configurations")
    for name, results in named[1:]:
        _check_same(named[0], (name, results))
    tasks = {}
    for task in columns[0].results["tasks"]:
        found = [column.results["tasks"][task]["configs"][column.config] for column in columns]
        samples = columns[0].results["tasks"][task]["samples"]
        first = _by_id(columns[0], task)
        told = {}
        for column, one in zip(columns, found, strict=True):
            told[column.label] = {
                "accuracy": one["accuracy"],
                "headline": one["headline"],
                "tokens": {key: _median(one["tokens"].get(key)) for key in ("features", "entering", "after_inner")},
                "flops": _median(one["flops"].get("total")),
                "ttft_ms": _median(one["ms"].get("ttft")),
            }
            if column is not columns[0]:
                told[column.label]["against_first"] = _paired(samples, first, _by_id(column, task), seed)
        tasks[task] = {"samples": len(samples["id"]), "columns": told}
    return {
        "kind": "comparison",
        "schema": SCHEMA,
        "seed": seed,
        "columns": [column.label for column in columns],
        "differs": _differs(named),
        "mixed_conditions": {name: changed for name, results in named if (changed := changed_conditions(results))},
        "tasks": tasks,
    }


def run_names(paths: Sequence[Path]) -> list[str]:
    """Short names of result files: the folder's for a results.json, else the file's; numbered where they repeat."""
    names = [
        (p if p.is_dir() else p.parent).resolve().name if p.stem == "results" or p.is_dir() else p.stem for p in paths
    ]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _check_same(first: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]]) -> None:
    (name_a, a), (name_b, b) = first, other
    if a["tasks"].keys() != b["tasks"].keys():
        raise ValueError(
            f"{name_a} has the tasks {', '.join(sorted(a['tasks']))}, {name_b} has {', '.join(sorted(b['tasks']))}"
        )
    for task in a["tasks"]:
        for key in _SAME:
            here, there = a["run"]["tasks"][task][key], b["run"]["tasks"][task][key]
            if here != there:
                raise ValueError(f"task {task}: {name_a} has {key} {here!r}, {name_b} has {there!r}")
        ids_a, ids_b = ([*run["tasks"][task]["samples"]["id"]] for run in (a, b))
        for name, missing in ((name_b, _missing(ids_a, ids_b)), (name_a, _missing(ids_b, ids_a))):
            if missing:
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                listed = ", ".join(plain(identity) for identity in missing[:5])
                raise ValueError(f"task {task}: {name} lacks the samples {listed}{more}; the runs' samples differ")


def _missing(ids: Sequence[str], others: Sequence[str]) -> list[str]:
    there = set(others)
    return [identity for identity in ids if identity not in there]


def _differs(named: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Settings besides the configurations in which runs differ: setting -> run -> value."""
    found = {}
    for key in ("model", "model_revision", "num_frames", "seed", "dtype", "attn_implementation"):
        values = {name: results["run"].get(key) for name, results in named}
        if len({str(value) for value in values.values()}) > 1:
            found[key] = values
    for task in named[0][1]["tasks"]:
        for key in ("sampling", "max_new_tokens", "samples_sha256"):
            values = {name: results["run"]["tasks"][task].get(key) for name, results in named}
            if len({str(value) for value in values.values()}) > 1:
                found[f"{task}.{key}"] = values
    for key in ("device", "batch_size", "reuse"):
        values = {name: results["conditions"].get(key) for name, results in named}
        if len({str(value) for value in values.values()}) > 1:
            found[key] = values
    for key in sorted({package for _, results in named for package in results["run"]["versions"]}):
        values = {name: results["run"]["versions"].get(key) for name, results in named}
        if len({str(value) for value in values.values()}) > 1:
            found[f"version of {key}"] = values
    for key in sorted({config for _, results in named for config in results["run"]["configs"]}):
        given = {name: results["run"]["configs"][key] for name, results in named if key in results["run"]["configs"]}
        first, *others = given
        changed = {name: "; ".join(differences(given[first] or {}, given[name] or {})) for name in others}
        if any(changed.values()):  # two files of one name
            found[f"configuration {key}"] = {first: "first", **{k: v or "the same" for k, v in changed.items()}}
    return found


def _by_id(column: Column, task: str) -> dict[str, int | None]:
    told = column.results["tasks"][task]
    return dict(zip(told["samples"]["id"], told["configs"][column.config]["correct"], strict=True))


def _paired(
    samples: Mapping[str, Sequence[str]], first: Mapping[str, int | None], second: Mapping[str, int | None], seed: int
) -> dict[str, Any]:
    a, b, videos = [], [], []
    for identity, video in zip(samples["id"], samples["video_id"], strict=True):
        x, y = first[identity], second[identity]
        if x is not None and y is not None:
            a.append(x)
            b.append(y)
            videos.append(video)
    unpaired = len(samples["id"]) - len(a)
    if not a:
        return {"difference": None, "low": None, "high": None, "n": 0, "clusters": 0, "p": None, "unpaired": unpaired}
    found = paired_bootstrap(a, b, videos, seed=seed)
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found._asdict().items()}
    # the accuracies of the very pairs, in case one run read videos that the other could not
    shares = {name: clustered_interval(y, videos).to_dict()["percent"] for name, y in (("first", a), ("second", b))}
    return {**rounded, **mcnemar([*map(bool, a)], [*map(bool, b)]), "paired_percent": shares, "unpaired": unpaired}


def _median(values: Mapping[str, float] | None) -> float | None:
    return None if not values else values["median"]


# ---------------------------------------------------------------------------------------------------------- showing

_HEAD = ("", "accuracy %", "difference", "95 % interval", "p", "right only here / there", "tokens", "FLOPs", "ms TTFT")


def table_rows(told: Mapping[str, Any]) -> list[list[str]]:
    """One task's rows as plain text, for a terminal or Markdown; the columns are `_HEAD`."""
    rows = []
    base = next(iter(told["columns"].values()))
    for label, one in told["columns"].items():
        tokens = [one["tokens"]["entering"], one["tokens"]["after_inner"]]
        row = [label, _number(one["accuracy"]["percent"], ".1f")]
        pair = one.get("against_first")
        if pair is None:
            row += [""] * 4
        elif pair["difference"] is None:
            row += ["no pairs", "", "", ""]
        else:
            interval = "-" if pair["low"] is None else f"[{pair['low']:+.1f}, {pair['high']:+.1f}]"
            row += [f"{pair['difference']:+.1f}", interval, _p_text(pair["p"])]
            row += [f"{pair['only_second']} / {pair['only_first']}"]
        row += [" -> ".join(f"{n:.0f}" for n in tokens if n is not None) or "-"]
        row += [_ratio(one["flops"], base["flops"], flops_text(one["flops"]))]
        row += [_ratio(one["ttft_ms"], base["ttft_ms"], _number(one["ttft_ms"], ".1f"))]
        rows.append([plain(cell) for cell in row])
    return rows


def _ratio(value: float | None, base: float | None, text: str) -> str:
    if value is None or not base or value == base:
        return text
    return f"{text} ({100 * value / base:.0f} %)"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def remarks(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader has to know besides the tables, one line each."""
    lines = [f"difference: percentage points against {comparison['columns'][0]}, on samples scored in both"]
    lines.append(
        f"interval: bootstrap over videos (seed {comparison['seed']}); p: McNemar's exact test, samples as independent"
    )
    for setting, values in comparison["differs"].items():
        lines.append(f"the runs differ in {setting}: " + "; ".join(f"{k} {v}" for k, v in values.items()))
    for name, changed in comparison["mixed_conditions"].items():
        lines.append(f"{name} was resumed under other conditions ({', '.join(changed)}): its times are a mixture")
    for task, told in comparison["tasks"].items():
        lines += _own_metric(task, told["columns"])
        for label, one in told["columns"].items():
            if (lost := one.get("against_first", {}).get("unpaired")) is not None and lost:
                lines.append(f"{task}, {label}: {lost} samples are not scored in both and are in no pair")
    return lines


def _own_metric(task: str, columns: Mapping[str, Any]) -> list[str]:
    """The task's own metric, where it is another than the share of right answers that the table compares."""
    first = {label: next(iter(one["headline"].items()), None) for label, one in columns.items()}
    other = any(own and abs(own[1] - columns[label]["accuracy"]["percent"]) > 1e-3 for label, own in first.items())
    if not other:
        return []
    name = next(own[0] for own in first.values() if own)
    shown = ", ".join(f"{label} {'-' if own is None else format(own[1], '.1f')}" for label, own in first.items())
    return [f"{task}, {name} (the task's own metric; the table compares the share of right answers): {shown}"]


def show_comparison(comparison: Mapping[str, Any], console: Console) -> None:
    """Print one table a task."""
    for task, told in comparison["tasks"].items():
        table = Table(title=Text(plain(f"{task}, {told['samples']} samples")), title_justify="left", title_style="bold")
        for i, name in enumerate(_HEAD):
            table.add_column(name, justify="right" if i else "left")
        for row in table_rows(told):
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for line in remarks(comparison):
        console.print(plain(line), style="dim", markup=False, highlight=False, soft_wrap=True)


def markdown_text(comparison: Mapping[str, Any]) -> str:
    """The same as Markdown, one table a task."""
    lines = ["# Comparison", ""]
    for task, told in comparison["tasks"].items():
        lines += [f"## {markdown(task)}, {told['samples']} samples", ""]
        lines.append("| " + " | ".join(_HEAD) + " |")
        lines.append("|---|" + "---:|" * (len(_HEAD) - 1))
        lines += ["| " + " | ".join(markdown(cell) for cell in row) + " |" for row in table_rows(told)]
        lines.append("")
    lines += [f"- {markdown(line)}" for line in remarks(comparison)]
    return "\n".join(lines) + "\n"


def compare_files(paths: Sequence[Path], *, seed: int = 0, output: Path | None = None) -> dict[str, Any]:
    """`compare_results` of files or run folders; `output`: a folder for comparison.json and comparison.md."""
    named = list(zip(run_names(paths), [read_results(path) for path in paths], strict=True))
    comparison = compare_results(named, seed=seed)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "comparison.json", comparison)
        (output / "comparison.md").write_text(markdown_text(comparison), encoding="utf-8")
    return comparison
