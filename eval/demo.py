"""`holimerge demo`: a small trained video LLM answers questions about generated H.264 videos, at several budgets."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tiny import BUDGETS, CHECKPOINT

CONFIGS = ("unpatched", *BUDGETS)
FULL_RUN = CHECKPOINT / "evaluation.json"
SHOWN = 4  # questions of the first video that are shown with their answers


def run_demo(
    *, videos: int = 30, configs: Sequence[str] = CONFIGS, threads: int | None = 1, meter: Any = None
) -> dict[str, Any]:
    """Evaluate the embedded model on the first videos of the synthetic test split.

    Args:
        videos: how many; they are drawn, encoded as H.264 and decoded again.
        configs: as `holimerge eval --config` takes them.
        threads: of torch, while it runs; None leaves them.
        meter: shows how far it is, as in `holimerge.eval.evaluate`.

    Returns:
        `results` (as in results.json of `holimerge eval`), `full` (the committed results of the whole test split, None
        before there are any), `video` (of the first file) and `questions` (of the first video, with each
        configuration's answer), ready for JSON.

    Raises:
        ConfigError, ValueError: a configuration or number that cannot be used.
        ImportError: PyAV is not installed.
    """
    import torch

    from .evaluate import evaluate
    from .tasks import get_task

    task = get_task("synthetic")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(tempfile.mkdtemp(prefix="holimerge-demo-"))
    try:
        samples = task.load(folder / "videos").samples
        names = list(dict.fromkeys(sample.video_id for sample in samples))[:videos]
        limit = sum(sample.video_id in names for sample in samples)
        results = evaluate(
            str(CHECKPOINT),
            configs,
            ["synthetic"],
            folder / "run",
            data=[f"synthetic={folder / 'videos'}"],
            limit=limit,
            dtype="float32",
            meter=meter,
        )
        assert results is not None, "the demo runs in one process"
        first = [sample for sample in samples if sample.video_id == names[0]]
        lines = (folder / "run" / "records.jsonl").read_text(encoding="utf-8").splitlines()
        choices = {(r["config"], r["id"]): r["choice"] for r in map(json.loads, lines)}
        assert first[0].video is not None
        video = {"codec": "h264", "bytes": first[0].video.stat().st_size, "side": _side()}
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(folder, ignore_errors=True)
    questions = [
        {
            "question": sample.question,
            "options": list(sample.options),
            "answer": sample.options[sample.answer or 0],
            "answers": {
                name: sample.options[choices[name, sample.id]] for name in results["tasks"]["synthetic"]["configs"]
            },
        }
        for sample in first[:SHOWN]
    ]
    full = json.loads(FULL_RUN.read_text(encoding="utf-8")) if FULL_RUN.is_file() else None
    return {"kind": "demo", "results": results, "full": full, "video": video, "questions": questions}


def _side() -> int:
    from .tiny.world import SIDE

    return SIDE


def show_demo(result: Mapping[str, Any], console: Any) -> None:
    """Print some questions with their answers, and the table of budgets."""
    from rich.table import Table

    from .show import flops_text
    from .show_eval import interval_text, median_text

    results, full = result["results"], result["full"]
    found = results["tasks"]["synthetic"]
    asked, video = found["samples"], result["video"]
    console.print(
        f"{len(set(asked['video_id']))} generated videos, {video['side']} x {video['side']}, H.264 "
        f"(the first: {video['bytes'] / 1e3:.0f} kB); {len(asked['id'])} questions with four options each.\n"
        "The model is a real LLaVA-OneVision class, tiny, trained on such videos: it shows that everything works and "
        "how\nreducing behaves, and says nothing about the accuracy of real models.\n",
        highlight=False,
    )
    for question in result["questions"]:
        answers = question["answers"]
        said = ", ".join(f"{config} {answer}" for config, answer in answers.items())
        if len(set(answers.values())) == 1:
            said = f"{next(iter(answers.values()))} at every budget"
        console.print(f"{question['question']}  ({' / '.join(question['options'])})", highlight=False, markup=False)
        console.print(f"  right: {question['answer']}; answered: {said}", style="dim", highlight=False, markup=False)
    table = Table(title="\nAccuracy against budget", title_justify="left", title_style="bold")
    table.add_column("")
    for label in ("video tokens", "after the inner merge", "FLOPs", "first token", "accuracy here"):
        table.add_column(label, justify="right")
    whole = None if full is None else full["tasks"]["synthetic"]
    if whole is not None:
        table.add_column(f"all {len(whole['samples']['id'])} questions", justify="right")
    for config, got in found["configs"].items():
        row = [
            config,
            median_text(got["tokens"]["entering"]),
            median_text(got["tokens"].get("after_inner")),
            flops_text(got["flops"]["total"]["median"]),
            f"{median_text(got['ms'].get('ttft'), '.0f')} ms",
            interval_text(got["accuracy"]),
        ]
        if whole is not None:
            other = whole["configs"].get(config)
            row.append("-" if other is None else interval_text(other["accuracy"]))
        table.add_row(*row)
    console.print(table)
    here = results["conditions"]
    console.print(
        "tiny-25 and so on are holimerge-25 and so on, with the similarity threshold that suits this model's tower.\n"
        "Accuracy in % with 95 % intervals clustered by video; the rest are medians, FLOPs with every stage counted.\n"
        f"Measured on {here['device']}, {here['threads']} thread(s), {here['dtype']}, {here['attn']}, torch "
        f"{here['versions']['torch']}, transformers {here['versions']['transformers']}."
        + ("" if full is None else " The last column is the committed run of the whole test split."),
        style="dim",
        highlight=False,
    )
