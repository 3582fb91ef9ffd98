"""`decode` of the bench: tokens a second after the prompt, and the memory of the cache, unpatched and reduced.

    python -m holimerge.eval.bench_decode --shape toy --output results

One run writes the longest answer; shorter ones are its first tokens. The cases take turns. The clock is read, with the
device synchronised, when every token is there. On a GPU, where the host is slower to launch a step than the device to
do it, every case that can have a static cache is measured with its steps recorded as CUDA graphs too; recording is part
of its times, and told by itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holimerge.config import Config, load_config
from holimerge.graphs import graphed
from holimerge.recording import Recorder, record_cuda
from holimerge.timing import now

from .bench import bench_inputs, shape_config
from .conditions import conditions
from .measure import spread
from .run import patched, run_once
from .toy import describe, random_model

LENGTHS, BATCHES = (16, 64, 256), (1, 8)
GPU_LENGTHS = (16, 64, 128)  # a GPU's time is dear
PRESET = "holimerge-10"
GRAPHED = ", graphed"


def decode_cases(preset: str = PRESET, graphs: bool = False) -> dict[str, Config | None]:
    """Unpatched, a preset with the inner merge, the same with a compacted cache, and its outer reduction alone.

    graphs: those with a static cache once more, their steps recorded; their names end in `GRAPHED`.
    """
    config = load_config(preset)
    assert config.inner is not None, f"{preset} has no inner merge"
    cases = {
        "unpatched": None,
        preset: config,
        f"{preset}, compact cache": load_config({"base": preset, "inner": {"compact_cache": True}}),
        f"{preset}, outer only": config.model_copy(update={"inner": None}),
    }
    static = [name for name in cases if "compact" not in name] if graphs else []
    return cases | {name + GRAPHED: cases[name] for name in static}


class Watched:
    """A recorder whose milliseconds are kept."""

    def __init__(self, record: Recorder) -> None:
        self.record, self.ms = record, list[float]()

    def __call__(self, run: Callable[[], Any], device: torch.device) -> Any:
        begin = now()
        found = self.record(run, device)
        self.ms.append((now() - begin) * 1000)
        return found


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a dynamic cache holds."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def rows_of(inputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The same prompt `batch` times."""
    return {key: value.repeat(batch, *[1] * (value.ndim - 1)) for key, value in inputs.items()}


