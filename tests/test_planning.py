"""The planner: limits that hold, counts that brute force finds too, least values that are true, and its cache."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import HERE, device
from patching import handle_of
from toys import build, make_model, make_video, prompt

import holimerge
from holimerge.config import Budget, ConfigError, load_config
from holimerge.cost import inner_kept, largest_budget, llm_prefill_exact, tower_work
from holimerge.encoding import Grid
from holimerge.eval.toy import toy_config
from holimerge.planning import calibrate, solve, tables, watch
from holimerge.planning.device import (
    Conditions,
    Device,
    cache_folder,
    load_device,
    monotone,
    read_table,
    save_device,
)
from holimerge.planning.patched import row_of
from holimerge.planning.predict import Clip, Prompt, Scheme, TowerLeft, memory_gib, memory_parts, predict
from holimerge.planning.solve import (
    EncoderSetting,
    ImpossibleError,
    Row,
    Setting,
    encoder_settings,
    most_frames,
    plan,
    share_out,
    tower_left,
)
from holimerge.shapes import SHAPES, build_config, load_shape, shape_of, text_shape

# ---------------------------------------------------------------------- tables


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.integers(1, 10**6), st.floats(1e-4, 1e4), min_size=1, max_size=8),
    st.lists(st.floats(1, 1e8), min_size=2, max_size=2),
)
def test_a_table_never_falls_and_never_exceeds_what_was_measured(points, sizes):
    table = monotone(list(points.items()))
    low, high = sorted(sizes)
    assert read_table(table, low) <= read_table(table, high) * (1 + 1e-9)
    for size, ms in points.items():
        assert read_table(table, size) == pytest.approx(min(t for n, t in points.items() if n >= size))
        assert read_table(table, size) <= ms


def test_tables_read_powers_between_and_beyond_their_points():
    squares = monotone([(n, 3.0 * n**2) for n in (2, 8, 64)])
    for n in (2, 3, 5.5, 8, 31, 64, 1000):
        assert read_table(squares, n, 2.0) == pytest.approx(3.0 * n**2)
    assert read_table(squares, 1) == 12.0  # what is left is launching
    assert read_table(squares, 0) == 0.0


def test_a_product_and_an_attention_take_what_the_made_up_device_says():
    here = device()
    for rows, inner, outer in ((1, 8, 8), (7, 128, 128), (500, 64, 1024), (5000, 2048, 2048), (40, 8192, 4096)):
        assert here.matmul_ms(rows, inner, outer) == pytest.approx(1e-6 * rows * inner * outer)
    for length, heads, width in ((4, 1, 64), (100, 6, 128), (3000, 2, 96), (64, 2, 256)):
        expected = 1e-6 * heads * length**2 * width
        assert here.attention_ms(length, heads, width, causal=True) == pytest.approx(expected)
        assert here.attention_ms(length, heads, width, causal=False, calls=3) == pytest.approx(3 * expected)


# ---------------------------------------------------------------------- the prediction


@pytest.mark.parametrize("name", ["llava-onevision-0.5b", "qwen2.5-vl-3b", "qwen3-vl-8b"])
def test_the_decoder_and_the_tower_cost_the_products_that_the_flops_model_counts(name):
    """With free attention and free elementwise passes only matrix products are left: half the FLOPs, in ns."""
    known = load_shape(name)
    shape = known.model()
    free = monotone([(1.0, 1e-12)])
    base = device()
    here = Device(
        HERE,
        base.matmul,
        dict.fromkeys(base.attention, free),
        dict.fromkeys(base.elementwise, free),
        free,
        reduction={"holitom": (0.0,) * 4},
    )
    work = Prompt(shape, (Clip(4, known.grid),), 50)
    found = predict(work, here, Scheme(None), work.total)
    text = shape.text

    def products(n: int) -> int:
        # two of the four multiplications per pair of tokens are the attention's scores, two its values
        attention = 4 * n * n * text.heads * text.head_dim
        return (llm_prefill_exact(text, n, logits=0) // text.layers - attention) // 2

    n = work.total + 50
    assert found["prefill"] == pytest.approx(1e-6 * text.layers * products(n), rel=1e-3)
    merged = predict(work, here, Scheme("holitom", layer=3, retain=0.5), 100)
    expected = 3 * products(150) + (text.layers - 3) * products(100) + 50 * 50 * text.width
    assert merged["prefill"] == pytest.approx(1e-6 * expected, rel=1e-3)
    assert merged["vision"] < found["vision"]  # the projector has moved behind the reduction
    half = predict(work, here, Scheme("holitom", left=TowerLeft(0.5)), 100)["vision"]
    patches = math.prod(shape.vision.frame_grid(known.grid)) * 4
    embed = 1e-6 * patches * shape.vision.channels * shape.vision.temporal_patch * shape.vision.patch**2
    embed *= shape.vision.width
    whole = predict(work, here, Scheme("holitom"), 100)["vision"]
    assert half - embed == pytest.approx((whole - embed) / 2, rel=1e-3)


def test_memory_counts_weights_cache_and_the_larger_of_tower_and_decoder():
    shape = load_shape("llava-onevision-7b").model()
    work = Prompt(shape, (Clip(32),), 41, weights=16 * 10**9, element=2)
    full = memory_parts(work, Scheme(None), work.total)
    assert full["cache"] == 28 * 2 * 4 * 128 * 2 * (6272 + 41)
    assert full["weights"] == 16 * 10**9
    merged = memory_parts(work, Scheme("holitom", layer=18, retain=0.5), 600)
    assert merged["cache"] == 2 * 4 * 128 * 2 * (18 * 641 + 10 * 341)
    assert merged["decoder"] < full["decoder"]
    chunked = memory_parts(work, Scheme("holitom", chunk=4), 600)
    assert chunked["tower"] < memory_parts(work, Scheme("holitom"), 600)["tower"]
    for scheme in (Scheme(None), Scheme("holitom", layer=18, retain=0.5)):
        parts = memory_parts(work, scheme, 600)
        peak = parts["weights"] + parts["pixels"] + max(parts["tower"], parts["decoder"] + parts["cache"])
        assert memory_gib(work, scheme, 600) == peak / 2**30
    assert memory_parts(work, Scheme(None), 9, eager=True)["decoder"] > memory_parts(work, Scheme(None), 9)["decoder"]


# ---------------------------------------------------------------------- the solver, against brute force


SHAPE = shape_of(toy_config(quick=True))  # 16 tokens a frame


def random_row(rng: random.Random) -> Row:
    layer, retain = rng.choice([(None, None), (2, 0.5), (1, 0.9), (3, 0.1)])
    scheme = Scheme("holitom", rng.choice(["projector_input", "projector_output"]), layer, retain)
    clips = tuple(Clip(rng.randint(1, 3)) for _ in range(rng.choice([1, 1, 2, 3])))
    rest = rng.randint(1, 60)
    work = Prompt(SHAPE, clips, rest, weights=rng.choice([0, 10**6]))
    here = device(rng.uniform(0.5, 2), prefill=rng.uniform(0, 2))
    return Row(SHAPE.text, tuple(map(work.tokens, clips)), rest, scheme, work, here)


def slow_fits(budget: Budget, row: Row, count: int) -> bool:
    """Every limit on the prompt, straight from what it bounds."""
    text, scheme, total = row.text, row.scheme, sum(row.totals)
    after = None if scheme.retain is None else row.rest + inner_kept(count, scheme.retain)
    flops = llm_prefill_exact(text, row.rest + count, after, scheme.layer)
    if budget.flops is not None:
        share = Fraction(str(budget.flops))
        if flops * share.denominator > share.numerator * llm_prefill_exact(text, row.rest + total):
            return False
    if budget.ttft_ms is not None and sum(predict(row.prompt, row.device, scheme, count).values()) > budget.ttft_ms:
        return False
    return budget.memory_gib is None or memory_gib(row.prompt, scheme, count) <= budget.memory_gib


def random_budget(rng: random.Random, row: Row) -> Budget:
    total = sum(row.totals)
    at = [rng.randint(1, total) for _ in range(2)]
    limits: dict[str, Any] = {
        "retain": rng.uniform(0.01, 1),
        "tokens": rng.randint(1, max(row.totals)),
        "flops": round(rng.uniform(0.3, 1), 3),
        "ttft_ms": row.ttft_ms(at[0]) * rng.uniform(0.97, 1.03),
        "memory_gib": row.memory_gib(at[1]) * rng.uniform(0.97, 1.03),
    }
    names = rng.sample(sorted(limits), rng.randint(1, 4))
    return Budget(**{name: limits[name] for name in names})


def test_the_solver_finds_what_brute_force_finds():
    rng = random.Random(0)  # noqa: S311
    solved = refused = bound = 0
    for _ in range(80):
        row = random_row(rng)
        budget = random_budget(rng, row)
        caps = [budget.cap(n) for n in row.totals]
        good = [k for k in range(len(caps), sum(caps) + 1) if slow_fits(budget, row, k)]
        if not good:
            refused += 1
            with pytest.raises(ImpossibleError, match="budget"):
                share_out(budget, row)
            continue
        found = share_out(budget, row)
        solved += 1
        bound += sum(found) < sum(caps)
        assert sum(found) == max(good)
        assert all(1 <= k <= cap for k, cap in zip(found, caps, strict=True))
    assert min(solved, bound) > 20
    assert refused > 2


def test_costs_never_fall_when_a_token_is_added_except_for_the_whole():
    rng = random.Random(1)  # noqa: S311
    for _ in range(12):
        row = random_row(rng)
        for cost in (row.ttft_ms, row.memory_gib, row.flops):
            values = [cost(k) for k in range(1, sum(row.totals))]
            assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(values))


def test_the_least_that_an_error_names_is_possible_and_nothing_less_is():
    rng = random.Random(2)  # noqa: S311
    for name in ("ttft_ms", "memory_gib", "flops") * 8:
        row = random_row(rng)
        with pytest.raises(ConfigError, match=f"budget.{name}: 1e-07 ") as caught:
            share_out(Budget(**{name: 1e-7}), row)
        text = str(caught.value)
        word = text.split("least is ")[1].split()[0] if name != "flops" else text.rsplit(" ", 1)[1]
        least = float(word)
        assert sum(share_out(Budget(**{name: least}), row)) >= len(row.totals)
        with pytest.raises(ConfigError):
            share_out(Budget(**{name: least * 0.998}), row)
        if name != "flops":
            assert "the vision tower alone takes" in text or "the weights alone take" in text


def test_the_whole_may_fit_where_fewer_do_not():
    """Nothing is merged then, so that it may be cheaper than one token less."""
    rng = random.Random(4)  # noqa: S311
    for _ in range(300):
        whole, most = sorted((rng.randint(1, 30), rng.randint(1, 30)), reverse=True)
        least, up_to, free = rng.randint(1, most), rng.randint(0, 30), rng.random() < 0.5

        def fits(k: int, up_to: int = up_to, free: bool = free, whole: int = whole) -> bool:
            return k <= up_to or (free and k == whole)

        good = [k for k in range(least, most + 1) if fits(k)]
        assert solve.largest(fits, least, most, whole=whole) == (max(good) if good else None)


def test_limits_that_exclude_each_other_say_so(monkeypatch):
    """A time that only the whole video meets, a memory that only one token less meets."""
    row = Row(SHAPE.text, (32,), 5, Scheme("holitom"), Prompt(SHAPE, (Clip(2),), 5), device())
    monkeypatch.setattr(Row, "ttft_ms", lambda self, k: 1.0 if k == 32 else 2.0)
    assert share_out(Budget(ttft_ms=1.5), row) == [32]
    with pytest.raises(ImpossibleError, match=r"no number of tokens meets ttft_ms 1.5 and memory_gib .* together"):
        share_out(Budget(ttft_ms=1.5, memory_gib=row.memory_gib(31)), row)
    with pytest.raises(ImpossibleError, match=r"the least is 2.0 ms, at 1 token"):
        share_out(Budget(ttft_ms=1.5, tokens=31), row)


def test_a_flops_budget_alone_is_the_one_that_was():
    rng = random.Random(3)  # noqa: S311
    for _ in range(40):
        row, share = random_row(rng), round(rng.uniform(0.4, 1), 3)
        ask = {"total_tokens": sum(row.totals), "text_tokens": row.rest, "share": share}
        try:
            most = largest_budget(row.text, inner_layer=row.scheme.layer, inner_retain=row.scheme.retain, **ask)
        except ValueError:
            most = 0
        if most < len(row.totals):
            with pytest.raises(ConfigError, match="the smallest share that fits"):
                share_out(Budget(flops=share), row)
        else:
            assert sum(share_out(Budget(flops=share), row)) == most


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(1e-9, 1e9), st.integers(1, 6))
def test_rounding_up_is_up_and_near(value, digits):
    found = solve.round_up(value, digits)
    assert value <= found <= value * (1 + 10 ** (1 - digits)) * (1 + 1e-9)


# ---------------------------------------------------------------------- plans


def setting(**changes: Any) -> Setting:
    return Setting(**{"shape": SHAPE, "device": device(), "text_tokens": 20, "separators": 1, **changes})


def test_a_plan_reduces_nothing_where_everything_fits():
    choice = plan(setting(), Budget(ttft_ms=1e9, memory_gib=1e6), 4)
    assert choice.config.method == "keep_all"
    assert (choice.entering, choice.total, choice.after_inner) == (64, 64, None)


def test_a_plan_meets_every_limit_and_lets_the_most_tokens_enter():
    here = setting()
    stock = plan(here, Budget(retain=1.0), 6)
    for share in (0.95, 0.8, 0.7, 0.6):
        budget = Budget(ttft_ms=share * stock.ttft_ms, memory_gib=stock.memory_gib)
        try:
            choice = plan(here, budget, 6)
        except ImpossibleError:
            continue
        assert choice.ttft_ms <= budget.ttft_ms
        assert choice.memory_gib <= budget.memory_gib
        assert choice.config.budget == Budget(tokens=choice.entering)
        without = plan(setting(inner=False), budget, 6)
        assert without.config.inner is None
        assert choice.entering >= without.entering
        assert (choice.config.inner is not None) == (choice.entering > without.entering)
        again = holimerge.load_config(choice.config.to_dict())
        assert again == choice.config


def test_a_setting_inside_the_tower_is_taken_only_where_a_milder_one_leaves_too_little():
    encoders = [EncoderSetting({}, TowerLeft(0.5)), EncoderSetting({}, TowerLeft(0.25))]
    here = setting(encoders=encoders)
    stock = plan(here, Budget(retain=1.0), 6)
    mild = plan(here, Budget(ttft_ms=0.8 * stock.ttft_ms), 6)
    assert mild.stages["vision"] == plan(setting(), Budget(ttft_ms=0.8 * stock.ttft_ms), 6).stages["vision"]
    with pytest.raises(ImpossibleError) as error:
        plan(setting(), Budget(ttft_ms=1e-3), 6)
    below = error.value.least * 0.98
    with pytest.raises(ImpossibleError):
        plan(setting(), Budget(ttft_ms=below), 6)
    strong = plan(here, Budget(ttft_ms=below), 6)
    assert strong.stages["vision"] < mild.stages["vision"]
    assert strong.ttft_ms <= below


def test_the_most_frames_that_fit_are_those_of_a_search_by_hand():
    here = setting()
    at = plan(here, Budget(retain=1.0), 4)
    memory = Budget(memory_gib=at.memory_gib)
    for budget in (Budget(ttft_ms=at.ttft_ms), Budget(ttft_ms=at.ttft_ms, retain=0.5), Budget(tokens=20), memory):
        share = budget.retain or 0.1
        fitting = []
        for frames in range(1, 40):
            try:
                choice = plan(here, budget, frames)
            except ImpossibleError:
                continue
            if choice.entering + 0.5 >= share * choice.total:
                fitting.append(frames)
        assert 1 <= len(fitting) < 39
        assert most_frames(here, budget).frames == max(fitting)
    with pytest.raises(ConfigError, match="bound the number of frames"):
        most_frames(here, Budget(flops=0.5))
    with pytest.raises(ImpossibleError, match="the least is"):
        most_frames(here, Budget(ttft_ms=1e-3))


# ---------------------------------------------------------------------- the cache

SMALLEST = tables.CPU._replace(
    edges=(16, 32),
    rows=(1, 8),
    lengths=(4, 8),
    elements=(512, 1024),
    patches=(4,),
    pooled=((1, 4),),
    reduced=((2, 2, 8), (4, 2, 8), (4, 4, 16)),
    spread=1024,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "_KNOWN", {})
    return tmp_path / "holimerge" / "devices"


def test_a_measurement_is_kept_as_json_and_read_back(folder):
    here = device(prefill=1.5)
    assert load_device(HERE) is None
    path = save_device(here)
    assert path == folder / HERE.file == cache_folder() / HERE.file
    assert load_device(HERE) == here
    assert [p.name for p in folder.iterdir()] == [HERE.file]  # nothing is left beside it
    other = Conditions(**{**json.loads(path.read_text())["conditions"], "threads": 2})
    assert other.file != HERE.file
    assert load_device(other) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"conditions": {}}', "other", "negative", "nan", b"\xff"]
)
def test_a_file_that_is_no_measurement_is_a_warning_and_measured_anew(folder, text, monkeypatch):
    path = save_device(device())
    good = json.loads(path.read_text())
    if text == "other":
        text = json.dumps({**good, "conditions": {**good["conditions"], "device": "another"}})
    elif text == "negative":
        text = json.dumps({**good, "received": [[4, -1.0]]})
    elif text == "nan":
        text = json.dumps({**good, "overhead": {"prefill": math.nan}})
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match="measured anew"):
        assert load_device(HERE) is None
    monkeypatch.setattr(calibrate, "conditions_of", lambda *_: HERE)
    monkeypatch.setattr(calibrate, "_measure", lambda *_: device())
    with pytest.warns(UserWarning, match="measured anew"):
        assert calibrate.calibrated() == device()
    assert load_device(HERE) == device()


def test_a_device_is_measured_once_and_again_when_asked(folder, monkeypatch, caplog):
    runs = []

    def measured(_where, _dtype, _key, old, method, _shape):
        runs.append((old is not None, method))
        return device(len(runs))

    monkeypatch.setattr(calibrate, "conditions_of", lambda *_: HERE)
    monkeypatch.setattr(calibrate, "_measure", measured)
    assert calibrate.calibrated() == device(1)
    assert calibrate.calibrated() == device(1)
    assert "measuring a made-up device" in caplog.text
    monkeypatch.setattr(calibrate, "_KNOWN", {})  # another process
    assert calibrate.calibrated() == device(1)
    assert runs == [(False, "holitom")]
    calibrate.calibrated(again=True)
    calibrate.calibrated(method="another")  # only what is missing
    assert runs == [(False, "holitom"), (False, "holitom"), (True, "another")]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "holimerge").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert save_device(device()) is None


def test_measuring_this_machine_gives_usable_tables_and_disturbs_nothing(folder, monkeypatch):
    """At the smallest sizes; a figure is not checked, only that there is one for everything that is asked."""
    monkeypatch.setattr(calibrate, "CPU", SMALLEST)
    monkeypatch.setattr(watch, "PASSES", 1)
    monkeypatch.setattr(watch, "SAMPLE_MS", 0.01)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrate.calibrated()
        assert torch.is_grad_enabled()
    assert torch.rand(1) == expected
    assert Device.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert load_device(found.conditions) == found
    assert {"tower_layer", "decoder_layer", "splice", "inner"} <= set(found.overhead)
    work = Prompt(SHAPE, (Clip(2),), 5)
    stages = predict(work, found, Scheme("holitom", layer=2, retain=0.5), 10)
    assert all(math.isfinite(ms) and ms > 0 for ms in stages.values())


def test_the_fit_of_a_reduction_finds_the_coefficients_and_none_is_negative():
    import numpy as np

    rng = np.random.default_rng(0)
    terms = rng.uniform(1, 100, (8, 4))
    for wanted in ([1, 2, 3, 4], [0, 2, 0, 1], [0, 0, 0, 5]):
        assert tables.positive_fit(terms, terms @ np.array(wanted, float)) == pytest.approx(wanted, abs=1e-6)
    assert min(tables.positive_fit(terms, terms @ np.array([5.0, -0.01, 1, 1]))) >= 0


# ---------------------------------------------------------------------- inside a patched model


@pytest.fixture
def made_up(monkeypatch):
    """Every device is the made-up one."""
    asked: list[Any] = []

    def calibrated(*args: Any, **kwargs: Any) -> Device:
        asked.append((args, kwargs))
        return device(splice=0.1)

    monkeypatch.setattr(calibrate, "calibrated", calibrated)
    return asked


def patches(shape: Any, video: Any) -> tuple[int, int] | None:
    """Rows and columns of patches of a frame, where the resolution is free."""
    rows, columns = video.grid
    return None if shape.vision.side else (rows * shape.vision.merge, columns * shape.vision.merge)


def brute_force(model: Any, x: dict[str, torch.Tensor], videos: Any, budget: Budget, cfg: dict[str, Any]) -> int:
    """The most tokens of a row, from the prompt alone."""
    shape = shape_of(model.config)
    inner = cfg.get("inner") or {}
    scheme = Scheme("holitom", "projector_input", inner.get("layer"), inner.get("retain"))
    clips = tuple(Clip(v.record.frames, patches(shape, v)) for v in videos)
    totals = tuple(v.features for v in videos)
    weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    rest = int(x["attention_mask"].sum()) - sum(totals)
    row = Row(text_shape(model.config), totals, rest, scheme, Prompt(shape, clips, rest, weights), device(splice=0.1))
    return max(k for k in range(len(totals), sum(map(budget.cap, totals)) + 1) if slow_fits(budget, row, k))


@pytest.mark.parametrize("inner", [None, {"layer": 2, "retain": 0.5}])
def test_a_patched_model_keeps_what_brute_force_finds(family, inner, made_up):
    model = make_model(family)
    x = prompt(family)
    cfg: dict[str, Any] = {"method": "holitom", "inner": inner}
    with torch.no_grad():
        holimerge.patch_model(model, {**cfg, "budget": {"retain": 0.5}})
        model(**x)
        videos = holimerge.last_report(model).videos
        assert not made_up  # a budget that needs no times measures none
        kept = set()
        for limits in ({"ttft_ms": 0.65}, {"ttft_ms": 0.8}, {"memory_gib": 0.00095}, {"ttft_ms": 0.9, "flops": 0.6}):
            budget = scaled(model, x, videos, limits, cfg)
            holimerge.patch_model(model, {**cfg, "budget": budget.model_dump(exclude_none=True)})
            model(**x)
            found = sum(v.entering for v in holimerge.last_report(model).videos)
            assert found == brute_force(model, x, videos, budget, cfg)
            kept.add(found)
    assert len(kept) > 1
    assert {args[1] for args, _ in made_up} == {torch.float32}


def scaled(model: Any, x: Any, videos: Any, limits: dict[str, float], cfg: dict[str, Any]) -> Budget:
    """A limit in ms as a share of what the whole prompt takes between one token and all."""
    shape = shape_of(model.config)
    grid = patches(shape, videos[0])
    rest = x["input_ids"].shape[1] - videos[0].features
    weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    work = Prompt(shape, (Clip(videos[0].record.frames, grid),), rest, weights)
    inner = cfg["inner"] or {}
    scheme = Scheme("holitom", "projector_input", inner.get("layer"), inner.get("retain"))
    row = Row(text_shape(model.config), (work.total,), rest, scheme, work, device(splice=0.1))
    found = dict(limits)
    for name, cost in (("ttft_ms", row.ttft_ms), ("memory_gib", row.memory_gib)):
        if name in found:
            low, high = cost(1), cost(work.total - 1)
            share = found[name] if name == "ttft_ms" else 0.5
            found[name] = low + share * (high - low)
    return Budget(**found)


def test_rows_of_a_batch_are_planned_each_by_itself(family, made_up):
    model = make_model(family)
    rows = [[5, make_video(family), 6, 7, 8], [9, make_video(family, seed=1), 10, make_video(family, seed=2), 11]]
    holimerge.patch_model(model, {"method": "holitom", "budget": {"retain": 1.0}})
    with torch.no_grad():
        model.generate(**build(family, rows), max_new_tokens=1)
        (first, *_) = holimerge.last_report(model).videos
        shape = shape_of(model.config)
        grid = patches(shape, first)
        work = Prompt(shape, (Clip(first.record.frames, grid),) * 2, 5)
        row = Row(text_shape(model.config), (first.features,) * 2, 5, Scheme("holitom"), work, device(splice=0.1))
        limit = (row.ttft_ms(2) + row.ttft_ms(work.total - 1)) / 2
        holimerge.patch_model(model, {"method": "holitom", "budget": {"ttft_ms": limit}})
        model.generate(**build(family, rows), max_new_tokens=1)
        together = [v.entering for v in holimerge.last_report(model).videos]
        alone = []
        for one in rows:
            model.generate(**build(family, [one]), max_new_tokens=1)
            alone += [v.entering for v in holimerge.last_report(model).videos]
    assert together == alone
    assert together[0] == first.features  # half the work: everything fits
    assert 1 < together[1] < first.features
    assert abs(together[1] - together[2]) <= 1


def test_an_impossible_time_is_an_error_of_the_configuration(family, made_up):
    model = make_model(family)
    holimerge.patch_model(model, {"method": "holitom", "budget": {"ttft_ms": 1e-6}})
    with torch.no_grad(), pytest.raises(ConfigError, match=r"budget\.ttft_ms: 1e-06 is impossible .* the least is"):
        model(**prompt(family))


def test_a_model_without_a_cost_model_is_refused_when_it_is_patched():
    model = make_model("internvl")
    for name in ("ttft_ms", "memory_gib"):
        cfg = {"method": "holitom", "budget": {name: 5.0}, "treat_images_as_video": False}
        with pytest.raises(ConfigError, match=rf"budget\.{name}: no FLOPs model for 'internvl'.*retain, tokens"):
            holimerge.patch_model(model, cfg)
    assert not hasattr(model, "_holimerge_handle")


def test_the_attention_that_is_measured_is_the_models(monkeypatch):
    assert tables.attention_function("sdpa").__name__ == "sdpa_attention_forward"
    assert tables.attention_function("eager").__name__ == "eager_attention_forward"
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=False)
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    mask = torch.full((1, 1, 5, 5), -math.inf).triu(1)
    eager = tables.attention_function("eager")(module, q, k, v, mask, dropout=0.0, scaling=0.3)[0]
    sdpa = tables.attention_function("sdpa")(module, q, k, v, None, dropout=0.0, scaling=0.3, is_causal=True)[0]
    assert torch.allclose(eager, sdpa, atol=1e-5)


@pytest.mark.parametrize("name", ["llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_settings_inside_the_tower_are_those_whose_work_is_known(name):
    known = SHAPES[name]
    shape = shape_of(build_config(known))
    settings = encoder_settings(shape, known.grid)
    vision = shape.vision
    assert 1 > settings[0].left.share > settings[1].left.share > 0.4
    for setting, keep in zip(settings, (0.75, 0.5), strict=True):
        encoder = load_config({"base": "holimerge-10", **setting.config}).encoder
        assert encoder.tokens.keep == keep
        work = tower_work(vision, encoder, 3, known.grid)
        rows, columns = vision.frame_grid(known.grid)
        assert work.blocks[0][1] == rows * columns
        assert work.blocks[-1][2] == pytest.approx(keep * rows * columns, rel=0.01)
        assert setting.left == tower_left(vision, encoder, known.grid)
        assert setting.left.merging == vision.layers if known.grid is None else setting.left.merging > 0
        assert setting.left.rows == pytest.approx(keep, rel=0.05)
    unknown = load_config("holimerge-10-frames").encoder  # which frames merge depends on the video
    assert tower_left(vision, unknown, known.grid) == tower_left(vision, None, known.grid) == TowerLeft()


def test_a_patched_model_counts_what_its_tower_is_left_to_do():
    model = make_model("llava_onevision")
    shares = []
    for encoder in (None, {"tokens": {"r": 2}}):
        cfg = load_config({"method": "holitom", "budget": {"memory_gib": 10}, "encoder": encoder})
        holimerge.patch_model(model, cfg)
        row = row_of(handle_of(model), [Grid(4, 4, 4)], 10)
        shares.append(row.scheme.left.share)
        assert shares[-1] == tower_left(shape_of(model.config).vision, cfg.encoder, None)[0]
    assert shares[0] == 1 > shares[1]


@pytest.mark.parametrize(
    ("attention", "apart", "batched"),
    [("auto", False, False), ("auto", True, True), ("stock", True, False), ("batched", False, True)],
)
def test_spans_attend_together_where_the_configuration_has_it_so(attention, apart, batched):
    device: Any = SimpleNamespace(apart=apart)  # a GPU's tables are apart from its host's
    assert Scheme(tower_attention=attention).batched(device) == batched
    assert not Scheme(method=None, tower_attention=attention).batched(device)
