"""Replaying the vision tower: what decides whether a graph is used and which.

Without a GPU the graph is a stand-in that keeps what its capture gave, as a CUDA graph keeps its kernels;
tests/test_gpu.py has the real one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from recording import record_cpu
from test_laws import handle_of, logits, preset
from torch import nn
from toys import build, make_model, make_video, prompt

import holimerge
from holimerge import tower_graphs as module
from holimerge.config import ConfigError, load_config
from holimerge.eval import measure as measuring

TOKENS = {"tokens": {"layers": [1], "r": 2}}


class StandIn:
    """Does again what tensor operations its capture wrote down; of Python nothing runs again."""

    made: ClassVar[list[Any]] = []

    def __init__(self, call: Any, arguments: Mapping[str, Any], turns: Any) -> None:
        self.inputs = {name: x.clone() for name, x in arguments.items() if torch.is_tensor(x)}
        given = {**arguments, **self.inputs}
        self._replay, (self.tensors, self.more) = record_cpu(lambda: call(given), torch.device("cpu"))
        self.replays, self.done = 0, SimpleNamespace(synchronize=lambda: None)
        self.made.append(self)

    def replay(self, arguments: Mapping[str, Any]) -> Any:
        self.replays += 1
        for name, x in self.inputs.items():
            x.copy_(arguments[name])
        self._replay()
        return [None if x is None else x.clone() for x in self.tensors], self.more


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    monkeypatch.setattr(module, "_Graph", StandIn)
    monkeypatch.setattr(module, "_on_gpu", lambda x: True)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn.made


def config(encoder: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"base": "holimerge-25", "cuda_graph": True, **({"encoder": encoder} if encoder else {}), **more}


def asked(frames: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    return build("llava_onevision", [[5, make_video("llava_onevision", frames=frames, seed=seed), 6, 7]])


@pytest.mark.parametrize("encoder", [None, TOKENS])
def test_a_replayed_tower_gives_what_the_eager_one_gives(made: list[StandIn], encoder: dict[str, Any] | None) -> None:
    model = make_model("llava_onevision")
    for seed in range(3):
        x = asked(seed=seed)
        holimerge.patch_model(model, {**config(encoder), "cuda_graph": False})
        plain, report = logits(model, x), holimerge.last_report(model).encoders
        holimerge.patch_model(model, config(encoder))
        for _ in range(2):
            assert torch.equal(logits(model, x), plain)
            assert [e.to_dict() for e in holimerge.last_report(model).encoders] == [e.to_dict() for e in report]
        assert made[-1].replays == 2
    assert len(made) == 3  # a patch has its own


def test_shapes_chunks_and_weights_have_graphs_of_their_own(made: list[StandIn]) -> None:
    model = make_model("llava_onevision")
    holimerge.patch_model(model, config())
    for frames in (3, 4, 3, 4):
        logits(model, asked(frames))
    assert len(made) == 2
    block = handle_of(model).family._layers(model.model, {})[0][0]
    block.mlp.fc1.weight.data.mul_(1.5)  # in place: the kernels read what is there
    logits(model, asked(3))
    assert len(made) == 2
    block.mlp.fc1 = copy.deepcopy(block.mlp.fc1)  # lies elsewhere
    logits(model, asked(3))
    assert len(made) == 3
    holimerge.patch_model(model, config(chunk_frames=2))
    logits(model, asked(5))
    assert len(made) == 5  # two frames, and the one that is left
    assert [g.replays for g in made[3:]] == [2, 1]


def test_only_so_many_graphs_are_kept(made: list[StandIn]) -> None:
    model = make_model("llava_onevision")
    holimerge.patch_model(model, config())
    for frames in [*range(1, module.MOST + 2), module.MOST + 1, 1]:
        logits(model, asked(frames))
    assert len(made) == module.MOST + 2  # the first was made again
    assert len(handle_of(model).graphs._known) == module.MOST


def test_graphs_go_with_their_patch(made: list[StandIn]) -> None:
    model = make_model("llava_onevision")
    holimerge.patch_model(model, config())
    logits(model, asked())
    graphs, waited = handle_of(model).graphs, list[int]()
    made[0].done.synchronize = lambda: waited.append(1)
    holimerge.unpatch_model(model)  # the patch itself is part of cycles, and may stay for a while
    assert (len(graphs._known), waited) == (0, [1])


def test_a_measured_case_replays_in_every_run_that_counts(made: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_model("llava_onevision"), list[int]()
    real = measuring.run_once

    def run_once(model: Any, inputs: Any, **how: Any) -> Any:
        before = made[-1].replays if made else 0
        run = real(model, inputs, **how)
        calls.append(made[-1].replays - before if made else 0)
        return run

    monkeypatch.setattr(measuring, "run_once", run_once)
    measuring.measure_cases(model, asked(), {"replayed": config()}, warmup=1, repeats=2, new_tokens=2)
    assert len(made) == 4  # a patch for each run, which records by itself
    assert calls[1::2] == [1] * 4


def _hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *_: None)


def _offload(layer: nn.Module) -> None:
    layer._hf_hook = object()


def _forward(layer: nn.Module) -> None:
    layer.forward = layer.forward


@pytest.mark.parametrize("disturb", [_hook, _offload, _forward, lambda layer: layer.compile(backend="eager")])
def test_a_tower_that_does_more_than_launch_kernels_runs_eagerly(made: list[StandIn], disturb: Any) -> None:
    model = make_model("llava_onevision")
    holimerge.patch_model(model, config())
    x = asked()
    plain = logits(model, x)
    disturb(handle_of(model).family._layers(model.model, {})[0][1])
    assert torch.equal(logits(model, x), plain)
    assert (len(made), made[0].replays) == (1, 1)


def test_gradients_need_the_eager_call(made: list[StandIn]) -> None:
    model = make_model("llava_onevision")
    holimerge.patch_model(model, config(inner=None))
    model(**asked())
    assert not made


def test_what_cuda_does_not_capture_says_so_and_memory_that_ran_out_is_told_as_it_is(
    made: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nlong text")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    model = make_model("llava_onevision")
    holimerge.patch_model(model, config())
    monkeypatch.setattr(module, "_Graph", fail)
    with pytest.raises(RuntimeError, match=r"cannot be captured \(operation not permitted when stream is capturing\)"):
        logits(model, asked())
    monkeypatch.setattr(module, "_Graph", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        logits(model, asked())
    monkeypatch.setattr(module, "_Graph", StandIn)
    logits(model, asked())
    assert len(made) == 1  # what failed is not remembered


def test_adapters_that_are_switched_are_seen(made: list[StandIn]) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=r".*vision_tower.*q_proj", init_lora_weights=False)
    model = peft.get_peft_model(make_model("llava_onevision"), lora).eval()
    x, found = asked(), {}
    for graph in (False, True):
        holimerge.patch_model(model, {**config(), "cuda_graph": graph})
        for enabled in (True, False, True):
            with contextlib.nullcontext() if enabled else model.disable_adapter():
                found[graph, enabled] = logits(model, x)
            assert torch.equal(found[graph, enabled], found[False, enabled])
    assert not torch.equal(found[True, True], found[True, False])


def test_under_autocast_the_tower_runs_eagerly(made: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_model("llava_onevision"), asked()
    holimerge.patch_model(model, config())
    plain = logits(model, x)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind == "cuda")
    logits(model, x)
    monkeypatch.undo()
    assert [g.replays for g in made] == [1]
    assert torch.isfinite(plain).all()


def test_the_same_frames_as_other_videos_have_a_report_of_their_own(made: list[StandIn]) -> None:
    model = make_model("llava_onevision")
    holimerge.patch_model(model, config(TOKENS))
    one = make_video("llava_onevision", frames=4)
    logits(model, build("llava_onevision", [[5, one[:2], 6, one[2:], 7]]))
    assert holimerge.last_report(model).encoders[0].frames == [2, 2]
    logits(model, build("llava_onevision", [[5, one, 6, 7]]))
    assert holimerge.last_report(model).encoders[0].frames == [4]


def test_a_copy_of_a_patched_model_makes_graphs_of_its_own(made: list[StandIn]) -> None:
    model = make_model("llava_onevision")
    holimerge.patch_model(model, config())
    plain = logits(model, asked())
    twin = copy.deepcopy(model)
    assert handle_of(twin).graphs.tower is twin.model.vision_tower
    assert torch.equal(logits(twin, asked()), plain)
    assert len(made) == 2


def test_on_a_cpu_nothing_changes() -> None:
    model = make_model("llava_onevision")
    holimerge.patch_model(model, {**config(), "cuda_graph": False})
    plain = logits(model, asked())
    holimerge.patch_model(model, config())
    assert torch.equal(logits(model, asked()), plain)
    assert not handle_of(model).graphs._known


@pytest.mark.parametrize(
    ("wrong", "because"),
    [
        ({"method": "keep_all"}, "stock call"),
        ({"encoder": {"frames": {"layers": [1]}}}, "encoder.frames decides on the host"),
        ({"encoder": {"gate": {}}}, "encoder.gate decides on the host"),
        ({"treat_images_as_video": True}, "number varies"),
    ],
)
def test_configurations_that_cannot_be_captured_are_refused(wrong: dict[str, Any], because: str) -> None:
    base = {} if "method" in wrong else {"base": "holimerge-10"}
    with pytest.raises(ConfigError, match=because):
        load_config({**base, "cuda_graph": True, **wrong})


def test_towers_that_wait_for_the_device_run_eagerly(made: list[StandIn]) -> None:
    model, x = make_model("qwen2_5_vl"), prompt("qwen2_5_vl")
    holimerge.patch_model(model, preset("holimerge-10"))
    plain = logits(model, x)
    holimerge.patch_model(model, {**preset("holimerge-10"), "cuda_graph": True})
    assert torch.equal(logits(model, x), plain)
    assert not made
