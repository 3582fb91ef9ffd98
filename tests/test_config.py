"""Configurations: presets, round trips, overrides, the token count, and every error's text."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import holimerge
from holimerge.config import Budget, Config, ConfigError, Inner, OuterOptions, load_config
from holimerge.cost import inner_kept

PRESETS = (
    [f"holimerge-{p}" for p in ("05", 10, 15, 25)]
    + [f"holitom-{p}" for p in ("05", 10, 15, 20, 25)]
    + ["holimerge-10-fast", "holimerge-10-frames", "keep-all"]
)
MORE_FRAMES = ["more-frames-10", "more-frames-4", "more-frames-4-fast"]
H = {"method": "holitom", "budget": {"retain": 0.1}}
NAN, INF = float("nan"), float("inf")


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def error(cfg, kind=ConfigError) -> str:
    with pytest.raises(kind) as caught:
        load_config(cfg)
    return str(caught.value)


# ---------------------------------------------------------------------- presets


def test_the_presets_are_those_of_the_specification():
    assert holimerge.list_presets() == sorted(PRESETS + MORE_FRAMES)
    assert holimerge.list_methods() == ["holitom", "keep_all"]
    assert holimerge.list_families() == [
        "glm46v",
        "glm4v",
        "glm4v_moe",
        "internvl",
        "llava_next_video",
        "llava_onevision",
        "llava_video",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
        "video_llama_3",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_values(name):
    config = load_config(name)
    if name == "keep-all":
        assert config.to_dict() == {
            "method": "keep_all",
            "cuda_graph": False,
            "tower_attention": "auto",
            "treat_images_as_video": False,
            "more_frames": 1,
        }
        return
    percent, authors = int(name.split("-")[1]), name.startswith("holitom")
    assert config.method == "holitom"
    assert (config.budget.tokens, config.budget.flops, config.chunk_frames) == (None, None, None)
    assert config.budget.retain == percent / 100
    assert config.budget.exact is not authors
    assert config.outer.similarity == (0.65 if percent <= 10 else 0.8)
    assert config.outer.order == ("segment" if authors else "raster")
    # auto is contiguous on 1-D RoPE and original on mRoPE
    assert config.outer.positions == ("contiguous" if authors else "auto")
    assert config.outer.at == ("projector_output" if authors else "projector_input")
    assert config.inner.merge == ("pairwise" if authors else "mean")
    assert config.inner.retain == 0.5
    assert config.inner.resolve(28) == 18  # the layer of the authors' 7B table
    assert (config.encoder is not None) == name.endswith(("-fast", "-frames"))
    assert not config.cuda_graph  # no preset relies on what no GPU has run yet


def test_the_fast_preset_leaves_three_eighths_of_the_towers_tokens():
    config = load_config("holimerge-10-fast")
    tokens = config.encoder.tokens
    assert tokens.resolve("tokens", 26) == [1, 2, 3, 5]
    assert [729 - tokens.gone(i, 4, 729, 729) for i in range(4)] == [615, 501, 387, 273]
    # what was found on the embedded benchmark (eval/tiny/encoder) is what the preset does
    measured = Path(__file__).parent.parent / "eval/tiny/encoder/tiny-10-tokens.yaml"
    assert load_config(measured).encoder == config.encoder == load_config("more-frames-4-fast").encoder


def test_the_frames_preset_merges_frames_where_earlytoms_first_stage_does():
    frames = load_config("holimerge-10-frames").encoder.frames
    assert frames.resolve("frames", 26) == [6, 21, 23]  # of SigLIP's 26 blocks (arXiv 2605.30010)
    assert (frames.similarity, frames.longest, frames.merge) == (0.65, 8, None)


def test_another_amount_of_tokens_takes_the_place_of_the_presets():
    changed = load_config({"base": "holimerge-10-fast", "encoder": {"tokens": {"r": 9}}}).encoder.tokens
    assert (changed.r, changed.keep, changed.layers) == (9, None, [0.04, 0.08, 0.12, 0.2])


@pytest.mark.parametrize("name", MORE_FRAMES)
def test_more_frames_enter_as_the_tokens_of_the_frames_asked_for(name):
    config = load_config(name)
    assert config.more_frames == int(name.split("-")[2])
    assert config.budget.keep(config.more_frames * 32 * 196) == 32 * 196
    assert config.chunk_frames == 32  # the tower sees no more frames at once than before


@pytest.mark.parametrize("name", PRESETS + MORE_FRAMES)
def test_preset_round_trip(name, tmp_path):
    config = load_config(name)
    assert load_config(config) is config
    assert load_config(config.to_dict()) == config
    path = write(tmp_path, config.to_yaml())
    assert load_config(path) == config
    assert load_config(str(path)) == config
    assert load_config({"base": name}) == config


def test_a_null_that_differs_from_the_default_survives_the_round_trip(tmp_path):
    config = load_config({**H, "outer": {"beta": None}})  # null is the plain mean, absent is 0.6
    assert config.outer.beta is None
    assert load_config(config.to_dict()) == config
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_defaults_stand_in_one_place_and_are_the_same_with_and_without_the_block():
    assert load_config(H) == load_config({**H, "outer": {}}) == load_config({**H, "outer": None})
    assert load_config(H).budget.exact is True
    assert load_config(H).inner is None
    assert load_config({**H, "inner": {"layer": 2}}).inner == Inner(layer=2, retain=0.5, merge="mean")


def test_frozen():
    config = load_config("holimerge-15")
    for part, key in [(config, "method"), (config, "inner"), (config.budget, "retain"), (config.outer, "order")]:
        with pytest.raises(ValueError, match="frozen"):
            setattr(part, key, None)
    with pytest.raises(ValueError):
        config.nothing = 1
    assert config == load_config("holimerge-15")


def test_load_config_does_not_change_its_argument():
    given_dict = {"base": "holimerge-15", "budget": {"tokens": 7}, "inner": None}
    before = copy.deepcopy(given_dict)
    load_config(given_dict)
    assert given_dict == before


# ---------------------------------------------------------------------- the token count


def k_of(total: int, share: Fraction) -> int:
    """K = min(T N, max(1, floor(r T N + 0.5))) in whole numbers: the largest k with 2 k <= 2 r T N + 1."""
    return min(total, max(1, (2 * share.numerator * total + share.denominator) // (2 * share.denominator)))


def test_k_on_random_shares():
    rng = np.random.default_rng(0)
    for total, log_share in zip(rng.integers(1, 200_000, 20_000).tolist(), rng.uniform(-7, 0, 20_000), strict=True):
        share = float(10**log_share)
        exact = Fraction(share) * total
        if abs(exact - math.floor(exact) - Fraction(1, 2)) < Fraction(1, 10**9):
            continue  # halves have a test of their own
        assert Budget(retain=share).keep(total) == k_of(total, Fraction(share)), (total, share)


@pytest.mark.parametrize("name", [p for p in PRESETS if p != "keep-all"])
def test_k_of_the_presets_at_every_size(name):
    budget = load_config(name).budget
    share = Fraction(str(budget.retain))
    assert all(budget.keep(n) == k_of(n, share) for n in range(1, 10_000))
    assert [budget.keep(n) for n in (1, 2, 3)] == [1, 1, 1]


def test_k_rounds_written_halves_up():
    """29 % of 50 tokens is 14.5: 15, whatever 0.29 is in binary (the flops budget takes shares as written, too)."""
    halves = [(t, p) for p in range(1, 1000) for t in range(1, 2000) if (p * t) % 1000 == 500]
    assert len(halves) > 3000
    wrong = [(t, p / 1000) for t, p in halves if Budget(retain=p / 1000).keep(t) != k_of(t, Fraction(p, 1000))]
    assert not wrong, f"{len(wrong)} of {len(halves)}, e.g. retain {wrong[0][1]} of {wrong[0][0]} tokens"


def test_k_of_other_budgets():
    assert [Budget(tokens=7).keep(n) for n in (1, 6, 7, 8, 10**6)] == [1, 6, 7, 7, 7]
    assert [Budget(retain=1.0).keep(n) for n in (1, 2, 999)] == [1, 2, 999]
    with pytest.raises(ValueError, match="flops"):
        Budget(flops=0.5).keep(10)


def test_inner_count_is_the_cost_models_count():
    for retain, n in itertools.product([0.1, 0.25, 0.3, 0.5, 0.75, 1.0], range(1, 300)):
        assert Inner(layer=1, retain=retain).keep(n) == inner_kept(n, retain) == max(1, round(n * retain))


# ---------------------------------------------------------------------- inner.layer and a model's depth


def test_layer_is_an_index_or_a_share():
    assert [Inner(layer=k).resolve(28) for k in (1, 18, 27)] == [1, 18, 27]
    assert [Inner(layer=s).resolve(28) for s in (0.001, 0.25, 0.5, 0.643, 0.75)] == [1, 7, 14, 18, 21]
    for layer, depth in [(28, 28), (40, 28), (1, 1)]:
        with pytest.raises(ConfigError) as caught:
            Inner(layer=layer).resolve(depth)
        assert "inner.layer" in str(caught.value)
        assert str(layer) in str(caught.value)
        assert f"1 to {depth - 1}" in str(caught.value)


def test_a_share_is_not_refused_with_a_text_that_calls_it_valid():
    for depth, percent in itertools.product([2, 4, 24, 28, 80], range(1, 100)):
        inner = Inner(layer=percent / 100)
        if 1 <= round(percent / 100 * depth) < depth:
            assert inner.resolve(depth) == round(percent / 100 * depth)
            continue
        try:
            text = f"layer {inner.resolve(depth)}"
        except ConfigError as refusal:
            text = str(refusal)
        assert "between 0 and 1" not in text, f"{percent / 100} of {depth} layers: {text}"


# ---------------------------------------------------------------------- errors


def changed(section: str, **keys):
    return {**H, section: {**(H.get(section) or {}), **keys}}


UNKNOWN = [  # configuration, path, the right spelling
    ({**H, "outre": {}}, "outre", "outer"),
    ({**H, "chunk_frame": 4}, "chunk_frame", "chunk_frames"),
    ({"bse": "holimerge-15", **H}, "bse", "base"),
    (changed("budget", retian=0.1), "budget.retian", "retain"),
    (changed("budget", token=3), "budget.token", "tokens"),
    (changed("outer", simularity=0.7), "outer.simularity", "similarity"),
    (changed("outer", position="auto"), "outer.position", "positions"),
    (changed("inner", layer=2, mrge="mean"), "inner.mrge", "merge"),
    (changed("inner", layr=2), "inner.layr", "layer"),
    ({"base": "holitom-10", "inner": {"retian": 0.5}}, "inner.retian", "retain"),
    ({"method": "holitm", "budget": {"retain": 0.1}}, "method", "holitom"),
    (changed("outer", at="projector_imput"), "outer.at", "projector_input"),
    (changed("outer", order="rastre"), "outer.order", "raster"),
    (changed("outer", positions="orginal"), "outer.positions", "original"),
    (changed("inner", layer=2, merge="pairwize"), "inner.merge", "pairwise"),
    ({"base": "holimerge-5"}, "base", "holimerge-25"),
]


@pytest.mark.parametrize(("cfg", "path", "right"), UNKNOWN, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_spelling(cfg, path, right, tmp_path):
    text = error(cfg)
    assert f"{path}: " in text
    assert f"did you mean '{right}'?" in text
    assert "Valid: " in text
    in_file = error(write(tmp_path, yaml.safe_dump(cfg)))
    assert f"{path}: " in in_file
    if path != "base":
        assert "mine.yaml" in in_file


@pytest.mark.parametrize("name", ["int", "float"])
def test_an_unknown_key_may_have_any_name(name):
    assert f"{name}: unknown key" in error({**H, name: 3})
    assert f"budget.{name}: unknown key" in error(changed("budget", **{name: 3}))
    assert "1: " in error({**H, 1: 2})


VALUES = [  # path, impossible values, what the text says is valid
    ("budget.retain", [0, -0.1, 1.0001, NAN, INF, True, "0.1", [0.1], {"a": 1}], "Input should be"),
    ("budget.tokens", [0, -3, 3.0, True, "3", NAN], "Input should be"),
    ("budget.flops", [0, 2, NAN, False, "x"], "Input should be"),
    ("budget.ttft_ms", [0, -1, NAN, INF, True, "300"], "Input should be"),
    ("budget.memory_gib", [0, -0.5, NAN, INF, True, "12"], "Input should be"),
    ("budget.exact", [1, "false", None], "valid boolean"),
    ("outer.similarity", [1.1, -1.1, NAN, True, "0.8", None], "Input should be"),
    ("outer.beta", [1.5, NAN, True, "0.6"], "Input should be"),
    ("outer.neighbours", [0, 1.5, True, None], "Input should be"),
    ("outer.max_segment", [0, 2.0, True], "Input should be"),
    ("outer.at", [3, None, "", True], "Valid: projector_input, projector_output"),
    ("outer.order", ["time", 0], "Valid: raster, segment"),
    ("outer.positions", ["new", False], "Valid: auto, contiguous, original"),
    ("inner.layer", [0, -1, 0.0, 1.0, 1.5, True, False, "2", NAN, INF, None, [2]], "share of the depth"),
    ("inner.retain", [0, 1.2, NAN, True, "0.5", None], "Input should be"),
    ("inner.merge", ["median", 1, None], "Valid: mean, pairwise, drop"),
    ("chunk_frames", [0, -1, 2.0, True, "8"], "Input should be"),
    ("tower_attention", ["batch", None, True], "Valid: auto, stock, batched"),
    ("method", [5, None, ["holitom"], "tome"], "keep_all"),
    ("budget", [5, "retain", [0.1], True], "Budget"),
    ("outer", [5, "raster", [1]], "Options"),
    ("inner", [5, "mean", [2], True], "Inner"),
]


@pytest.mark.parametrize(("path", "value", "valid"), [(p, v, t) for p, values, t in VALUES for v in values], ids=str)
def test_impossible_value(path, value, valid):
    cfg = copy.deepcopy({**H, "outer": {}, "inner": {"layer": 2}})
    *section, key = path.split(".")
    (cfg[section[0]] if section else cfg)[key] = value
    text = error(cfg)
    assert text.startswith(f"{path}: ")
    assert repr(value) in text
    assert valid in text


def test_budgets_that_do_not_fit():
    for none in ({}, {"exact": True}, {"retain": None}):
        text = error({**H, "budget": none})
        assert text.startswith("budget: at least one of retain, tokens, flops, ttft_ms, memory_gib")
    for missing in ({"method": "holitom"}, {**H, "budget": None}, {"base": "holitom-10", "budget": None}):
        assert error(missing).startswith("budget: ")
    assert error({"method": "keep_all", "budget": {"retain": 0.1}}).startswith("budget: method keep_all")
    assert error({"method": "keep_all", "outer": {"order": "raster"}}).startswith("outer: method keep_all")
    assert error({"method": "keep_all", "chunk_frames": 4}).startswith("chunk_frames: method keep_all")
    assert load_config({"method": "keep_all", "inner": {"layer": 2}}).outer is None
    for empty in ({}, {"budget": {"retain": 0.1}}):
        assert "method: missing; valid: holitom, keep_all" in error(empty)


def test_every_mistake_is_named_at_once():
    text = error({**H, "budget": {"retain": 7}, "inner": {"layer": 0, "mrge": "mean"}, "outr": {}})
    for path in ("budget.retain: ", "inner.layer: ", "inner.mrge: ", "outr: "):
        assert path in text


def test_names_and_paths(tmp_path):
    text = error("holimerge-5")
    assert "'holimerge-5'" in text
    assert "did you mean 'holimerge-25'?" in text
    assert all(name in text for name in PRESETS)
    assert "no preset ''" in error("")
    for missing in (tmp_path / "absent.yaml", "absent.yaml", str(tmp_path / "absent")):
        assert str(missing) in error(missing, FileNotFoundError)
    for other in (5, None, b"holimerge-15", ["holimerge-15"]):
        assert type(other).__name__ in error(other, TypeError)
    for base in ("holimerge-5", 7, ["holimerge-15"], "./mine.yaml"):
        text = error({"base": base})
        assert text.startswith("base: ")
        assert repr(base) in text
        assert all(name in text for name in PRESETS)


YAMLS = [
    ("method: holitom\nbudget: {retain: 0.1}\nmethod: keep_all\n", ["method: given twice", "line 3"]),
    ("method: holitom\nbudget:\n  retain: 0.1\n  retain: 0.2\n", ["retain: given twice", "line 4"]),
    ("method: holitom\nbudget: {retain: 0.1}\nouter: {order: raster, order: segment}\n", ["order: given twice"]),
    ("", ["mapping of keys", "NoneType"]),
    ("- method: holitom\n", ["mapping of keys", "list"]),
    ("holimerge-15\n", ["mapping of keys", "str"]),
    ("method: [holitom\n", ["not valid YAML"]),
    ("method: keep_all\n---\nmethod: keep_all\n", ["not valid YAML"]),
    ("&a {x: *a}\n", ["not valid YAML"]),
    ("method: !!python/name:os.system\n", ["not valid YAML", "python/name"]),
    ("method: holitom\nbudget: {retain: .nan}\n", ["budget.retain: nan"]),
    ("method: holitom\nbudget: {tokens: yes}\n", ["budget.tokens: True"]),
    ("? [1, 2]\n: 3\n", ["[1, 2]"]),
    (b"method: \xff\xfe\n", ["utf-8"]),
]


@pytest.mark.parametrize(("text", "parts"), YAMLS, ids=lambda x: repr(x)[:40] if isinstance(x, (str, bytes)) else "")
def test_bad_yaml(text, parts, tmp_path):
    path = write(tmp_path, text)
    message = error(path)
    assert str(path) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("text", ["method: {}\n", "? {}\n: keep_all\n", "method: keep_all\nouter: [{}]\n"])
def test_yaml_constructs_no_python_object(text, tmp_path):
    victim = tmp_path / "made"
    path = write(tmp_path, text.format(f"!!python/object/apply:os.mkdir ['{victim}']"))
    assert "not valid YAML" in error(path)
    assert not victim.exists()


LIMITS = {"retain": 0.1, "tokens": 5, "flops": 0.1, "ttft_ms": 300, "memory_gib": 12.5}


def test_limits_stand_alone_or_together_and_survive_the_round_trip(tmp_path):
    for size in range(1, 6):
        for names in itertools.combinations(LIMITS, size):
            budget = {name: LIMITS[name] for name in names}
            config = load_config({**H, "budget": budget})
            assert config.budget == Budget(**budget)
            assert load_config(config.to_dict()) == config
            assert load_config(write(tmp_path, config.to_yaml())) == config
            assert config.budget.of_prompt == [k for k in ("flops", "ttft_ms", "memory_gib") if k in names]
            assert config.budget.estimated == [k for k in ("ttft_ms", "memory_gib") if k in names]


def test_the_cap_of_a_video_is_the_smaller_of_its_limits():
    for total in (1, 4, 49, 50, 51, 1000):
        shares, counts = Budget(retain=0.1).keep(total), Budget(tokens=5).keep(total)
        assert Budget(retain=0.1, tokens=5).keep(total) == min(shares, counts)
        assert Budget(retain=0.1, tokens=5, flops=0.5).cap(total) == min(shares, counts)
        assert Budget(ttft_ms=300.0).cap(total) == total
    for name in ("flops", "ttft_ms", "memory_gib"):
        with pytest.raises(ValueError, match=f"a {name} budget is solved for a prompt"):
            Budget(retain=0.5, **{name: LIMITS[name]}).keep(10)


# ---------------------------------------------------------------------- base and overrides


def test_override_of_a_base(tmp_path):
    base = load_config("holimerge-15")
    for kind, value in {"tokens": 64, "flops": 0.3, "retain": 0.4, "ttft_ms": 250.0}.items():
        switched = load_config(write(tmp_path, f"base: holimerge-15\nbudget: {{{kind}: {value}}}\n"))
        assert switched.budget == Budget(**{kind: value})
        assert switched.outer == base.outer
        assert switched.inner == base.inner
    assert load_config({"base": "holitom-10", "budget": {"tokens": 9}}).budget == Budget(tokens=9, exact=False)
    assert load_config({"base": "holimerge-15", "budget": {"exact": False}}).budget == Budget(retain=0.15, exact=False)
    assert load_config({"base": "holimerge-15", "inner": None}).inner is None
    assert load_config(write(tmp_path, "base: holimerge-15\ninner: null\n")).inner is None
    assert load_config({"base": "holimerge-15", "inner": {"layer": 2}}).inner == Inner(layer=2, retain=0.5)
    assert load_config({"base": "holimerge-15", "chunk_frames": 8}).chunk_frames == 8
    assert load_config({"base": None, **H}) == load_config(H)


BUDGETS = st.one_of(
    st.none(),
    st.fixed_dictionaries({"retain": st.floats(0.001, 1)}, optional={"exact": st.booleans()}),
    st.fixed_dictionaries({"tokens": st.integers(1, 9999)}, optional={"exact": st.booleans()}),
    st.fixed_dictionaries({"flops": st.floats(0.001, 1)}, optional={"exact": st.booleans()}),
    st.fixed_dictionaries({"exact": st.booleans()}),
)
OUTERS = st.fixed_dictionaries(
    {},
    optional={
        "at": st.sampled_from(["projector_input", "projector_output"]),
        "order": st.sampled_from(["raster", "segment"]),
        "positions": st.sampled_from(["auto", "contiguous", "original"]),
        "similarity": st.floats(-1, 1),
        "neighbours": st.integers(1, 99),
        "max_segment": st.integers(1, 99),
    },
)
INNERS = st.fixed_dictionaries(
    {},
    optional={
        "layer": st.one_of(st.integers(1, 99), st.floats(0.001, 0.999)),
        "retain": st.floats(0.001, 1),
        "merge": st.sampled_from(["mean", "pairwise", "drop"]),
    },
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(PRESETS[:-1]), BUDGETS, OUTERS, st.one_of(st.none(), INNERS), st.booleans())
def test_overrides_change_what_they_name_and_nothing_else(name, budget, outer, inner, removed):
    base = load_config(name)
    expected = {
        "method": base.method,
        "budget": base.budget.model_dump(),
        "outer": {**base.outer.model_dump(), **outer},
        "inner": None if removed else {**base.inner.model_dump(), **(inner or {})},
        "encoder": None if base.encoder is None else base.encoder.model_dump(),
        "cuda_graph": base.cuda_graph,
    }
    if budget is not None:
        if set(LIMITS) & set(budget):
            expected["budget"] = {"exact": base.budget.exact}
        expected["budget"] = {**expected["budget"], **budget}
    changes = {"budget": budget, "outer": outer, "inner": inner}
    changes = {key: value for key, value in changes.items() if value is not None}
    if removed:
        changes["inner"] = None
    config = load_config({"base": name, **changes})
    assert config == Config.model_validate(expected)
    assert isinstance(config.outer, OuterOptions)
    # what is written can be read again, from a dict and as YAML
    assert load_config(config.to_dict()) == config
    assert load_config(yaml.safe_load(config.to_yaml())) == config
