"""How hostile cases are drawn: any configuration, any batch, about a third of them with one thing badly wrong."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hostile import CALLS, FAULTS, LOOKS, PICTURE, POISONS, SIDES, Case, Clip, Part, inputs, sizes_of_videos
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from toys import TOYS

from holimerge import list_methods, list_presets, load_config
from holimerge.registry import method_module


def _option(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of one key of a method's options, extremes often."""
    if "anyOf" in schema:
        return st.one_of([_option(s) for s in reversed(schema["anyOf"])])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema["type"]
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    if kind == "integer":
        high = schema.get("maximum", low + 64)
        return st.integers(low, high) | st.sampled_from([low, low + 1, high])
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1e-3) + 1e-3)
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 10))
    return st.floats(low, high) | st.sampled_from([float(low), float(high)])


@functools.cache
def options(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the keys of a method's `outer` block."""
    properties = method_module(method).METHOD.options.model_json_schema()["properties"]
    return st.fixed_dictionaries({}, optional={name: _option(schema) for name, schema in properties.items()})


shares = st.sampled_from([0.25, 0.1, 0.5, 1.0, 0.9, 0.05, 1e-6]) | st.floats(0.001, 1)
budgets = st.fixed_dictionaries(
    {}, optional={"exact": st.booleans()}
).flatmap(
    lambda rest: st.one_of(
        shares.map(lambda v: {"retain": v, **rest}),
        (st.sampled_from([1, 2, 10**6]) | st.integers(1, 80)).map(lambda v: {"tokens": v, **rest}),
        (st.sampled_from([0.5, 1.0]) | st.floats(0.2, 1)).map(lambda v: {"flops": v, **rest}),
    )
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Presets, changed or not, and every method with any of its options."""
    toy = TOYS[family]
    if draw(st.booleans()):
        # what a tower gives that reduces inside itself has laws of its own: see test_encoder
        name = draw(st.sampled_from([name for name in list_presets() if load_config(name).encoder is None]))
        config: dict[str, Any] = {"base": name}
        method = load_config(name).method
    else:
        method = draw(st.sampled_from(list_methods()))
        config = {"method": method}
    if method_module(method).METHOD.options is not None:
        if "method" in config or draw(st.booleans()):
            config["budget"] = draw(budgets)
        if "method" in config or draw(st.booleans()):
            config["outer"] = draw(options(method))
        chunk = draw(st.none() | st.sampled_from([1, 2, 3, 1000]))
        if chunk is not None:
            config["chunk_frames"] = chunk
    inner = draw(st.sampled_from(["none", "any", "as it is"])) if toy.inner_layers else "none"
    if inner != "as it is":
        config["inner"] = None
    if inner == "any":
        config["inner"] = {
            "layer": draw(st.sampled_from(toy.inner_layers)),
            "retain": draw(shares),
            "merge": draw(st.sampled_from(["mean", "pairwise", "drop"])),
        }
    return {**config, **toy.extra}


sizes = st.integers(0, len(SIDES) - 1)
few_words = st.sampled_from([0, 1, 3, 6])


@st.composite
def row_parts(draw: st.DrawFn, family: str, shape: Clip | None) -> tuple[Part, ...]:
    """Text, then up to three videos and perhaps an image, each followed by text; any of the texts may be missing."""
    parts: list[Part] = [draw(few_words)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3, 0]))):
        size = shape or Clip(draw(st.sampled_from([2, 1, 3, 5])), side=draw(sizes))
        parts.append(Clip(size.steps, draw(st.sampled_from(LOOKS)), size.side, draw(st.integers(0, 3))))
        parts.append(draw(few_words))
    if draw(st.sampled_from([False] * 5 + [True])):
        parts.insert(draw(st.integers(0, len(parts))), PICTURE)
    return tuple(part for part in parts if part != 0)


def level(family: str, rows: list[tuple[Part, ...]]) -> list[tuple[Part, ...]]:
    """The rows with more text at the end of the shorter ones, so that none is padded, yet they lose unlike numbers."""
    lengths = [inputs(family, Case(rows=(row,)))["input_ids"].shape[1] if row else 0 for row in rows]
    return [(*row, max(lengths) - n) if n < max(lengths) else row for row, n in zip(rows, lengths, strict=True)]


def possible_faults(family: str, rows: list[tuple[Part, ...]]) -> list[str]:
    """What can be wrong between these rows' prompts and their videos."""
    texts = [r for r, row in enumerate(rows) if any(isinstance(part, int) for part in row)]
    videos = [r for r, row in enumerate(rows) for part in row if isinstance(part, Clip)]
    impossible = set()
    if not texts:
        impossible.add("too many")
    if all(r == videos[-1] for r in texts):
        impossible.add("moved")
    if len(videos) == 1:
        impossible.add("a video too few")
    if not sizes_of_videos(family):
        impossible.add("no sizes")
    if not any(name.endswith("grid_thw") for name in sizes_of_videos(family)):
        impossible.add("one empty")
    return [fault for fault in FAULTS if fault not in impossible]


@st.composite
def cases(draw: st.DrawFn, family: str, trouble: str = "") -> Case:
    """Any call of any configuration. trouble: "poison" or "fault", if one thing is to be badly wrong."""
    toy = TOYS[family]
    shape = Clip(draw(st.sampled_from([2, 1, 3, 6, 12])), side=draw(sizes)) if toy.equal_frames else None
    rows = draw(st.lists(row_parts(family, shape), min_size=1, max_size=3))
    if "image and video" in toy.stock_fails and any(isinstance(part, Clip) for row in rows for part in row):
        rows = [tuple(part for part in row if part != PICTURE) for row in rows]
    if trouble and not any(isinstance(part, Clip) for row in rows for part in row):
        rows[-1] = (*rows[-1], replace(shape or Clip(), seed=4))
    if not any(rows):
        rows[0] = (3,)
    if draw(st.sampled_from([False, False, True])):
        rows = level(family, rows)
    videos = [(r, i) for r, row in enumerate(rows) for i, part in enumerate(row) if isinstance(part, Clip)]
    if trouble == "poison":
        r, i = draw(st.sampled_from(videos))
        poisoned = replace(rows[r][i], look=draw(st.sampled_from(POISONS)))
        rows[r] = (*rows[r][:i], poisoned, *rows[r][i + 1 :])
    fault = draw(st.sampled_from(possible_faults(family, rows))) if trouble == "fault" else None
    ends = len(rows) == 1 and isinstance(rows[0][-1], Clip) and "video at the end" not in toy.stock_fails
    return Case(
        draw(configs(family)),
        tuple(rows),
        call=draw(st.sampled_from(CALLS)),
        side=draw(st.sampled_from(["left", "left", "right"])),
        mask=draw(st.sampled_from(["int", "int", "bool", "missing"])),
        dtype=draw(st.sampled_from(["float32"] * 4 + ["bfloat16", "float16"])),
        attn=draw(st.sampled_from(["sdpa", "eager"])),
        fault=fault,
        use_cache=draw(st.sampled_from([None, True, False])),
        grad=draw(st.booleans()),
        bare=ends and fault is None and draw(st.booleans()),
    )


def fitted(family: str, case: Case) -> Case:
    """The case with what every configuration of the family needs, and an inner merge only where it can have one."""
    toy, config = TOYS[family], dict(case.config)
    if not toy.inner_layers:
        config["inner"] = None
    elif config.get("inner"):
        config["inner"] = {**config["inner"], "layer": toy.inner_layers[-1]}
    return replace(case, config={**config, **toy.extra})


def impossible(family: str, case: Case) -> str:
    """Why there is no such case of the family, or why its stock class cannot do it; empty if neither holds."""
    toy, parts = TOYS[family], {part for row in case.rows for part in row}
    if case.fault is not None and case.fault not in possible_faults(family, list(case.rows)):
        return f"no prompt of {family} can have this fault"
    mode = "image and video" if case.clips and PICTURE in parts else "video at the end" if case.bare else ""
    if mode in toy.stock_fails:
        return f"stock {family}, {mode}: {toy.stock_fails[mode]}"
    return ""


def examples(number: int, about: str) -> Callable[[Any], Any]:
    """A decorator: so many examples, the same ones each time for what the test is `about`, or at night others."""
    profile = settings(
        max_examples=number,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    fixed = "HOLIMERGE_CASES" not in os.environ
    return lambda test: profile(seed(zlib.crc32(about.encode()))(test) if fixed else test)
