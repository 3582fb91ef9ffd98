"""Every real benchmark from its files on disk to scores, through a toy model; what only a whole run can show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import benchmark_fixtures as make
import pytest
from eval_toys import save_checkpoint

from holimerge.eval.evaluate import evaluate
from holimerge.eval.tasks import get_task

pytest.importorskip("pyarrow", reason="fixtures are written with pyarrow")
MAKERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "videomme": (make.videomme, "official"),
    "videomme_w_subtitle": (make.videomme, "official"),
    "mlvu_dev": (make.mlvu_json, "lmms_eval_0_7"),
    "mvbench": (lambda root: make.mvbench(root, "whole"), "lmms_eval_0_3"),
    "longvideobench": (make.longvideobench, "official"),
    "egoschema_subset": (make.egoschema, "lmms_eval_0_7"),
    "custom": (make.custom, "official"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint("llava_onevision", tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", MAKERS)
def test_from_files_to_scores(tmp_path: Path, checkpoint: str, name: str) -> None:
    maker, protocol = MAKERS[name]
    root, out = maker(tmp_path / "data"), tmp_path / "out"
    evaluate(
        checkpoint,
        ["unpatched"],
        [name],
        out,
        data=[f"{name}={root}"],
        num_frames=4,
        protocol=protocol,
        dtype="float32",
    )
    samples = get_task(name).load(root).samples
    records = [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert {r["id"] for r in records} == {s.id for s in samples}
    assert [r["error"] for r in records] == [None] * len(samples)
    assert all(isinstance(r["raw"], str) for r in records)
    if name == "mvbench":  # its lmms-eval protocols leave empty answers out of the score
        assert [r["counted"] for r in records] == [bool(r["raw"].strip()) for r in records]
    path = out / "results.json"
    summary = json.loads(path.read_text())["tasks"][name]["configs"]["unpatched"]
    first = next(iter(get_task(name).headline([])))
    assert first in summary["headline"]
