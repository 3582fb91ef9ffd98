"""The planner on a GPU, without one: composing host and device, the queue that hides the host, and what is measured."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from made_up import HERE, device, h200
from test_planning import SMALLEST

from holimerge.config import Budget
from holimerge.planning import calibrate, tiny, watch
from holimerge.planning.device import Device, product_name
from holimerge.planning.predict import STAGES, Clip, Prompt, Scheme, TowerLeft, predict, steps_of
from holimerge.planning.solve import ImpossibleError, Setting, plan
from holimerge.planning.timeline import Step, by_stage
from holimerge.planning.watch import Queue, Watch
from holimerge.shapes import SHAPES, build_config, shape_of

NAMES = ("llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")

# ---------------------------------------------------------------------- composing


def slow_stages(steps: list[Step], pieces: int = 400) -> dict[str, float]:
    """Every step as many little launches: the host issues one after the other, the device works through its queue."""
    host = done = 0.0
    ends: list[float] = []
    for step in steps:
        for _ in range(pieces):
            host += step.host / pieces
            done = max(done, host) + step.device / pieces
        ends.append(done)
        if step.waits:
            host = max(host, done)
    ms = dict.fromkeys((step.stage for step in steps), 0.0)
    for step, begin, end in zip(steps, [0.0, *ends], ends, strict=False):
        ms[step.stage] += end - begin
    return ms


def random_steps(rng: random.Random) -> list[Step]:
    draw = lambda: rng.choice([0.0, rng.uniform(0, 1), rng.uniform(0, 30)])  # noqa: E731
    return [Step(rng.choice("abc"), draw(), draw(), rng.random() < 0.3) for _ in range(rng.randint(1, 12))]


def test_stages_are_those_of_a_queue_of_little_launches():
    rng = random.Random(0)  # noqa: S311
    for _ in range(200):
        steps = random_steps(rng)
        found, expected = by_stage(steps, "abc"), slow_stages(steps)
        for stage, ms in expected.items():
            # a launch of the last step may still run when the next begins
            assert found[stage] == pytest.approx(ms, abs=12 * 30 / 400)
        assert min(found.values()) >= 0


def test_without_a_host_times_add_up_and_more_work_never_takes_less():
    rng = random.Random(1)  # noqa: S311
    for _ in range(100):
        steps = random_steps(rng)
        alone = by_stage([replace(step, host=0.0) for step in steps], "abc")
        for stage in "abc":
            assert alone[stage] == pytest.approx(sum(step.device for step in steps if step.stage == stage))
        at = rng.randrange(len(steps))
        more = [*steps]
        more[at] = replace(
            steps[at], device=steps[at].device + rng.uniform(0, 5), host=steps[at].host + rng.uniform(0, 5)
        )
        assert sum(by_stage(more, "abc").values()) >= sum(by_stage(steps, "abc").values()) - 1e-9


def test_a_host_that_waits_has_no_head_start():
    ahead = [Step("vision", 50.0, 10.0), Step("prefill", 5.0, 30.0)]
    assert by_stage(ahead, STAGES)["prefill"] == 5.0
    waiting = [replace(ahead[0], waits=True), ahead[1]]
    assert by_stage(waiting, STAGES)["prefill"] == 30.0


# ---------------------------------------------------------------------- an H200, from a few of its figures


def test_the_towers_blocks_take_what_an_h200_took():
    from holimerge.planning.predict import _blocks, _host

    # rows side by side, as a patched model has them
    shape, here, scheme = SHAPES["llava-onevision-7b"].model(), h200(), Scheme("holitom")
    host = _host(shape, here, scheme)
    measured = {(32, 729): 45.6, (16, 729): 23.4, (8, 729): 11.8, (32, 368): 22.2, (32, 184): 11.1, (1, 729): 9.4}
    for (frames, patches), ms in measured.items():
        found = by_stage(_blocks(shape, here, scheme, (patches, 1), frames, host), STAGES)["vision"]
        assert found == pytest.approx(ms, rel=0.15), (frames, patches)


def test_the_language_model_takes_what_an_h200_took():
    shape, here = SHAPES["llava-onevision-7b"].model(), h200()
    for length, ms in {40: 34.7, 364: 31.0, 668: 26.0, 1300: 35.2, 2500: 66.5, 6313: 175.6}.items():
        found = by_stage(steps_of(Prompt(shape, (), length), here, Scheme(None), 0), STAGES)["prefill"]
        assert found == pytest.approx(ms, rel=0.15), length


def prompt_of(name: str, frames: int = 32) -> Prompt:
    known = SHAPES[name]
    shape = known.model()
    steps = shape.vision.steps(frames)
    rest = 40 + known.separators + known.separators_per_step * steps
    return Prompt(shape, (Clip(steps, known.grid),), rest, 16 * 10**9, 2)


def test_prompts_take_what_an_h200_took():
    work = prompt_of("llava-onevision-7b")
    stock = predict(work, h200(), Scheme(None), work.total)
    expected = {"vision": 108.0, "prefill": 166.0, "other": 8.6}
    assert {stage: stock[stage] for stage in expected} == pytest.approx(expected, rel=0.15)
    assert sum(stock.values()) == pytest.approx(283, rel=0.15)
    reduced = predict(work, h200(), Scheme("holitom", layer=18, retain=0.5), round(0.1 * work.total))
    assert 4 <= reduced["reduce"] + 0.5 <= 6.5
    expected = {"project": 2.0, "splice": 1.8, "prefill": 31.0, "other": 10.5}
    assert {stage: reduced[stage] for stage in expected} == pytest.approx(expected, rel=0.15)
    work = prompt_of("qwen2.5-vl-7b")
    stock = predict(work, h200(), Scheme(None), work.total)
    assert {stage: stock[stage] for stage in ("vision", "prefill")} == pytest.approx(
        {"vision": 350.0, "prefill": 60.0}, rel=0.15
    )


def test_a_patched_tower_has_one_call_a_length_and_its_own_pooling():
    here = h200()
    for name in NAMES[1:]:  # a stock tower goes through its spans
        work = prompt_of(name)
        stock, patched = (predict(work, here, Scheme(method), work.total)["vision"] for method in (None, "holitom"))
        assert patched < stock / 1.5
        calls = here.host["qwen2_5_vl, stock"]["attention_call"] * 16
        assert stock > calls * work.shape.vision.layers
    work, slow = prompt_of(NAMES[0]), device()
    slow = replace(slow, elementwise={**slow.elementwise, "pool": ((1.0, 1.0), (2.0**25, 1e9))})
    assert predict(work, slow, Scheme(None), work.total)["vision"] > 1e9
    for at in ("projector_input", "projector_output"):
        assert predict(work, slow, Scheme("holitom", at), 100)["vision"] < 1e9


@pytest.mark.parametrize("name", NAMES)
def test_costs_on_a_gpu_never_fall_when_a_token_is_added(name):
    work, here = prompt_of(name, 8), h200()
    for scheme in (
        Scheme("holitom"),
        Scheme("holitom", "projector_output", 18, 0.5),
        Scheme("holitom", left=TowerLeft(1, 9)),
    ):
        times = [sum(predict(work, here, scheme, k).values()) for k in range(1, work.total, 17)]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(times))


def test_what_merges_in_the_tower_is_launched_too():
    work, here = prompt_of(NAMES[0], 2), h200()  # few frames: the host is behind
    plain, merging = (predict(work, here, Scheme(left=TowerLeft(0.7, n)), 10)["vision"] for n in (0, 26))
    assert merging - plain == pytest.approx(26 * here.host["llava_onevision, patched"]["merging"])
    setting = Setting(work.shape, here, element=2)
    with pytest.raises(ImpossibleError) as error:
        plan(setting, Budget(ttft_ms=1e-3), 2)
    assert error.value.least == pytest.approx(sum(predict(work, here, Scheme(), 1).values()), rel=0.03)


# ---------------------------------------------------------------------- the queue


class Machine:
    """A device with a queue, and a host that takes `launch` ms to add to it."""

    def __init__(self, launch: float) -> None:
        self.launch, self.host, self.done, self.launches = launch, 0.0, 0.0, 0

    def run(self, ms: float) -> None:
        self.host += self.launch
        self.done = max(self.done, self.host) + ms
        self.launches += 1

    def mark(self) -> Any:
        machine = self

        class Mark:
            def record(self) -> None:
                machine.host += machine.launch
                self.at = max(machine.done, machine.host)

            def query(self) -> bool:
                return self.at <= machine.host

            def synchronize(self) -> None:
                machine.host = max(machine.host, self.at)

            def elapsed_time(self, end_event: Any) -> float:
                return end_event.at - self.at

        return Mark()

    def now(self) -> float:
        return self.host / 1000


@pytest.mark.parametrize("launch", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("work", [0.002, 0.05, 3.0])
@pytest.mark.parametrize("launches", [1, 9])
def test_the_queue_hides_what_launching_takes(monkeypatch, launch, work, launches):
    machine = Machine(launch)
    monkeypatch.setattr(watch, "now", machine.now)
    queue = Queue(lambda: machine.run(0.2), machine.mark)

    def call() -> None:
        for _ in range(launches):
            machine.run(work / launches)

    timed = Watch(torch.device("cpu"), queue)
    timed.add("it", call)
    (found,) = timed.medians().values()
    assert found == pytest.approx(work, rel=0.05)
    assert machine.launches < 6000
    assert queue.plugs < 400


def test_one_slow_moment_makes_no_later_measurement_slow(monkeypatch):
    machine = Machine(0.01)
    monkeypatch.setattr(watch, "now", machine.now)
    queue = Queue(lambda: machine.run(0.2), machine.mark)
    pauses = [500.0, 0.0]

    def call() -> None:
        machine.host += pauses.pop(0) if pauses else 0.0
        machine.run(0.05)

    assert queue.busy(call, 1) == pytest.approx(0.05)
    before = machine.launches
    assert queue.busy(lambda: machine.run(0.05), 1) == pytest.approx(0.05)
    assert machine.launches - before <= watch.MOST_PLUGS + 1


# ---------------------------------------------------------------------- what is measured


def small(name: str) -> Any:
    """The shape of a tiny model of a named one's class."""
    shape = SHAPES[name].model()
    config = tiny.llava_config(4) if shape.vision.side else tiny.qwen_config(4, shape.model_type, shape)
    return shape_of(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_models_own_sizes_are_measured_and_kept(name, monkeypatch):
    """The code that runs on a GPU, at the smallest sizes on this machine."""
    monkeypatch.setattr(watch, "PASSES", 1)
    monkeypatch.setattr(watch, "SAMPLE_MS", 0.01)
    monkeypatch.setattr(tiny, "RUNS", 3)
    monkeypatch.setattr(tiny, "WARM", 1)
    monkeypatch.setattr(tiny, "LAYERS", (4, 8))
    sizes, where = SMALLEST._replace(full_rows=64), torch.device("cpu")
    key = replace(HERE, kind="cuda")
    shape = small(name)
    with calibrate._steady(where):
        general = calibrate.primitives(where, torch.float32, key, sizes)
        found = calibrate.with_shape(
            where, torch.float32, replace(general, reduction={"holitom": (0.1, 0, 0, 0)}), shape, sizes
        )
        again = calibrate.with_shape(where, torch.float32, found, shape, sizes)
    assert again.host == found.host
    assert Device.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.shapes == (repr(shape),)
    v, text = shape.vision, shape.text
    for pair in ((text.width, text.mlp), (text.mlp, text.width), (v.mlp, v.width), v.projector[:2], v.projector[1:]):
        assert product_name(*pair) in found.products
    assert any(key.startswith("embed") for key in found.products)
    assert {f"causal-{text.head_dim}", f"full-{v.width // v.heads}-call"} <= set(found.attention)
    stock, patched = found.host[f"{shape.model_type}, stock"], found.host[f"{shape.model_type}, patched"]
    for flow in (stock, patched):
        # of models of a few layers each, on a machine that may be busy: a difference can be nothing
        assert min(flow[stage] for stage in ("tower_layer", "decoder_layer", "other")) >= 0
    assert min(patched[stage] for stage in ("project", "splice", "inner", "reduce")) > 0
    assert (stock["attention_call"] > 0) is (v.side is None)
    assert patched["merging"] > 0
    clip = Clip(2, None if v.side else tiny.CELLS)
    for scheme in (Scheme(None), Scheme("holitom", layer=2, retain=0.5)):
        stages = predict(Prompt(shape, (clip,), 5), found, scheme, 4)
        assert all(ms >= 0 for ms in stages.values())
        assert min(stages["vision"], stages["prefill"], stages["other"]) > 0


def test_layers_and_what_is_left_without_them():
    left = {"vision": 5.0, "prefill": 7.0, "inner": 2.0, "other": 3.0, "splice": 1.0, "reduce": 2.0, "project": 1.5}
    times = {n: {**left, "vision": 5.0 + 0.5 * n, "prefill": 7.0 + 1.5 * n} for n in (4, 16)}
    found = tiny.split_layers(times, 4, 16)
    assert found == pytest.approx({**left, "prefill": 5.0, "tower_layer": 0.5, "decoder_layer": 1.5})


def test_a_shape_is_measured_when_it_is_first_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "_KNOWN", {})
    here = h200()
    asked = []

    def measured(_where, _dtype, _key, old, _method, shape):
        asked.append((old is not None, shape and shape.model_type))
        return replace(old or here, shapes=(*(old or here).shapes, *([repr(shape)] if shape else [])))

    monkeypatch.setattr(calibrate, "conditions_of", lambda *_: here.conditions)
    monkeypatch.setattr(calibrate, "_measure", measured)
    one, two = (shape_of(build_config(SHAPES[name])) for name in NAMES[:2])
    for shape in (None, one, one, two):
        calibrate.calibrated(shape=shape)
    monkeypatch.setattr(calibrate, "_KNOWN", {})  # another process
    calibrate.calibrated(shape=two)
    assert asked == [(False, None), (True, "llava_onevision"), (True, "qwen2_5_vl")]


def test_a_replayed_tower_costs_its_host_no_launch_of_a_block():
    work, here = prompt_of(NAMES[0], 1), h200()
    eager, replayed = (predict(work, here, Scheme(graphed=graphed), 100) for graphed in (False, True))
    blocks = work.shape.vision.layers * here.host["llava_onevision, patched"]["tower_layer"]
    assert eager["vision"] > blocks > replayed["vision"]  # one frame is less work than launching it
    assert {**eager, "vision": 0.0} == pytest.approx({**replayed, "vision": 0.0}, abs=1.0)
