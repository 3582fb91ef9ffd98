"""The gate: results are written, and what got slower than they said before is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from holimerge.eval import bench_suite
from holimerge.eval.bench_more_frames import bench_more_frames
from holimerge.eval.bench_suite import Bench, benches, changes_table, run_suite


def suite_of(*later: dict[str, float], **ratios: float):
    """Two benches. later: the ratios of a bench's second run, if they differ."""

    def bench(stem: str) -> Bench:
        runs = iter([ratios, *later])

        def run(say):
            say("measuring")
            return {"kind": "model", "ratios": next(runs, ratios), "conditions": {"device_type": "cpu"}}

        return Bench(stem, run)

    return lambda gpu: [bench("first"), bench("second")]


def test_the_first_run_writes_and_the_next_is_compared(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert run_suite(folder, gpu=False, suite=suite_of(a=2.0, b=3.0)) == []
    assert sorted(path.name for path in folder.iterdir()) == ["first-cpu.json", "second-cpu.json"]
    found = run_suite(folder, gpu=False, only=["sec"], suite=suite_of(a=1.81, b=2.69, c=1.0))
    assert [(c.stem, c.ratio, c.before, c.now, c.slower) for c in found] == [
        ("second-cpu", "a", 2.0, (1.81, 1.81), False),
        ("second-cpu", "b", 3.0, (2.69, 2.69), True),
    ]
    assert json.loads((folder / "second-cpu.json").read_text())["ratios"] == {"a": 1.81, "b": 2.69, "c": 1.0}
    assert json.loads((folder / "first-cpu.json").read_text())["ratios"] == {"a": 2.0, "b": 3.0}
    assert len(changes_table(found).rows) == 2


def test_what_got_slower_is_measured_once_more_before_it_is_named(tmp_path: Path) -> None:
    run_suite(tmp_path, gpu=False, only=["first"], suite=suite_of(a=2.0, b=3.0))
    found = run_suite(tmp_path, gpu=False, only=["first"], suite=suite_of({"a": 1.9, "b": 2.5}, a=1.5, b=3.0))
    assert [(c.ratio, c.now, c.slower) for c in found] == [("a", (1.5, 1.9), False), ("b", (3.0, 2.5), False)]
    written = json.loads((tmp_path / "first-cpu.json").read_text())
    assert written["ratios"] == {"a": 1.9, "b": 2.5}
    assert written["first_ratios"] == {"a": 1.5, "b": 3.0}
    found = run_suite(tmp_path, gpu=False, only=["first"], suite=suite_of({"a": 1.0, "b": 1.0}, a=1.8, b=2.4))
    assert [c.now for c in found] == [(1.8,), (2.4,)]  # nothing fell by a tenth: one run
    found = run_suite(tmp_path, gpu=True, only=["first"], suite=suite_of({"a": 1.8, "b": 2.4}, a=1.0, b=2.4))
    assert [(c.now, c.slower) for c in found] == [((1.0,), True), ((2.4,), False)]


def test_names_that_are_no_bench() -> None:
    with pytest.raises(ValueError, match=r"no bench begins with 'third'; valid: first, second"):
        run_suite(Path("unused"), gpu=False, only=["third"], suite=suite_of())


def test_the_command_line_fails_where_something_got_slower(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_suite", "--output", str(tmp_path)])
    for value, status in ((2.0, 0), (1.9, 0), (1.5, 1)):
        monkeypatch.setattr(
            bench_suite.run_suite, "__kwdefaults__", {"only": (), "say": print, "suite": suite_of(a=value)}
        )
        with pytest.raises(SystemExit) as ended:
            bench_suite.main()
        assert ended.value.code == status
    assert "slower: first-cpu, a: 1.500, then 1.500, was 1.900" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [False, True])
def test_every_bench_has_a_file_of_its_own(gpu: bool) -> None:
    stems = [bench.stem for bench in benches(gpu)]
    assert len(set(stems)) == len(stems) > 3


def test_more_frames_enter_in_no_more_tokens() -> None:
    result = bench_more_frames(questions=12)
    few, *more = result["cases"].values()
    assert list(result["cases"])[1:] == ["more-frames-4", "more-frames-4-fast"]
    for name, many in zip(result["presets"], more, strict=True):
        assert result["questions"] == few["accuracy"]["n"] == many["accuracy"]["n"] == 12
        assert many["frames"] == 4 * few["frames"] == 32
        assert many["tokens"]["features"]["median"] > 3 * few["tokens"]["features"]["median"]
        assert many["tokens"]["entering"]["max"] <= few["tokens"]["entering"]["max"]
        percent = many["accuracy"]["percent"] / few["accuracy"]["percent"]
        assert result["ratios"][f"{name}, accuracy"] == pytest.approx(percent, abs=1e-3)
    vision = [case["flops"]["total"]["median"] - case["flops"]["prefill"]["median"] for case in more]
    assert vision[1] < vision[0]  # the fast one merges tokens inside the tower
