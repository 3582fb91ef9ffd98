"""The documents' tables of measured figures, written from the result files and from nothing else.

python -m holimerge.eval.readme      rewrites the parts of README.md and BENCHMARKS.md between their two markers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from holimerge.config import load_config
from holimerge.registry import list_presets

from .demo import FULL_RUN
from .show import flops_text
from .show_eval import interval_text
from .small_shapes import SMALL

BEGIN, END = "<!-- results: written by `python -m holimerge.eval.readme` -->", "<!-- end of results -->"


def results_block(folder: Path) -> str:
    """Markdown for every reduction result in `folder`, and for the embedded model's evaluation."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    parts = [BEGIN]
    reductions = sorted((r for r in found if r.get("kind") == "reduction"), key=lambda r: r["features"])
    if reductions:
        about = reductions[0]["conditions"]
        parts += [
            f"Outer reduction alone, {about['device']} CPU, {about['threads']} thread, {about['dtype']}, median of "
            f"{about['repeats']} runs, `{reductions[0]['preset']}`, against the authors' procedure, re-created:",
            "",
            "| features | holimerge | authors', our cosine | faster | authors', torch's cosine | faster |",
            "|---|---|---|---|---|---|",
        ]
        for r in reductions:
            size = " x ".join(map(str, r["features"]))
            ours, theirs, own = (
                f"{r['ms'][side]['median']:.0f} ms" for side in ("ours", "theirs", "theirs_own_cosine")
            )
            parts.append(
                f"| {size} | {ours} | {theirs} | {r['speedup']:.1f}x | {own} | {r['speedup_own_cosine']:.1f}x |"
            )
    if FULL_RUN.is_file():
        parts += ["", *_evaluation(json.loads(FULL_RUN.read_text(encoding="utf-8")))]
    return "\n".join([*parts, END])


def _first_token(result: dict[str, Any]) -> list[str]:
    """Time to first token by stage, unpatched and under the presets."""
    about = result["conditions"]
    lines = [
        f"First token, {result['shape']} with {result['weights']} weights, {result['prompt']['frames']} frames, "
        f"{about['device']}, {about['dtype']}, {about['attn']}, ms, median of {about['repeats']} runs; commit "
        f"{about['commit'][:7]}{'-dirty' if about['commit'].endswith('dirty') else ''}:",
        "",
        "| | video tokens | vision | reduce | project, splice | prefill | other | first token | faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        if name != "unpatched" and name not in list_presets():
            continue
        stages = {stage: value["median"] for stage, value in case["ms"]["stages"].items()}
        ratio = result["gains"][name]["ttft_ratio"] if name in result["gains"] else 1.0
        numbers = (
            stages["vision"],
            stages.get("reduce", 0.0),
            stages.get("project", 0.0) + stages.get("splice", 0.0),
            stages["prefill"],
            case["ms"]["other"]["median"],
            case["ms"]["ttft"]["median"],
        )
        cells = " | ".join(f"{ms:.1f}" for ms in numbers)
        times = 1 if name == "unpatched" else load_config(name).more_frames
        more = f", {times * result['prompt']['frames']} frames" if times > 1 else ""
        lines.append(f"| {name}{more} | {case['tokens']['entering']} | {cells} | {ratio:.2f}x |")
    return lines


def ratios_block(folder: Path) -> str:
    """Markdown for the first token on a GPU and of small shapes, and for the ratios of every result in `folder`."""
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    tables = ("model-", "more-frames-")
    models = [r for path, r in found.items() if r.get("kind") == "model" and path.stem.startswith(tables)]
    on_gpu = [r for r in models if r["conditions"]["device_type"] == "cuda"]
    small = [r for r in models if r["shape"] in SMALL]
    parts = [BEGIN]
    for result in on_gpu:
        parts += [*_first_token(result), ""]
    for note in dict.fromkeys(r["note"] for r in on_gpu if "note" in r):
        parts += [note, ""]
    if small:
        parts += ["The same architectures, narrow and shallow, on a CPU, where no launch costs more than its work:", ""]
    for result in small:
        parts += [*_first_token(result), ""]
    parts += ["| result | ratio | | machine |", "|---|---|---|---|"]
    for path, result in found.items():
        for name, value in (result.get("ratios") or {}).items():
            about = result["conditions"]
            where = f"{about['device']}, {about['threads']} thread{'s' if about['threads'] > 1 else ''}"
            parts.append(f"| [{path.stem}](results/{path.name}) | {name} | {value:.2f} | {where} |")
    return "\n".join([*parts, END])


def _evaluation(found: dict[str, Any]) -> list[str]:
    task, about = found["tasks"]["synthetic"], found["conditions"]
    videos, questions = len(set(task["samples"]["video_id"])), len(task["samples"]["id"])
    lines = [
        f"Accuracy of the embedded tiny model on synthetic videos ({videos} test videos, {questions} questions, chance "
        f"25 %; {about['device']} CPU, {about['dtype']}; 95 % intervals clustered by video). It says how reducers "
        "behave on such videos, nothing about real models:",
        "",
        "| | video tokens | after the inner merge | FLOPs | accuracy | needle |",
        "|---|---|---|---|---|---|",
    ]
    for name, config in task["configs"].items():
        inner = config["tokens"].get("after_inner")
        needle = config["by_category"]["needle"]["percent"]
        lines.append(
            f"| {name} | {config['tokens']['entering']['median']:.0f} | {inner['median']:.0f} | "
            if inner
            else f"| {name} | {config['tokens']['entering']['median']:.0f} | - | "
        )
        lines[-1] += (
            f"{flops_text(config['flops']['total']['median'])} | {interval_text(config['accuracy'])} | {needle:.1f} |"
        )
    return lines


def rewritten(text: str, block: str) -> str:
    """A document's text with its results replaced.

    Raises:
        ValueError: the markers are missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"a document with results needs the two lines {BEGIN!r} and {END!r}")
    head, rest = text.split(BEGIN, 1)
    return head + block + rest.split(END, 1)[1]


def main() -> None:
    """Rewrite the documents of the checkout this runs from."""
    from .conditions import source_tree

    root: Any = source_tree()
    if root is None:
        raise SystemExit("there is no checkout whose documents could be rewritten")
    for name, block in (("README.md", results_block), ("BENCHMARKS.md", ratios_block)):
        document = root / name
        text = rewritten(document.read_text(encoding="utf-8"), block(root / "results"))
        document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
