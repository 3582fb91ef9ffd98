"""`holimerge compare`: pairs are pairs, other samples are refused, and text stays text."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_toys import share_correct, toy_task
from rich.console import Console
from typer.testing import CliRunner

from holimerge.config import load_config
from holimerge.eval.cli import app
from holimerge.eval.compare import compare_files, compare_results, markdown_text, run_names, show_comparison
from holimerge.eval.plan import identity_of, plan_task
from holimerge.eval.records import RESULTS, write_json
from holimerge.eval.scores import results_of
from holimerge.eval.tasks.base import Sample

CONFIGS = {"unpatched": None, "holimerge-15": load_config("holimerge-15")}


class FakeConfig:
    model_type = "llava_onevision"


def results(right: dict[str, list[int | None]], **changes: Any) -> dict[str, Any]:
    """Results of a run in which configurations were right (1), wrong (0) or could not read the video (None)."""
    count = len(next(iter(right.values())))
    samples = [
        Sample(f"s{i}", Path("x.mp4"), f"video {i // 3}", "?", ("a", "b"), 0, f"kind {i % 2}", {"length": "short"})
        for i in range(count)
    ]
    plan = plan_task(toy_task(samples), None)
    configs = {name: CONFIGS[name] for name in right}
    identity = identity_of(
        "hub/model", FakeConfig, configs, [plan], seed=0, num_frames=8, dtype="auto", attn_implementation=None
    )
    records = []
    for name, outcomes in right.items():
        for i, (sample, outcome) in enumerate(zip(samples, outcomes, strict=True)):
            record: dict[str, Any] = {"task": "toy", "config": name, "id": sample.id, "video_id": sample.video_id}
            record |= {"category": sample.category, "groups": dict(sample.groups), "answer": 0, "fallback": False}
            if outcome is None:
                records.append({**record, "choice": None, "correct": None, "error": {"at": "video", "text": "gone"}})
                continue
            entering = 100 if name == "unpatched" else 15
            records.append(
                record
                | {"choice": 1 - outcome, "correct": bool(outcome), "error": None, "peak_memory_bytes": 10**6}
                | {"tokens": {"features": 100, "entering": entering, "after_inner": None, "text": 9}}
                | {"ms": {"ttft": entering + i % 3}, "reused": ["vision"] if i % 3 else []}
                | {"flops": {"total": entering * 10**9, "prefill": entering * 10**8}}
            )
    return {**results_of(identity, [plan], configs, records, {"device": "a CPU"}), **changes}


def test_pairs_within_one_run() -> None:
    random = np.random.default_rng(3)
    first = random.integers(0, 2, 60).tolist()
    second = [1 - y if i % 5 == 0 else y for i, y in enumerate(first)]
    found = compare_results([("run", results({"unpatched": first, "holimerge-15": second}))])
    assert found["columns"] == ["unpatched", "holimerge-15"]
    told = found["tasks"]["toy"]["columns"]["holimerge-15"]
    pair = told["against_first"]
    b = sum(x > y for x, y in zip(first, second, strict=True))
    c = sum(y > x for x, y in zip(first, second, strict=True))
    assert (pair["only_first"], pair["only_second"], pair["unpaired"]) == (b, c, 0)
    assert (pair["n"], pair["clusters"]) == (60, 20)
    assert pair["difference"] == pytest.approx(100 * (c - b) / 60, abs=1e-3)
    assert pair["low"] < pair["difference"] < pair["high"]
    assert 0 < pair["p"] <= 1
    assert told["tokens"]["entering"] == 15
    assert told["flops"] == 15 * 10**9
    assert told["ttft_ms"] == 15  # the first question of each video, which paid everything
    assert "against_first" not in found["tasks"]["toy"]["columns"]["unpatched"]


def test_two_runs_and_order() -> None:
    a, b = results({"unpatched": [1, 0, 1, 1, 0, 0]}), results({"unpatched": [1, 1, 1, 0, 1, 1]})
    found = compare_results([("base", a), ("new", b)])
    assert found["columns"] == ["base: unpatched", "new: unpatched"]
    there = found["tasks"]["toy"]["columns"]["new: unpatched"]["against_first"]
    back = compare_results([("new", b), ("base", a)])["tasks"]["toy"]["columns"]["base: unpatched"]["against_first"]
    assert there["difference"] == -back["difference"] == pytest.approx(100 * 2 / 6, abs=1e-3)
    assert (there["only_first"], there["only_second"]) == (back["only_second"], back["only_first"]) == (1, 3)
    assert there["p"] == back["p"] == pytest.approx(2 * (1 + 4) / 16)


def test_samples_are_paired_by_id_not_by_place() -> None:
    a = results({"unpatched": [1, 0, 1, 1, 0, 0]})
    b = copy.deepcopy(a)
    told = b["tasks"]["toy"]
    for values in (told["samples"]["id"], told["samples"]["video_id"], told["configs"]["unpatched"]["correct"]):
        values.reverse()
    pair = compare_results([("a", a), ("b", b)])["tasks"]["toy"]["columns"]["b: unpatched"]["against_first"]
    assert (pair["difference"], pair["only_first"], pair["p"]) == (0, 0, 1)


def test_what_one_could_not_read_is_in_no_pair() -> None:
    a, b = results({"unpatched": [1, 0, 1, 1, None, 0]}), results({"unpatched": [1, None, 1, 0, 1, 1]})
    found = compare_results([("a", a), ("b", b)])
    pair = found["tasks"]["toy"]["columns"]["b: unpatched"]["against_first"]
    assert (pair["n"], pair["unpaired"]) == (4, 2)
    assert pair["difference"] == 0
    assert pair["paired_percent"] == {"first": 75.0, "second": 75.0}
    assert "2 samples are not scored in both" in markdown_text(found)
    none = compare_results([("a", results({"unpatched": [None] * 3})), ("b", results({"unpatched": [1] * 3}))])
    assert none["tasks"]["toy"]["columns"]["b: unpatched"]["against_first"]["difference"] is None
    show_comparison(none, Console(file=io.StringIO()))


def test_other_samples_data_and_protocols_are_refused() -> None:
    a = results({"unpatched": [1] * 12})
    with pytest.raises(ValueError, match="b lacks the samples s9, s10, s11; the runs' samples differ"):
        compare_results([("a", a), ("b", results({"unpatched": [1] * 9}))])
    with pytest.raises(ValueError, match="a lacks the samples s12, s13, s14, s15, s16 and 3 more"):
        compare_results([("a", a), ("b", results({"unpatched": [1] * 20}))])
    for key, value in (("revision", "revision 2"), ("protocol", "lmms_eval_0_3")):
        b = copy.deepcopy(a)
        b["run"]["tasks"]["toy"][key] = value
        with pytest.raises(ValueError, match=f"task toy: a has {key} .*, b has '{value}'"):
            compare_results([("a", a), ("b", b)])
    b = copy.deepcopy(a)
    b["tasks"]["other"] = b["tasks"]["toy"]
    with pytest.raises(ValueError, match="b has other, toy"):
        compare_results([("a", a), ("b", b)])
    with pytest.raises(ValueError, match="two configurations"):
        compare_results([("a", a)])


def test_what_else_differs_is_said() -> None:
    a, b = results({"unpatched": [1] * 6}), results({"unpatched": [0] * 6})
    b["run"]["num_frames"], b["conditions"]["device"] = 16, "another CPU"
    found = compare_results([("a", a), ("b", b)])
    assert found["differs"] == {
        "num_frames": {"a": 8, "b": 16},
        "device": {"a": "a CPU", "b": "another CPU"},
    }
    assert "the runs differ in num\\_frames: a 8; b 16" in markdown_text(found)


def test_a_run_that_is_not_finished_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results\.json: no such file"):
        compare_files([tmp_path])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"results\.json: the run there is not finished.*--resume"):
        compare_files([tmp_path])


def test_other_versions_and_other_files_of_one_name_are_said() -> None:
    runs = {name: results({"unpatched": [1] * 6, "holimerge-15": [1] * 6}) for name in "abc"}
    runs["b"]["run"]["versions"]["torch"] = "0.1"
    runs["c"]["run"]["configs"]["holimerge-15"]["budget"]["retain"] = 0.16
    found = compare_results(list(runs.items()))["differs"]
    assert sorted(found) == ["configuration holimerge-15", "version of torch"]
    assert found["version of torch"]["b"] == "0.1"
    told = found["configuration holimerge-15"]
    assert told == {"a": "first", "b": "the same", "c": "budget.retain: 0.15, now 0.16"}


def test_files_folders_and_names(tmp_path: Path) -> None:
    for name, right in (("base", [1, 0, 1]), ("new", [1, 1, 1])):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / RESULTS, results({"unpatched": right}))
    paths = [tmp_path / "base", tmp_path / "new" / RESULTS]
    assert run_names(paths) == ["base", "new"]
    assert run_names([tmp_path / "a.json", tmp_path / "b" / "a.json"]) == ["a (1)", "a (2)"]
    found = compare_files(paths, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found
    assert "base: unpatched" in (tmp_path / "out" / "comparison.md").read_text()
    done = CliRunner().invoke(app, ["compare", *map(str, paths)])
    assert done.exit_code == 0, done.output
    assert "+33.3" in done.stdout
    assert json.loads(CliRunner().invoke(app, ["compare", *map(str, paths), "--json"]).stdout) == found
    for content, words in (("{}", "kind"), ("[]", "object"), ("nonsense", "JSON"), ('{"kind": "eval"}', "schema")):
        (tmp_path / "odd.json").write_text(content)
        done = CliRunner().invoke(app, ["compare", str(tmp_path / "odd.json"), str(paths[0])])
        assert done.exit_code == 2
        assert words in done.stderr
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "none.json")])
    assert done.exit_code == 2
    assert "none.json" in done.stderr


def test_one_video_has_no_interval() -> None:
    run = results({"unpatched": [1, 0, 0], "holimerge-15": [1, 1, 1]})
    comparison = compare_results([("r", run)])
    pair = comparison["tasks"]["toy"]["columns"]["holimerge-15"]["against_first"]
    assert (pair["low"], pair["high"], pair["clusters"]) == (None, None, 1)
    assert "| +66.7 | - |" in markdown_text(comparison).replace("\\", "")


def test_the_own_metric_and_a_changed_machine_are_told() -> None:
    run = results({"unpatched": [1, 0, 0, 1], "holimerge-15": [1, 1, 1, 1]})
    plain = markdown_text(compare_results([("r", run)]))
    assert "metric" not in plain
    assert "mixture" not in plain
    for found in run["tasks"]["toy"]["configs"].values():
        found["headline"] = {"m_avg": 12.34}
    run["conditions"] = {"device": "b", "date": "2", "earlier": [{"device": "a", "date": "1"}]}
    text = markdown_text(compare_results([("r", run)])).replace("\\", "")
    assert "toy, m_avg (the task's own metric; the table compares the share of right answers)" in text
    assert "unpatched 12.3, holimerge-15 12.3" in text
    assert "r was resumed under other conditions (device)" in text


def test_names_are_plain_text() -> None:
    a = results({"unpatched": [1, 0, 1], "holimerge-15": [1, 1, 1]})
    odd = "[red]a|b\x1b[31m`c`[/]"
    for place in (a["run"]["configs"], a["tasks"]["toy"]["configs"]):
        place[odd] = place.pop("holimerge-15")
    a["tasks"]["<b>|"] = a["tasks"].pop("toy")
    a["run"]["tasks"]["<b>|"] = a["run"]["tasks"].pop("toy")
    found = compare_results([("run", a)])
    stream = io.StringIO()
    show_comparison(found, Console(file=stream, width=200))
    assert "[red]a|b[31m`c`[/]" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    text = markdown_text(found)
    assert "\x1b" not in text
    assert r"## \<b\>\|, 3 samples" in text
    assert r"\[red\]a\|b\[31m\`c\`\[/\]" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {10}


def test_headline_and_accuracy_of_the_toy() -> None:
    one = results({"unpatched": [1, 0, 1, None]})["tasks"]["toy"]["configs"]["unpatched"]
    assert one["headline"]["score"] == pytest.approx(200 / 3, abs=1e-3)
    assert one["headline_errors_wrong"]["score"] == 50
    assert one["correct"] == [1, 0, 1, None]
    assert share_correct([{"correct": True}]) == {"score": 100}
    assert math.isfinite(one["accuracy"]["low"])
