"""Measurements: stages go to the right name, nothing stays behind on the model, counts and FLOPs are those that ran."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import make_model, prompt

import holimerge
from holimerge.eval.bench import bench_inputs, bench_model
from holimerge.eval.bench_growth import bench_growth, growth_figure
from holimerge.eval.bench_reduction import bench_case
from holimerge.eval.measure import gains, measure, measure_cases, spread
from holimerge.eval.peak_memory import PeakMemory
from holimerge.eval.run import run_once
from holimerge.eval.toy import random_model, toy_config
from holimerge.shapes import shape_of

CONFIGS = ["holitom-10", "holimerge-25"]


def footprint(model: Any) -> list[Any]:
    """What a measurement could leave behind: attributes and hooks of every module."""
    return [
        (name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


@contextmanager
def slowed(module: Any, milliseconds: float) -> Any:
    """Every forward of the module takes that much longer."""

    def wait(*_: Any) -> None:
        time.sleep(milliseconds / 1000)

    hook = module.register_forward_pre_hook(wait)
    try:
        yield
    finally:
        hook.remove()


def tower(model: Any) -> Any:
    return model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower


@pytest.mark.parametrize("config", [None, *CONFIGS])
def test_time_goes_to_the_stage_that_spent_it(family: str, config: str | None) -> None:
    model, inputs = make_model(family), prompt(family)
    for module, stage, other in (
        (tower(model), "vision", "prefill"),
        (model.model.language_model.layers[3], "prefill", "vision"),
    ):
        with slowed(module, 150):
            found = measure(model, inputs, config=config, warmup=1, repeats=1, new_tokens=0)["ms"]
        stages = {name: values["median"] for name, values in found["stages"].items()}
        assert stages[stage] >= 150
        assert stages[other] < 150
        assert found["ttft"]["median"] >= 150
        # nothing is counted twice, nothing is lost
        total = sum(ms for name, ms in stages.items() if name != "inner") + found["other"]["median"]
        assert total == pytest.approx(found["ttft"]["median"], abs=0.1)
        assert 0 < found["other"]["median"] < 100
    assert set(stages) == ({"vision", "prefill"} if config is None else set(stages) | {"reduce", "project", "inner"})


def test_decoding_is_timed_by_token(family: str) -> None:
    model, inputs = make_model(family), prompt(family)
    with slowed(model.model.language_model.layers[0], 30):
        found = measure(model, inputs, config="holitom-10", warmup=0, repeats=1, new_tokens=3)
    each = found["ms"]["decode_per_token"]
    assert each["n"] == 3
    assert 30 <= each["min"] <= each["median"] <= each["max"] < 150
    assert len(found["answer"][0]) == 4


@pytest.mark.parametrize("config", [None, "holimerge-25"])
def test_the_model_is_as_before(family: str, config: str | None) -> None:
    model, inputs = make_model(family), prompt(family)
    model.generate(**inputs, max_new_tokens=2)  # transformers notes things of its own at the first call
    before, logits = footprint(model), model(**inputs).logits
    measure(model, inputs, config=config, warmup=0, repeats=1, new_tokens=1)
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)

    def broken(*_: Any) -> None:
        raise RuntimeError("planted")

    hook = model.model.language_model.layers[2].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="planted"):
        measure(model, inputs, config=config, warmup=0, repeats=1)
    hook.remove()
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_unpatched_and_patched_answers_are_those_of_generate(family: str) -> None:
    model, inputs = make_model(family), prompt(family)
    found = measure_cases(model, inputs, {"plain": None, "less": "holitom-10"}, warmup=0, repeats=1, new_tokens=4)
    length = inputs["input_ids"].shape[1]
    assert found["plain"]["answer"] == model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:].tolist()
    with holimerge.merging(model, "holitom-10"):
        answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:].tolist()
    assert found["less"]["answer"] == answer


@pytest.mark.parametrize("config", [None, "keep-all", *CONFIGS])
def test_tokens_and_flops_are_those_that_ran(family: str, config: str | None) -> None:
    model, inputs = make_model(family), prompt(family)
    found = measure(model, inputs, config=config, warmup=0, repeats=1, new_tokens=0, count=True)
    features = 96 if family == "llava_onevision" else 36
    tokens = found["tokens"]
    assert (tokens["features"], tokens["separators"]) == (features, int(family == "llava_onevision"))
    assert tokens["text"] + tokens["features"] + tokens["separators"] == inputs["input_ids"].shape[1]
    if config in (None, "keep-all"):
        assert (tokens["entering"], tokens["after_inner"]) == (features, None)
    if config == "holimerge-25":
        assert (tokens["entering"], tokens["after_inner"]) == (round(features / 4), round(features / 8))
    # clusters are a sixth of a per cent here, the release of static tokens (not in the formulas) up to half
    # of one; older transformers multiply matrices for the rotary tables, a hundredth
    within = {"holitom-10": 5e-4, "holimerge-25": 5e-3}.get(str(config), 2e-4)
    assert found["flops"]["total"] == pytest.approx(found["flops_measured"], rel=within)
    assert found["flops"]["decode_per_token"] > 0
    json.dumps(found)


def test_cases_take_turns() -> None:
    model, inputs = make_model("llava_onevision"), prompt("llava_onevision")
    said: list[tuple[str, int, int]] = []
    cases = {"a": None, "b": "holitom-10"}
    measure_cases(
        model,
        inputs,
        cases,
        warmup=1,
        repeats=2,
        new_tokens=1,
        say=lambda text, done, total: said.append((text, done, total)),
    )
    assert [text.split(":")[0] for text, _, _ in said] == ["a", "b", "b", "a", "a", "b", "a", "b"]
    assert [done for _, done, _ in said] == list(range(8))
    assert {total for _, _, total in said} == {8}


def test_what_cannot_be_measured_says_so_before_any_run() -> None:
    model, inputs = make_model("llava_onevision"), prompt("llava_onevision")
    calls: list[Any] = []
    generate: Callable[..., Any] = model.generate
    model.generate = lambda **kwargs: calls.append(kwargs) or generate(**kwargs)
    with pytest.raises(ValueError, match="repeats: 0"):
        measure(model, inputs, config=None, repeats=0)
    with pytest.raises(holimerge.ConfigError, match="no preset 'holitom-11'"):
        measure_cases(model, inputs, {"full": None, "typo": "holitom-11"})
    deep = {"base": "holitom-10", "inner": {"layer": 9}}
    with pytest.raises(holimerge.ConfigError, match=r"inner\.layer: 9"):
        measure_cases(model, inputs, {"full": None, "deep": deep})
    holimerge.patch_model(model, "holitom-10")
    with pytest.raises(ValueError, match="is patched"):
        measure(model, inputs, config=None)
    assert not calls


def test_several_videos_have_no_analytic_flops_but_tokens() -> None:
    from toys import build, make_video

    model = make_model("llava_onevision")
    inputs = build("llava_onevision", [[5, make_video("llava_onevision"), 6, make_video("llava_onevision", seed=1), 7]])
    found = measure(model, inputs, config="holimerge-25", warmup=0, repeats=1, new_tokens=0)
    assert found["flops"] is None
    assert (found["tokens"]["features"], found["tokens"]["entering"], found["tokens"]["separators"]) == (192, 48, 2)


def test_peak_memory_follows_what_is_held() -> None:
    model, inputs = make_model("llava_onevision"), prompt("llava_onevision")
    small = run_once(model, inputs).peak
    if small is None:
        pytest.skip("no /proc on this system: peak memory is not measured")
    held: list[Any] = []

    def grab(*_: Any) -> None:
        held.append(torch.ones(50_000_000))
        held.clear()

    hook = model.model.language_model.register_forward_pre_hook(grab)
    large = run_once(model, inputs).peak
    hook.remove()
    assert large is not None
    assert large - small > 150e6
    again = run_once(model, inputs).peak
    assert again is not None
    assert large - again > 100e6  # the peak is the run's own, not that of an earlier one


def test_spread_is_order_statistics() -> None:
    values = [5.0, 1.0, 4.0, 2.0]
    found = spread(values)
    assert found == {"median": 3.0, "min": 1.0, "max": 5.0, "p90": pytest.approx(np.percentile(values, 90)), "n": 4}
    assert spread([7.0]) == {"median": 7.0, "min": 7.0, "max": 7.0, "p90": 7.0, "n": 1}


def test_gains_are_ratios_of_medians_and_show_a_slowdown() -> None:
    def case(ttft: float, flops: int, **stages: float) -> dict[str, Any]:
        ms = {"ttft": spread([ttft]), "stages": {name: spread([value]) for name, value in stages.items()}}
        return {"ms": ms, "flops": {"total": flops}}

    full = case(1000, 400, vision=300, prefill=600)
    won = gains(full, case(500, 100, vision=280, reduce=10, project=20, splice=5, prefill=150))
    assert won["ttft_ratio"] == 2.0
    assert won["ideal_ratio"] == 2.0
    assert won["share_of_ideal"] == 1.0
    assert won["strict_share"] == pytest.approx(2.0 / (900 / 430), abs=1e-4)
    assert gains(full, case(500, 100, vision=280, reduce=10, prefill=150, inner=6))["inner_share"] == 0.01
    assert (won["reduce_ms"], won["overhead_ms"], won["flops_ratio"]) == (10, 15, 4.0)
    assert gains(full, case(2000, 800, vision=300, prefill=600))["ttft_ratio"] == 0.5


# --- benches ---------------------------------------------------------------------------------------------------------


def test_bench_inputs_fit_their_model() -> None:
    for config, grid in ((toy_config(quick=True), None), (make_model("qwen2_5_vl").config, (6, 8))):
        model = random_model(config)
        inputs = bench_inputs(config, frames=5, text_tokens=11, grid=grid)
        vision = shape_of(config).vision
        tokens = vision.steps(5) * vision.tokens_per_step(grid)
        separators = int(config.model_type == "llava_onevision")
        assert int((inputs["input_ids"] == config.video_token_id).sum()) == tokens + separators
        assert inputs["input_ids"].shape[1] == tokens + separators + 11
        run = run_once(model, inputs)
        assert run.tokens == {
            "features": tokens,
            "entering": tokens,
            "after_inner": None,
            "separators": separators,
            "text": 11,
        }
        same = bench_inputs(config, frames=5, text_tokens=11, grid=grid)
        assert all(torch.equal(inputs[key], same[key]) for key in inputs)


def test_bench_of_a_config_folder(tmp_path: Path, family: str) -> None:
    config = toy_config(quick=True) if family == "llava_onevision" else make_model("qwen2_5_vl").config
    config.save_pretrained(tmp_path)
    found = bench_model(
        shape=str(tmp_path), frames=4, configs=["holimerge-25"], warmup=0, repeats=1, new_tokens=1, device="cpu"
    )
    assert list(found["cases"]) == ["unpatched", "holimerge-25"]
    assert found["weights"] == "random"
    assert found["conditions"]["dtype"] == "float32"
    assert found["aims"]["holimerge-25"]["reduce_ms"] == found["gains"]["holimerge-25"]["reduce_ms"] > 0
    assert json.loads(json.dumps(found)) == found


def test_reduction_bench_compares_equal_work() -> None:
    pytest.importorskip("av")
    threads = torch.get_num_threads()
    found = bench_case(12, side=6, width=64, repeats=2, warmup=0)
    assert torch.get_num_threads() == threads
    assert found["features"] == [12, 36, 64]
    assert found["kept"]["ours"] == found["kept"]["theirs"] > 0
    assert found["agree"]["share_equal"] > 0.9
    assert found["removed_by_temporal_merging"] > 0
    for side in ("ours", "theirs", "theirs_own_cosine"):
        assert found["ms"][side]["n"] == 2
    assert found["speedup"] == pytest.approx(found["ms"]["theirs"]["median"] / found["ms"]["ours"]["median"], abs=1e-3)
    json.dumps(found)


def test_peak_memory_is_what_was_alive_at_once() -> None:
    given = torch.zeros(1000)
    with PeakMemory() as watch:
        a = given + 1  # 4000 bytes
        b = a.view(10, 100) * 2  # a view holds nothing; 4000 more
        del a
        b.add_(1)
        c = torch.cat([b, b])  # 8000 more
        del b, c
    assert watch.peak == 12000
    assert watch.live == 0


def test_growth_bench_and_its_picture() -> None:
    result = bench_growth(frames=(4, 16), width=32, device="cpu", repeats=1, warmup=0)
    short, long = result["lengths"]
    assert long["features_bytes"] == 4 * short["features_bytes"] == 16 * 196 * 32 * 4
    assert long["memory_bytes"] > short["memory_bytes"] > 0
    assert result["growth"]["memory"] == pytest.approx(long["memory_per_frame"] / short["memory_per_frame"], abs=1e-3)
    axes = growth_figure(result).axes
    assert [len(line.get_xdata()) for line in axes[0].lines] == [2, 2]
    assert list(axes[1].lines[1].get_ydata()) == [r["memory_bytes"] / 2**20 for r in (short, long)]
