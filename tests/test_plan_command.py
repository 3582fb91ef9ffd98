"""`holimerge plan`: the choice, what is expected, what a run took; and the bench that compares the two."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from made_up import device, h200
from typer.testing import CliRunner

import holimerge
from holimerge.config import Budget, ConfigError
from holimerge.eval import bench_planner, planning
from holimerge.eval.bench import bench_inputs
from holimerge.eval.bench_suite import benches
from holimerge.eval.cli import app
from holimerge.eval.peak_memory import PeakMemory, bytes_of
from holimerge.eval.run import patched, run_once
from holimerge.eval.small_shapes import SMALL
from holimerge.eval.toy import random_model
from holimerge.planning.predict import Clip, Prompt, Scheme, memory_parts
from holimerge.planning.solve import tower_left
from holimerge.shapes import build_config, shape_of


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """No machine is measured here."""
    monkeypatch.setattr(planning, "calibrated", lambda *args, **kwargs: device())


def asked(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["plan", "--shape", "toy-quick", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def test_a_plan_is_run_and_compared(tmp_path):
    whole = asked("--frames", "4", "--budget", "retain=1", "--no-measure")
    assert whole["measured"] is None
    assert whole["config"]["method"] == "keep_all"
    limit = 0.8 * whole["predicted"]["ttft_ms"]
    output = tmp_path / "plan.json"
    limits = ["--budget", f"ttft_ms={limit}", "--budget", "tokens=60,memory_gib=3"]
    found = asked("--frames", "4", *limits, "--repeats", "1", "--output", str(output))
    assert json.loads(output.read_text()) == found
    assert found["budget"] == {"ttft_ms": limit, "tokens": 60, "memory_gib": 3.0}
    assert found["predicted"]["ttft_ms"] <= limit
    assert found["predicted"]["ttft_ms"] == pytest.approx(sum(found["predicted"]["stages"].values()), abs=0.01)
    run, tokens = found["measured"], found["tokens"]
    # the plan's counts are what the run really had
    assert {key: run["tokens"][key] for key in ("entering", "after_inner")} == {
        key: tokens[key] for key in ("entering", "after_inner")
    }
    assert tokens["video"] == run["tokens"]["features"] == 64
    memory = found["predicted"]["memory_gib"] / run["memory_gib"] - 1
    assert run["error"]["memory"] == pytest.approx(memory, abs=1e-2)
    ttft = run["ms"]["ttft"]["median"]
    assert run["error"]["ttft"] == pytest.approx(found["predicted"]["ttft_ms"] / ttft - 1, abs=1e-3)
    assert {"vision", "reduce", "project", "splice", "prefill", "other"} <= set(run["ms"]["stages"])
    path = tmp_path / "mine.yaml"
    path.write_text(found["yaml"])
    assert holimerge.load_config(path).to_dict() == found["config"]


def test_a_plan_is_shown_for_people():
    result = CliRunner().invoke(
        app, ["plan", "--shape", "toy-quick", "--frames", "3", "--budget", "tokens=12", "--repeats", "1"]
    )
    assert result.exit_code == 0, result.output
    for text in ("tokens: 12", "predicted", "measured", "to the first token", "entering the LLM 12", "GiB", "%"):
        assert text in result.stdout, text


def test_without_frames_the_most_that_fit_are_planned():
    limit = asked("--frames", "5", "--budget", "retain=1", "--no-measure")["predicted"]["ttft_ms"]
    budget = ("--budget", f"ttft_ms={limit}", "--no-measure")
    few, many = (asked(*budget, "--least", share)["frames"] for share in ("1", "0.2"))
    assert few == 5
    assert many > 5
    assert asked(*budget, "--budget", "retain=0.2")["frames"] == many
    with_inner, without = (asked(*budget, "--frames", "7", flag) for flag in ("--inner", "--no-inner"))
    assert without["tokens"]["after_inner"] is None
    assert with_inner["tokens"]["entering"] > without["tokens"]["entering"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "toy", "--frames", "4", "--budget", "ttft_ms=0.5"], "budget.ttft_ms: 0.5 is impossible"),
        (["--shape", "toy", "--frames", "4", "--budget", "ttft=3"], "did you mean 'ttft_ms'?"),
        (["--shape", "toy", "--frames", "4", "--budget", "ttft_ms=soon"], "budget.ttft_ms: 'soon' is no number"),
        (["--shape", "toy", "--frames", "4", "--budget", "tokens=1.5"], "budget.tokens: '1.5' is no number"),
        (["--shape", "toy", "--frames", "4", "--budget", "tokens=0"], "budget.tokens: 0 is not valid"),
        (["--shape", "toy", "--frames", "4", "--budget", "tokens=4,tokens=5"], "budget.tokens: given twice"),
        (["--shape", "toi", "--frames", "4", "--budget", "tokens=5"], "valid: llava-onevision-0.5b"),
        (["--frames", "4", "--budget", "tokens=5"], "either a shape (random weights) or a model"),
        (["--shape", "toy", "--budget", "flops=0.5"], "bound the number of frames"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, said):
    assert said in refused(*arguments)


def test_budgets_are_read_from_texts():
    assert planning.parse_budget(["ttft_ms=300", "tokens=7, flops=0.5"]) == Budget(ttft_ms=300.0, tokens=7, flops=0.5)
    with pytest.raises(ConfigError, match="Valid: retain=, tokens="):
        planning.parse_budget(["300"])


def test_the_bench_has_three_families_and_compares_both_sides(monkeypatch):
    assert {shape.model_type for shape in SMALL.values()} == {
        "llava_onevision",
        "qwen2_5_vl",
        "qwen3_vl",
    }
    for shape in SMALL.values():
        config = build_config(shape)
        inputs = bench_inputs(config, frames=4, grid=shape.grid)
        known = shape_of(config).vision
        video = known.steps(4) * known.tokens_per_step(shape.grid)
        expected = video + shape.separators + shape.separators_per_step * known.steps(4) + 40
        assert inputs["input_ids"].shape[1] == pytest.approx(expected, abs=2)
        placeholders = int((inputs["input_ids"] == config.video_token_id).sum())
        assert placeholders == video + shape.separators
    small = bench_planner.Shape("quick", "llava_onevision", planning.toy_config(quick=True).to_dict(), "", separators=1)
    small.config.pop("model_type")
    found = json.loads(json.dumps(bench_planner.bench_shape(small, frames=(2, 3), share=0.8, warmup=0, repeats=1)))
    assert set(found["cases"]) == {"2", "3"}
    cases = found["cases"].values()
    errors = [case[side]["measured"]["error"]["ttft"] for case in cases for side in ("unpatched", "plan")]
    assert found["errors"]["largest"] == max(map(abs, errors))
    assert found["aim"]["met"] is (max(map(abs, errors)) <= 0.15)
    memory = [case[side]["measured"]["error"]["memory"] for case in cases for side in ("unpatched", "plan")]
    assert found["memory_errors"]["largest"] == max(map(abs, memory))
    for case in cases:
        assert case["plan"]["predicted"]["ttft_ms"] <= case["budget"]["ttft_ms"]
        assert case["plan"]["tokens"]["entering"] < case["unpatched"]["tokens"]["entering"]


def test_on_a_gpu_the_bench_plans_for_the_published_models(monkeypatch):
    assert [shape.model_type for shape in bench_planner.GPU_SHAPES.values()] == [
        shape.model_type for shape in SMALL.values()
    ]
    planner = {bench.stem: bench.run.keywords for bench in benches(True) if bench.stem.startswith("planner-")}
    assert list(planner) == [f"planner-{name}" for name in bench_planner.GPU_SHAPES]
    assert [keywords["recalibrate"] for keywords in planner.values()] == [True, False, False]
    here = h200()
    for shape in bench_planner.GPU_SHAPES.values():
        config = build_config(shape)
        monkeypatch.setattr(planning, "calibrated", lambda *args, **kwargs: here)
        setting = planning.setting_of(config, shape, device=torch.device("cpu"), dtype=torch.bfloat16)
        for frames in bench_planner.FRAMES["cuda"]:
            whole = planning.plan(setting, Budget(retain=1.0), frames).ttft_ms
            limits, choice = bench_planner._within(setting, frames, whole, 0.6, bench_planner.RETAIN["cuda"])
            assert choice.ttft_ms <= limits["ttft_ms"]
            assert choice.entering <= 0.25 * choice.total + 1
            for share in (1e-3, 10.0):  # less than is possible; more than enough
                limits, choice = bench_planner._within(setting, frames, whole, share, 0.25)
                assert choice.ttft_ms <= limits["ttft_ms"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("preset", [None, "holimerge-25", "holitom-25", "holimerge-10-fast"])
def test_the_memory_of_a_prompt_is_what_its_tensors_hold(name, preset):
    known, frames = SMALL[name], 2 if "llava" in name else 6
    fewer = {**known.config, "text_config": {**known.config["text_config"], "num_hidden_layers": 4}}
    config = build_config(replace(known, config=fewer))
    model, shape = random_model(config, attn_implementation="sdpa"), shape_of(config)
    inputs = bench_inputs(config, frames=frames, grid=known.grid)
    cfg = None if preset is None else holimerge.load_config({"base": preset, "inner": {"layer": 3, "retain": 0.5}})
    with patched(model, cfg), PeakMemory() as watch:
        run = run_once(model, inputs, memory=False)
    given = bytes_of(inputs.values())
    scheme = Scheme(None)
    if cfg is not None:
        scheme = Scheme("holitom", cfg.outer.at, 3, 0.5, left=tower_left(shape.vision, cfg.encoder, known.grid))
    clip = Clip(shape.vision.steps(frames), known.grid)
    work = Prompt(shape, (clip,), inputs["input_ids"].shape[1] - run.tokens["features"])

    def held(work):
        parts = memory_parts(work, scheme, run.tokens["entering"])
        return parts["pixels"] + max(parts["tower"], parts["decoder"] + parts["cache"])

    # where tokens merge inside the tower, blocks between the first and the last are not looked at
    assert held(work) == pytest.approx(watch.peak + given, rel=0.15 if preset != "holimerge-10-fast" else 0.2)
    halves = (Clip(clip.steps // 2 or 1, known.grid),) * 2  # two videos go through the tower in one call
    if clip.steps % 2 == 0:
        assert held(replace(work, clips=halves)) == held(work)
    assert held(replace(work, clips=(clip,) * 2)) > 1.4 * held(work)
