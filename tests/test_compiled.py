"""torch.compile on a model or a part of it, before or after patching: the right answer, compiled or not."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from around import most, settings, videos
from patching import assert_steps_close, generate, logits
from toys import SOME, TOYS, make_model, prompt
from transformers import CompileConfig

import holimerge


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.warn_once_cache.clear()  # so that a test sees what a user's process would
    yield
    torch._dynamo.reset()


def shallow(family: str) -> Any:
    """As few layers as an inner merge allows: compiling takes seconds a layer."""
    deepest = () if TOYS[family].recurrent else TOYS[family].inner_layers[:1]  # its kinds of layers are listed
    return make_model(family, **({"num_hidden_layers": deepest[0] + 1} if deepest else {}))


def replace(parent: Any, child: Any, new: Any) -> None:
    """Put `new` where `child` hangs in `parent`."""
    owner, name = next((m, n) for m in parent.modules() for n, c in m.named_children() if c is child)
    owner._modules[name] = new


def compile_forward(model: Any, decoder: Any, backend: str) -> Any:
    decoder.forward = torch.compile(decoder.forward, backend=backend)
    return model


def compile_in_place(model: Any, decoder: Any, backend: str) -> Any:
    decoder.compile(backend=backend)
    return model


def compile_module(model: Any, decoder: Any, backend: str) -> Any:
    replace(model, decoder, torch.compile(decoder, backend=backend))
    return model


def compile_layers(model: Any, decoder: Any, backend: str) -> Any:
    for layer in list(decoder.layers):
        replace(decoder, layer, torch.compile(layer, backend=backend))
    return model


def compile_all(model: Any, _decoder: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend)


WAYS: dict[str, Callable[..., Any]] = {
    "its forward": compile_forward,
    "the decoder in place": compile_in_place,
    "the decoder wrapped": compile_module,
    "the layers wrapped": compile_layers,
    "the whole model": compile_all,
}
# The ways on one family; on the others the cheapest: what is compiled of ours is the same for all. A model compiled
# before it is patched is compiled once more, so only the cheap ways are.
TURNS = [
    (SOME[0], "the decoder in place", "before"),
    (SOME[0], "the decoder wrapped", "after"),
    (SOME[0], "the layers wrapped", "after"),
    (SOME[0], "the whole model", "after"),
    *((family, "its forward", "before" if family == SOME[-1] else "after") for family in SOME[1:]),
]


@pytest.mark.parametrize(("family", "way", "order"), TURNS, ids=lambda x: x.replace(" ", "-"))
def test_a_compiled_model_answers_as_an_eager_one(family, way, order):
    cfg, x = most(family), prompt(family, frames=2)
    model = shallow(family)
    stock = logits(model, x)
    expected = logits(holimerge.patch_model(model, cfg), x)
    told = videos(model)
    if order == "before":
        holimerge.unpatch_model(model)
    called = WAYS[way](model, TOYS[family].language_model(model), "eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if order == "before":
            torch.testing.assert_close(logits(called, x), stock)
            assert holimerge.patch_model(called, cfg) is called
        for _ in range(2):
            torch.testing.assert_close(logits(called, x), expected)
        assert videos(called) == told
    assert not [w.message for w in seen if "holimerge" in str(w.message) or "Dynamo" in str(w.message)]
    assert holimerge.unpatch_model(called) is called
    torch.testing.assert_close(logits(called, x), stock)
    assert holimerge.patch_model(called, cfg) is called


def test_generating_and_prompts_of_many_lengths_with_a_compiled_decoder():
    family = SOME[0]
    model, eager = (holimerge.patch_model(shallow(family), settings(family)["outer"]) for _ in range(2))
    compile_forward(model, TOYS[family].language_model(model), "eager")
    ours, expected = generate(model, prompt(family), 5), generate(eager, prompt(family), 5)
    assert torch.equal(ours.sequences, expected.sequences)
    for frames in range(2, 26, 2):  # more than the graphs torch keeps of one function
        x = prompt(family, frames=frames)
        torch.testing.assert_close(logits(model, x), logits(eager, x))


@pytest.mark.parametrize("family", SOME[:2])
@pytest.mark.parametrize("inner", [False, True])
def test_generate_compiles_its_steps_over_a_static_cache(family, inner):
    """Outer reduction alone; with an inner merge the steps run as they are."""
    cfg = most(family) if inner else settings(family)["outer"]
    model, x = holimerge.patch_model(shallow(family), cfg), prompt(family, frames=2)
    graphs = []

    def backend(module: Any, example: Any) -> Any:
        graphs.append(module)
        return module

    how = CompileConfig(backend=backend, mode=None)
    how._compile_all_devices = True
    eager = generate(model, x, 4)
    out = generate(model, x, 4, cache_implementation="static", compile_config=how)
    assert bool(graphs) != inner
    assert torch.equal(out.sequences, eager.sequences)
    assert_steps_close(out.logits, eager.logits)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler on this machine")
def test_the_default_backend_answers_as_the_eager_model():
    family = SOME[0]
    x = prompt(family, frames=2)
    model = holimerge.patch_model(make_model(family, num_hidden_layers=1), settings(family)["outer"])
    expected, told = logits(model, x), videos(model)
    compile_layers(model, TOYS[family].language_model(model), "inductor")
    torch.testing.assert_close(logits(model, x), expected, atol=1e-4, rtol=0)
    assert videos(model) == told