def bench_decode(
    *,
    shape: str = "toy",
    frames: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    preset: str = PRESET,
    device: str | None = None,
    repeats: int = 3,
    warmup: int = 1,
    text_tokens: int = 40,
    seed: int = 0,
    only: Sequence[str] = (),
    record: Recorder | None = None,
    say: Callable[..., None] = lambda *_: None,
) -> dict[str, Any]:
    """Measure decoding on random weights.

    Args:
        shape: as in `holimerge.eval.bench.bench_model`. frames: T, default the shape's (toy: 32).
        lengths: answer lengths in tokens. batches: rows of the batch, all the same prompt.
        preset: a configuration with an inner merge.
        device: default a GPU if there is one; bfloat16 there, float32 elsewhere.
        repeats, warmup: runs of every case; those to warm up write the shortest answer.
        only: names of cases; all if empty. "unpatched" runs always.
        record: how steps are recorded; default CUDA graphs on a GPU, not at all elsewhere.

    Returns:
        `batches`: per batch {batch, cases: name -> {tokens_per_second by length (median, min, max, p90, n),
        ms_per_token: of the second half of the longest answer, recording_ms (None: nothing is recorded), cache_bytes
        after the prompt}}; `ratios`: per case, batch and longest answer, of tokens a second and of cache
        bytes against the unpatched model (above 1: better); `conditions`.

    Raises:
        ValueError: `only` names no case.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = torch.bfloat16 if where.type == "cuda" else torch.float32
    config, known = shape_config(shape)
    frames = frames or (known.frames if known is not None else 32)
    say("building the model", 0, 0)
    model = random_model(config, device=where, dtype=kind, seed=seed)
    made = bench_inputs(config, frames=frames, text_tokens=text_tokens, grid=known.grid if known else None, seed=seed)
    inputs = {key: value.to(where) for key, value in made.items()}
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(kind)
    if record is None and where.type == "cuda":
        record = record_cuda
    cases, found = decode_cases(preset, graphs=record is not None), []
    if unknown := set(only) - set(cases):
        raise ValueError(f"only: no case {', '.join(map(repr, sorted(unknown)))}; valid: {', '.join(cases)}")
    cases = {name: case for name, case in cases.items() if not only or name in ("unpatched", *only)}
    for batch in batches:
        rows = rows_of(inputs, batch)
        steps: dict[str, list[list[float]]] = {name: [] for name in cases}
        recorders = {name: Watched(record) for name in cases if record is not None and name.endswith(GRAPHED)}
        held: dict[str, int] = {}
        for turn in range(warmup + repeats):
            length = max(lengths) if turn >= warmup else min(lengths)
            for name in list(cases) if turn % 2 == 0 else reversed(list(cases)):
                say(f"batch {batch}, {name}, run {turn + 1}", turn, warmup + repeats)
                how: dict[str, Any] = {"cache_implementation": "static"} if name in recorders else {}
                block = graphed(model, record=recorders[name]) if name in recorders else nullcontext()
                with patched(model, cases[name]), block:
                    run = run_once(model, rows, max_new_tokens=length + 1, whole=True, memory=False, **how)
                    if name not in held:
                        held[name] = _cache_of(model, rows, **how)
                if turn >= warmup:
                    steps[name].append(run.per_token)
        found.append(
            {
                "batch": batch,
                "cases": {
                    name: {
                        "tokens_per_second": {
                            str(n): spread(1000 * batch * n / sum(run[:n]) for run in steps[name]) for n in lengths
                        },
                        "ms_per_token": spread(ms for run in steps[name] for ms in run[len(run) // 2 :]),
                        "recording_ms": spread(recorders[name].ms) if name in recorders else None,
                        "cache_bytes": held[name],
                    }
                    for name in cases
                },
            }
        )
    return {
        "kind": "decode",
        "shape": shape,
        "sizes": describe(config),
        "prompt": {"frames": frames, "text_tokens": text_tokens},
        "batches": found,
        "ratios": _ratios(found, str(max(lengths))),
        "conditions": conditions(
            where,
            dtype=str(kind).removeprefix("torch."),
            attn=str(getattr(model.config, "_attn_implementation", None)),
            seed=seed,
            warmup=warmup,
            repeats=repeats,
            cuda_graphs=record is record_cuda,
        ),
    }


def _cache_of(model: Any, rows: Mapping[str, Tensor], **how: Any) -> int:
    out = model.generate(**rows, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **how)
    return cache_bytes(out.past_key_values)


def _ratios(found: Sequence[Mapping[str, Any]], longest: str) -> dict[str, float]:
    ratios = {}
    for entry in found:
        full = entry["cases"]["unpatched"]
        for name, case in entry["cases"].items():
            if name == "unpatched":
                continue
            speed = case["tokens_per_second"][longest]["median"] / full["tokens_per_second"][longest]["median"]
            ratios[f"{name}, batch {entry['batch']}, tokens a second"] = round(speed, 3)
            ratios[f"{name}, batch {entry['batch']}, cache"] = round(full["cache_bytes"] / case["cache_bytes"], 3)
            alike = entry["cases"].get("unpatched" + GRAPHED)
            if alike is not None and name.endswith(GRAPHED) and not name.startswith("unpatched"):
                speed = case["tokens_per_second"][longest]["median"] / alike["tokens_per_second"][longest]["median"]
                ratios[f"{name}, batch {entry['batch']}, tokens a second over unpatched{GRAPHED}"] = round(speed, 3)
    return ratios


def decode_table(result: Mapping[str, Any]) -> Any:
    """The result as a rich table."""
    from rich.table import Table

    lengths = list(next(iter(result["batches"][0]["cases"].values()))["tokens_per_second"])
    table = Table(title=f"Decoding, {result['shape']}: tokens a second, median (range)", title_justify="left")
    table.add_column("")
    for n in lengths:
        table.add_column(f"{n} tokens", justify="right", no_wrap=True)
    table.add_column("ms a token at last", justify="right")
    table.add_column("recording, ms", justify="right")
    table.add_column("cache, MiB", justify="right")
    for entry in result["batches"]:
        table.add_section()
        for name, case in entry["cases"].items():
            speeds = case["tokens_per_second"]
            cells = (f"{speeds[n]['median']:.1f} ({speeds[n]['min']:.1f}-{speeds[n]['max']:.1f})" for n in lengths)
            recording = "" if case["recording_ms"] is None else f"{case['recording_ms']['median']:.0f}"
            last = (f"{case['ms_per_token']['median']:.2f}", recording, f"{case['cache_bytes'] / 2**20:.1f}")
            table.add_row(f"batch {entry['batch']}, {name}", *cells, *last)
    return table


def main() -> None:
    """The command line of `python -m holimerge.eval.bench_decode`."""
    from .show import Steps, stdout

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="toy")
    parser.add_argument("--frames", type=int, default=None)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="beside the unpatched model")
    parser.add_argument("--output", default=None, metavar="FOLDER", help="write the result as JSON into this folder")
    given = parser.parse_args()
    if min(given.repeats, *given.lengths, *given.batches) < 1:
        parser.error("--repeats, --lengths and --batches must be at least 1")
    with Steps() as say:
        result = bench_decode(
            shape=given.shape,
            frames=given.frames,
            lengths=given.lengths,
            batches=given.batches,
            repeats=given.repeats,
            only=given.only,
            say=say,
        )
    stdout().print(decode_table(result))
    if given.output is not None:
        folder = Path(given.output)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"decode-{result['shape']}-{result['conditions']['device_type']}.json"
        (folder / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
