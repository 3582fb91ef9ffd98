"""The public surface on real classes: patching, undoing, refusing, reporting."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import transformers
from fingerprint import fingerprint, hook_count
from torch import nn
from toys import build, make_model, make_video, prompt
from transformers import GenerationConfig

import holimerge
from holimerge import ConfigError, last_report, merging, patch_model, unpatch_model
from holimerge.config import load_config

OUTER = {"method": "holitom", "budget": {"retain": 0.25}}
BOTH = {**OUTER, "inner": {"layer": 2}}
PIXELS = "pixel_values_videos"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def inputs(family):
    return prompt(family)


@pytest.fixture
def model(family, inputs):
    """A model that has run once (transformers sets hooks of its own then)."""
    made = make_model(family)
    made(**inputs)
    return made


def logits(model, inputs):
    return model(**inputs).logits


def tokens(model, inputs, **kwargs):
    return model.generate(**{"max_new_tokens": 3, "do_sample": False, **inputs, **kwargs})


def video_features(model, inputs):
    given = {k: v for k, v in inputs.items() if k in (PIXELS, "video_grid_thw")}
    return model.model.get_video_features(**given, return_dict=True)


def tower_and_projector(model):
    core = model.model
    if hasattr(core, "visual"):
        return core.visual, core.visual.merger
    return core.vision_tower, core.multi_modal_projector


def poisoned(inputs, value):
    pixels = inputs[PIXELS].clone()
    pixels.view(-1)[3] = value
    return {**inputs, PIXELS: pixels}


# ---------------------------------------------------------------------- patching and undoing


def test_patching_returns_the_same_object_and_unpatching_restores_it(model, inputs):
    before, stock = fingerprint(model), logits(model, inputs)
    assert patch_model(model, BOTH) is model
    assert list(model.state_dict()) == before["state"]
    assert list(dict(model.named_modules())) == before["order"]
    assert not torch.equal(logits(model, inputs), stock)
    tokens(model, inputs)
    assert unpatch_model(model) is model
    assert fingerprint(model) == before
    assert torch.equal(logits(model, inputs), stock)


def test_an_attribute_the_user_had_set_is_put_back(model, inputs):
    stock = model.generate
    model.generate = lambda *args, **kwargs: stock(*args, **kwargs)
    before = fingerprint(model)
    tokens(patch_model(model, BOTH), inputs)
    assert last_report(model).videos[0].after_inner
    assert fingerprint(unpatch_model(model)) == before


def test_patching_again_replaces(model, family, inputs):
    before = fingerprint(model)
    alone = logits(patch_model(make_model(family), OUTER), inputs)
    hooks = hook_count(patch_model(model, OUTER))
    for cfg in (BOTH, "keep-all", {**OUTER, "budget": {"tokens": 3}}, OUTER):
        logits(patch_model(model, cfg), inputs)
    patch_model(model, OUTER)
    assert hook_count(model) == hooks
    with pytest.raises(RuntimeError, match="no forward"):
        last_report(model)  # the report of another configuration would be a lie
    assert torch.equal(logits(model, inputs), alone)
    assert fingerprint(unpatch_model(model)) == before


UNUSABLE = [
    ({**OUTER, "inner": {"layer": 40}}, ConfigError, "inner.layer: 40"),
    ({**OUTER, "inner": {"layer": 4}}, ConfigError, "1 to 3"),
    ({**OUTER, "budget": {"retian": 0.1}}, ConfigError, "retain"),
    ("holimerge-5", ConfigError, "holimerge-25"),
    ("absent.yaml", FileNotFoundError, "absent.yaml"),
    (None, TypeError, "NoneType"),
]


@pytest.mark.parametrize(("cfg", "kind", "text"), UNUSABLE, ids=lambda x: str(x)[-30:])
def test_an_unusable_configuration_changes_nothing(model, inputs, cfg, kind, text):
    before = fingerprint(model)
    with pytest.raises(kind, match=text):
        patch_model(model, cfg)
    with pytest.raises(kind, match=text), merging(model, cfg):
        raise AssertionError("the block must not run")
    assert fingerprint(model) == before
    patched = logits(patch_model(model, BOTH), inputs)
    looks, report = fingerprint(model), last_report(model)
    with pytest.raises(kind, match=text):
        patch_model(model, cfg)
    assert fingerprint(model) == looks
    assert last_report(model) is report
    assert torch.equal(logits(model, inputs), patched)
    assert fingerprint(unpatch_model(model)) == before


def test_a_failed_patch_keeps_the_order_of_the_users_hooks(model):
    patch_model(model, BOTH).register_forward_hook(lambda *_: None)
    looks = fingerprint(model)
    with pytest.raises(ConfigError):
        patch_model(model, UNUSABLE[0][0])
    assert fingerprint(model) == looks


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
def test_an_error_in_the_middle_of_patching_leaves_nothing_half_patched(model, monkeypatch, patched):
    unpatched = fingerprint(model)
    looks = fingerprint(patch_model(model, OUTER)) if patched else unpatched
    register, left = nn.Module.register_forward_pre_hook, [3]

    def fails(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        return register(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", fails)
    with pytest.raises(MemoryError):
        patch_model(model, BOTH)
    assert fingerprint(model) in (looks, unpatched)


def test_tensor_parallel_is_refused(model):
    model._tp_size = 2
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="tensor-parallel"):
        patch_model(model, BOTH)
    assert fingerprint(model) == before


def test_what_is_not_patched(model):
    for wrong in (model, nn.Linear(2, 2), None):
        with pytest.raises(ValueError, match="not patched"):
            unpatch_model(wrong)
        with pytest.raises(ValueError, match="not patched"):
            last_report(wrong)
    patch_model(model, BOTH)
    with pytest.raises(RuntimeError, match="no forward has run"):
        last_report(model)
    unpatch_model(model)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)


def test_unsupported_models(model):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    text_only = transformers.Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    bare = transformers.LlavaOnevisionModel(make_model("llava_onevision").config)
    for wrong in (transformers.Qwen2ForCausalLM(text_only), nn.Linear(2, 2), bare, model.model, None):
        with pytest.raises(TypeError) as caught:
            patch_model(wrong, "keep-all")
        for part in (type(wrong).__name__, *holimerge.list_families()):
            assert part in str(caught.value)
        assert "_holimerge_handle" not in getattr(wrong, "__dict__", {})


@pytest.mark.parametrize("raises", [False, True], ids=["plain", "exception"])
def test_merging_restores_what_was_there(model, inputs, raises):
    before, stock = fingerprint(model), logits(model, inputs)

    def block(cfg):
        with contextlib.suppress(KeyError), merging(model, cfg) as same:
            assert same is model
            logits(model, inputs)
            if raises:
                raise KeyError

    block(BOTH)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, inputs), stock)
    patched, hooks = logits(patch_model(model, BOTH), inputs), hook_count(model)
    block("keep-all")
    with merging(model, OUTER):
        outer = logits(model, inputs)
        block(BOTH)
        assert torch.equal(logits(model, inputs), outer)
    assert hook_count(model) == hooks
    assert torch.equal(logits(model, inputs), patched)
    assert fingerprint(unpatch_model(model)) == before


def test_two_models_are_independent(model, family, inputs):
    other, stock = make_model(family, seed=1), logits(model, inputs)
    alone = logits(patch_model(other, BOTH), inputs)
    assert torch.equal(logits(model, inputs), stock)
    patched = logits(patch_model(model, OUTER), inputs)
    assert torch.equal(logits(other, inputs), alone)
    assert last_report(model).videos[0].after_inner is None
    assert last_report(other).videos[0].after_inner is not None
    unpatch_model(other)
    assert torch.equal(logits(model, inputs), patched)


# ---------------------------------------------------------------------- nothing is silently not reduced


CALLS = {"forward": logits, "generate": tokens, "core": lambda model, inputs: model.model(**inputs)}


@pytest.mark.parametrize("then", ["features", "language_model", "generate", "forward"])
@pytest.mark.parametrize("where", ["tower", "layer"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_was_broken_off_leaves_nothing_behind(model, family, inputs, kind, call, where, then):
    language_model, other = model.model.language_model, prompt(family, frames=4)
    text = {"inputs_embeds": model.get_input_embeddings()(torch.arange(5, 12)[None])}
    does = {
        "features": lambda: video_features(model, inputs).pooler_output[0],
        "language_model": lambda: language_model(**text).last_hidden_state,
        "generate": lambda: tokens(model, other),
        "forward": lambda: logits(model, other),
    }[then]
    patch_model(model, {**BOTH, "budget": {"flops": 0.5}})  # a budget that looks at the prompt
    expected = does()

    def breaks(*_):
        raise kind

    place = tower_and_projector(model)[0] if where == "tower" else language_model.layers[3]
    hook = place.register_forward_pre_hook(breaks)
    with pytest.raises(kind):
        CALLS[call](model, inputs)
    hook.remove()
    assert torch.equal(does(), expected)


def test_the_users_own_feature_call_is_stock(model, inputs):
    stock = video_features(model, inputs)
    logits(patch_model(model, BOTH), inputs)
    report, mine = last_report(model), video_features(model, inputs)
    assert type(mine) is type(stock)
    for a, b in zip(mine.pooler_output, stock.pooler_output, strict=True):
        assert torch.equal(a, b)
    assert last_report(model) is report


@pytest.mark.parametrize("cfg", [BOTH, "keep-all"], ids=["both", "keep-all"])
def test_features_of_the_caller_and_placeholders_without_a_video_raise(model, inputs, cfg):
    patched = logits(patch_model(model, cfg), inputs)
    given = {k: v for k, v in inputs.items() if k != PIXELS}
    given["mm_encoder_outputs"] = {"video": video_features(model, inputs)}
    text = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for call in (logits, tokens):
        with pytest.raises(RuntimeError, match="computed by the caller"):
            call(model, given)
        with pytest.raises(RuntimeError, match="placeholders but no video"):
            call(model, text)
    assert torch.equal(logits(model, inputs), patched)


REFUSED = pytest.mark.parametrize(("name", "value"), [("use_cache", False), ("prefill_chunk_size", 8)])


@pytest.mark.parametrize("where", ["argument", "model", "GenerationConfig", "positional GenerationConfig"])
@REFUSED
def test_generate_refuses_what_cannot_be_right_before_any_work(model, inputs, name, value, where):
    calls, config = [], GenerationConfig(**{name: value}, max_new_tokens=3)
    tower_and_projector(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    patch_model(model, BOTH)
    extra, positional, rest = {}, (), dict(inputs)
    if where == "argument":
        extra = {name: value}
    elif where == "model":
        setattr(model.generation_config, name, value)
    elif where == "GenerationConfig":
        extra = {"generation_config": config}
    else:
        positional = (rest.pop("input_ids"), config)
    with pytest.raises(ValueError, match=name):
        model.generate(*positional, **rest, **extra)
    assert not calls


@REFUSED
def test_without_an_inner_block_they_are_right(model, inputs, name, value):
    expected = tokens(patch_model(model, OUTER), inputs)
    # LLaVA's prompt has a chunk of which every token is dropped
    assert torch.equal(tokens(model, inputs, **{name: value}), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("cfg", [BOTH, OUTER, {**OUTER, "outer": {"at": "projector_output"}}, "keep-all"], ids=str)
def test_pixels_that_are_not_finite(model, inputs, cfg, value):
    """Reducing raises; keeping everything may also do what the stock model does, which is to answer NaN."""
    stock = logits(model, poisoned(inputs, value))
    patched = logits(patch_model(model, cfg), inputs)
    if cfg == "keep-all":
        with contextlib.suppress(ValueError):
            assert torch.equal(logits(model, poisoned(inputs, value)).isnan(), stock.isnan())
    else:
        for call in (logits, tokens):
            with pytest.raises(ValueError, match="not finite"):
                call(model, poisoned(inputs, value))
    assert torch.equal(logits(model, inputs), patched)


@pytest.mark.parametrize("cfg", [OUTER, BOTH, "keep-all"], ids=["outer", "both", "keep-all"])
def test_features_that_are_not_finite_are_never_taken_for_dropped_tokens(model, inputs, cfg):
    list(tower_and_projector(model)[1].parameters())[-1][0] = float("nan")  # as an overflow in half precision would
    assert logits(model, inputs)[:, -1].isnan().all()
    patch_model(model, cfg)
    with contextlib.suppress(ValueError):
        assert logits(model, inputs)[:, -1].isnan().all()


def test_labels_without_an_answer_raise(model, inputs):
    patched = logits(patch_model(model, BOTH), inputs)
    for labels in (torch.full_like(inputs["input_ids"], -100), inputs["input_ids"]):
        with pytest.raises(ValueError, match="row 0 has no answer token"):
            model(**inputs, labels=labels)
    assert torch.equal(logits(model, inputs), patched)


@pytest.mark.parametrize("kept", [False, True], ids=["reduced", "keep-all"])
def test_a_custom_mask_raises_where_it_cannot_be_shortened(model, family, inputs, kept):
    n = inputs["input_ids"].shape[1]
    mask = torch.zeros(1, 1, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    positions = torch.arange(n).expand(*((1,) if family == "llava_onevision" else (3, 1)), -1)
    custom = {**inputs, "position_ids": positions, "attention_mask": mask}
    stock, patched = logits(model, custom), logits(patch_model(model, BOTH), inputs)
    if kept:  # nothing is shortened
        assert torch.equal(logits(patch_model(model, "keep-all"), custom), stock)
        return
    for cfg in (BOTH, OUTER):
        with merging(model, cfg), pytest.raises(ValueError, match="mask of shape"):
            model(**custom)
    assert torch.equal(logits(model, inputs), patched)


# ---------------------------------------------------------------------- the report

FIELDS = {"frames", "grid", "features", "entering", "after_inner", "separators", "segments", "kept_per_frame"}


@pytest.mark.parametrize("cfg", ["holimerge-10", "holimerge-25", "holitom-10", "keep-all", OUTER, BOTH], ids=str)
def test_report(model, family, cfg):
    config, llava = load_config(cfg), family == "llava_onevision"
    videos = [make_video(family, seed=s, frames=f) for s, f in ((0, 8), (1, 8 if llava else 4))]
    patch_model(model, cfg)
    for run in (logits, tokens):  # after generate, it tells about the prompt
        run(model, build(family, [[5, *videos, 11]]))
        report = last_report(model)
        told = json.loads(report.to_json())
        assert told == json.loads(report.to_json(indent=2))
        assert set(told) == {"videos", "inner_layer", "milliseconds"}
        assert told["inner_layer"] == (config.inner.resolve(4) if config.inner else None)
        stages = {"vision", "splice", "prefill"} | ({"reduce", "project"} if config.budget else set())
        assert set(told["milliseconds"]) == stages | ({"inner"} if config.inner else set())
        assert all(ms >= 0 for ms in told["milliseconds"].values())
        for video, here, frames in zip(report.videos, told["videos"], [8, 8] if llava else [4, 2], strict=True):
            total = frames * (16 if llava else 12)
            assert set(here) == FIELDS
            assert here == json.loads(json.dumps({key: getattr(video, key, frames) for key in FIELDS}))
            assert (here["grid"], here["separators"]) == ([4, 4] if llava else [3, 4], int(llava))
            assert (here["features"], len(here["kept_per_frame"])) == (total, frames)
            assert sum(here["kept_per_frame"]) == here["entering"] <= total
            if config.budget is None:
                assert (here["entering"], here["segments"]) == (total, [])
            else:
                assert not config.budget.exact or here["entering"] == config.budget.keep(total)
                assert [t for a, b in here["segments"] for t in range(a, b + 1)] == list(range(frames))
        after = [v["after_inner"] for v in told["videos"]]
        if config.inner is None:
            assert after == [None, None]
        else:  # the share is of the prompt's video tokens together
            assert sum(after) == config.inner.keep(sum(v["entering"] for v in told["videos"]))
    logits(model, build(family, [[5, 6, 7]]))
    assert last_report(model).videos == []
