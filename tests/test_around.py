"""What users do to a model around the patch: offloading, adapters, quantisation, dtypes. The order never matters.

Every entry of CHANGES is applied to a patched model, and to a model that is patched afterwards: both say the same, and
the same as a patched model without the wrapper that computes alike (`like`). Unpatched, both are the changed model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from around import Said, assert_same, cast, most, patched_answers, said, settings, stock_answers, videos
from patching import check_cached, generate, handle_of, logits, needs, patch
from toys import SOME, TOYS, make_model, prompt

import holimerge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::UserWarning:accelerate.*")
CPU = torch.device("cpu")
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: see make test-quantised"
)
NEEDS_TORCHAO = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed: see make test-quantised"
)


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# ------------------------------------------------------------------------------------------------ the changes


@dataclass(frozen=True)
class Change:
    """Something done to a model.

    do: (model, family, empty folder) -> what the user calls from then on.
    like: (family) -> a model without it that computes the same, up to rounding; None if there is none.
    dtype: what pixels come in.
    offloads: whether accelerate moves arguments and weights about (then every one of `settings` is looked at).
    may_fail: whether stock models of some families fail then.
    """

    do: Callable[[Any, str, Path], Any]
    like: Callable[[str], Any] | None = make_model
    dtype: torch.dtype = torch.float32
    offloads: bool = False
    may_fail: bool = False


def split(model: Any, family: str, folder: Path) -> Any:
    """Every other decoder layer on disk, all else on the CPU."""
    layers = TOYS[family].language_model(model).layers
    inside = next(name for name, module in model.named_modules() if module is layers)
    # accelerate takes whole modules, so the parents of the layers are named child by child
    places: dict[str, str] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if name and name != inside and not inside.startswith(f"{name}.") and f"{inside}.".startswith(parent):
            on_disk = module in list(layers) and int(name.rpartition(".")[2]) % 2
            places[name] = "disk" if on_disk else "cpu"
        elif not name or inside.startswith(f"{name}."):
            own = [*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False)]
            places |= {tensor: "cpu" for tensor, _ in own}
    assert "disk" in places.values()
    return accelerate.dispatch_model(model, places, offload_dir=folder)


def in_place(change: Callable[[Any], Any]) -> Callable[..., Any]:
    def do(model: Any, _family: str, _folder: Path) -> Any:
        change(model)
        return model

    return do


def lora_config(model: Any, family: str) -> peft.LoraConfig:
    """Random adapters on a third of the decoder's and the tower's linear modules, and on queries and keys."""
    inside = [TOYS[family].language_model(model), TOYS[family].modules(model)["vision"]]
    names = {id(module): name for name, module in model.named_modules()}
    linear = [names[id(m)] for part in inside for m in part.modules() if type(m) is torch.nn.Linear]
    chosen = [n for i, n in enumerate(linear) if i % 3 == 0 or n.endswith((".q_proj", ".k_proj", ".qkv"))]
    return peft.LoraConfig(target_modules=chosen, init_lora_weights=False, r=2)


def with_lora(model: Any, family: str, _folder: Path | None = None) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora_config(model, family)).eval()


def lora_merged(model: Any, family: str, folder: Path) -> Any:
    adapted = with_lora(model, family)
    adapted.merge_adapter()
    return adapted


def lora_left_again(model: Any, family: str, folder: Path) -> Any:
    return with_lora(model, family).unload()


def lora_of_transformers(model: Any, family: str, _folder: Path) -> Any:
    torch.manual_seed(1)
    model.add_adapter(lora_config(model, family))
    return model.eval()


def with_merged_weights(family: str) -> Any:
    return with_lora(make_model(family), family).merge_and_unload()


def int8_decoder(model: Any, family: str, _folder: Path) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(TOYS[family].language_model(model), Int8WeightOnlyConfig())
    return model


def four_bit_decoder(model: Any, family: str, _folder: Path) -> Any:
    from bitsandbytes.nn import Linear4bit

    decoder = TOYS[family].language_model(model)
    for name, module in list(decoder.named_modules()):
        if type(module) is torch.nn.Linear:
            packed = Linear4bit(
                module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.float32
            )
            packed.load_state_dict(module.state_dict())
            decoder.set_submodule(name, packed.to(CPU))  # weights are packed when they are moved
    return model


def unpacked(module: torch.nn.Module) -> torch.Tensor:
    if type(module) is torch.nn.Linear:
        return module.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def with_rounded_decoder(family: str, change: Callable[[Any, str, Path], Any]) -> Any:
    model = make_model(family)
    rounded = TOYS[family].language_model(change(make_model(family), family, Path())).named_modules()
    weights = {name: unpacked(m) for name, m in rounded if isinstance(m, torch.nn.Linear)}
    for name, module in TOYS[family].language_model(model).named_modules():
        if name in weights:
            module.weight.data = weights[name]
    return model


def dynamic_decoder(model: Any, family: str, _folder: Path) -> Any:
    quantize = torch.ao.quantization.quantize_dynamic
    quantize(TOYS[family].language_model(model), {torch.nn.Linear}, inplace=True)
    return model


OFFLOADED = partial(Change, offloads=True)
CHANGES = {
    "cpu_offload": OFFLOADED(lambda m, *_: accelerate.cpu_offload(m, execution_device=CPU) or m, may_fail=True),
    "disk_offload": OFFLOADED(
        lambda m, _, folder: accelerate.disk_offload(m, folder, execution_device=CPU) or m, may_fail=True
    ),
    "dispatched": OFFLOADED(lambda m, *_: accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True)),
    "cpu and disk": OFFLOADED(split),
    "hooks that came and went": OFFLOADED(
        lambda m, *_: (
            accelerate.hooks.remove_hook_from_submodules(accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True))
            or m
        )
    ),
    "half": Change(in_place(lambda m: m.half()), partial(make_model, dtype=torch.float16), dtype=torch.float16),
    "to bfloat16": Change(
        in_place(lambda m: m.to(torch.bfloat16)), partial(make_model, dtype=torch.bfloat16), dtype=torch.bfloat16
    ),
    "train and eval": Change(in_place(lambda m: m.train().eval())),
    "train": Change(in_place(lambda m: m.train())),
    "other attention": Change(
        in_place(lambda m: m.set_attn_implementation("eager")), partial(make_model, attn="eager")
    ),
    "generation settings": Change(in_place(lambda m: m.generation_config.update(num_beams=2)), like=None),
    "lora": Change(with_lora, with_merged_weights),
    "lora merged": Change(lora_merged, with_merged_weights),
    "lora merged and unloaded": Change(lambda m, f, _: with_lora(m, f).merge_and_unload(), with_merged_weights),
    "lora left again": Change(lora_left_again),
    "lora of transformers": Change(lora_of_transformers, with_merged_weights),
    "int8 weights": Change(int8_decoder, partial(with_rounded_decoder, change=int8_decoder)),
    "4-bit weights": Change(four_bit_decoder, partial(with_rounded_decoder, change=four_bit_decoder)),
    "int8 activations": Change(dynamic_decoder, like=None),
}
MARKS = {
    "int8 weights": [NEEDS_TORCHAO],
    "4-bit weights": [NEEDS_BITSANDBYTES],
    "int8 activations": [pytest.mark.filterwarnings("ignore::DeprecationWarning")],
}
NAMES = [pytest.param(name, marks=MARKS.get(name, [])) for name in CHANGES]


def gap(stock: Said, alike: Said) -> float:
    """How far two models that should compute the same are apart without us; a reduced one may be as far, and a bit."""
    pairs = ((stock.logits, alike.logits), (stock.steps, alike.steps))
    return 4 * max(((a - b).abs().max().item() for a, b in pairs if a is not None and b is not None), default=0.0)


# what depends on how a family's modules lie; the rest on two families
BY_FAMILY = ("disk_offload", "cpu and disk", "dispatched", "half", "other attention", "lora", "lora of transformers")
FIRST = SOME if os.environ.get("HOLIMERGE_ALL_FAMILIES") else ["qwen2_5_vl", "internvl"]
CASES = [
    pytest.param(family, *name.values, marks=name.marks)
    for family in SOME
    for name in NAMES
    if family in FIRST or name.values[0] in BY_FAMILY
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_does_not_matter_whether_the_change_or_the_patch_came_first(family, name, tmp_path):
    change = CHANGES[name]
    if name == "generation settings":
        needs(family, mode="beams")
    x = cast(prompt(family), change.dtype)
    looked_at = list(settings(family).items())
    for which, cfg in looked_at if change.offloads else looked_at[-1:]:
        after = change.do(make_model(family), family, tmp_path)
        stock = said(after, x)
        assert change.may_fail or not stock.failed
        assert holimerge.patch_model(after, cfg) is after
        ours = said(after, x)
        assert ours.failed == stock.failed  # an error as in the stock model, never a wrong answer
        assert ours.logits is None or not torch.equal(ours.logits, stock.logits)
        if change.like is make_model:
            assert_same(ours, patched_answers(family, which), gap(stock, stock_answers(family)))
        elif change.like is not None:
            like = change.like(family)
            atol = gap(stock, said(like, x))
            assert atol < 1e-3
            assert_same(ours, said(holimerge.patch_model(like, cfg), x), atol)
        before = change.do(holimerge.patch_model(make_model(family), cfg), family, tmp_path)
        assert_same(said(before, x), ours)
        for model in (after, before):
            holimerge.unpatch_model(model)
            again = said(model, x)
            assert again.failed == stock.failed
            assert_same(again, stock)


# ------------------------------------------------------------------------------------------------ more of some


def test_a_dispatched_model_generates_with_its_merge_weights(family):
    """accelerate rebuilds the features when it moves a module's arguments: what is known of them must not hang on them.

    Sizes of merged tokens, tokens' places in segment order and separators are such knowledge.
    """
    cfg = {"base": "holimerge-25", "inner": {"layer": 2, "merge": "mean"}, "outer": {"order": "segment"}}
    beams = {} if "beams" in TOYS[family].stock_fails else {"num_beams": 2, "num_return_sequences": 2}
    x = prompt(family)
    model = patch(make_model(family), cfg)
    expected = generate(model, x, **beams)
    told, chosen = videos(model), handle_of(model).selection
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    ours = generate(model, x, **beams)
    assert videos(model) == told
    for record, expected_record in zip(handle_of(model).selection.outer, chosen.outer, strict=True):
        assert torch.equal(record.assignment, expected_record.assignment)
    assert torch.equal(ours.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, expected.logits, strict=True))


def test_adapters_are_switched_while_patched(family):
    model, x = holimerge.patch_model(make_model(family), most(family)), prompt(family)
    plain = logits(model, x)
    adapted = with_lora(model, family)
    first = logits(adapted, x)
    torch.manual_seed(2)
    adapted.add_adapter("second", copy.deepcopy(adapted.peft_config["default"]))
    adapted.set_adapter("second")
    second = logits(adapted.eval(), x)
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted, x), first)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, x), plain)
    for one, other in ((first, second), (first, plain), (second, plain)):
        assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0].startswith(("int8 weights", "4-bit", "lora"))])
def test_a_changed_model_s_cache_equals_recomputation(family, name, tmp_path):
    model = CHANGES[name].do(make_model(family), family, tmp_path)
    holimerge.patch_model(model, most(family))
    check_cached(getattr(model, "get_base_model", lambda: model)(), family, prompt(family), 3)


@pytest.mark.parametrize("order", ["patched first", "grown first"])
def test_a_larger_vocabulary_leaves_old_words_as_they_were(family, order):
    model, x = make_model(family), prompt(family)
    stock = logits(model, x)
    expected = logits(holimerge.patch_model(model, most(family)), x)
    if order == "grown first":
        holimerge.unpatch_model(model)
    model.resize_token_embeddings(128, mean_resizing=False)
    holimerge.patch_model(model, most(family)) if order == "grown first" else None
    ours = logits(model, x)
    assert ours.shape[-1] == 128
    # the head's matrix product has another shape
    torch.testing.assert_close(ours[..., :96], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(holimerge.unpatch_model(model), x)[..., :96], stock, atol=1e-5, rtol=0)


def test_the_generation_settings_of_the_model_are_obeyed_when_they_change_later(family):
    needs(family, mode="beams")
    model, x = holimerge.patch_model(make_model(family), most(family)), prompt(family)
    expected = generate(model, x, 4, num_beams=3, num_return_sequences=2).sequences
    model.generation_config.update(num_beams=3, num_return_sequences=2)
    assert torch.equal(generate(model, x, 4).sequences, expected)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(num_beams=1, num_return_sequences=1, max_new_tokens=2)
    with torch.no_grad():
        assert model.generate(**x).shape == (1, x["input_ids"].shape[1] + 2)
