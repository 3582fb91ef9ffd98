"""Reductions inside the vision tower of patched models, on real Hugging Face classes at toy size."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from patching import batch_rows, check_cached, check_rows, generate, handle_of, logits, patch
from towers import encoded, frames_by_hand, patches_by_hand, tokens_by_hand, tower_of, windows_of
from toys import FAMILIES, SOME, TOYS, build, make_model, make_video, prompt

import holimerge
from holimerge.encoder.frame_run import FrameRun
from holimerge.encoder.token_run import TokenRun
from holimerge.patches._llava import pixels_by_patch

ENCODING = [name for name in FAMILIES if not TOYS[name].as_images]
MERGING = ["llava_onevision", "llava_next_video", "qwen2_vl", "qwen3_vl", "glm4v", "qwen2_5_vl", "qwen2_5_omni_thinker"]
MERGING = [name for name in MERGING if name in TOYS]
RULE: dict[str, Any] = {"similarity": 0.1, "longest": 6, "merge": -1.0}
KINDS: dict[str, dict[str, Any]] = {
    "gate": {"gate": {"threshold": 0.02, "changed": 0.6}},
    "frames": {"frames": {"layers": [1], **RULE}},
    "tokens": {"tokens": {"r": 2}},
    "patches": {"gate": {"unit": "patch", "threshold": 0.05, "changed": 0.5}},
}

PATCHES: list[dict[str, Any]] = [{"gate": {"unit": "patch"}}, {"gate": {"unit": "patch", "changed": 0.0}}]


def config(options: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    return {"base": "holimerge-25", "inner": None, "encoder": options, **changes}


def refuses(model: Any, kind: str) -> str:
    return str(handle_family(model).no_encoder(model.model, kind))


def handle_family(model: Any) -> Any:
    return holimerge.registry.family_module(model.config.model_type).FAMILY


def make(family: str, **kwargs: Any) -> Any:
    model = make_model(family, **kwargs)
    if family == "llava_next_video":
        model.config.vision_feature_layer = -1  # all three layers make the features
    return model


def assert_same(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    """Features of every level, and scores, agree."""
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a.levels, b.levels, strict=True):
            torch.testing.assert_close(mine.tokens, other.tokens, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(a.tokens.features, b.tokens.features, atol=tolerance, rtol=tolerance)
        if b.tokens.scores is not None:
            torch.testing.assert_close(a.tokens.scores, b.tokens.scores, atol=tolerance / 10, rtol=0)


def two_videos(family: str, frames: int = 16) -> dict[str, torch.Tensor]:
    """Two videos in a prompt, of different lengths and sizes where the family takes them."""
    if TOYS[family].equal_frames:
        rows = [5, make_video(family, frames=frames), 6, make_video(family, frames=frames, seed=1), 7]
    else:
        wide = make_video(family, frames=frames + 4, seed=1, side=(16, 48))
        rows = [5, make_video(family, frames=frames), 6, wide, 7]
    return build(family, [rows])


# ------------------------------------------------------------------------------- the same as by hand, with every row


@pytest.mark.parametrize("family", ENCODING)
def test_merging_frames_gives_what_a_full_tower_gives_of_equal_frames(family: str) -> None:
    attn = "sdpa" if ENCODING.index(family) % 2 else "eager"
    model, x = make(family, attn=attn), two_videos(family)
    layers = [1, 2]
    with frames_by_hand(model, x, layers, **RULE) as left:
        expected, _ = encoded(model, x, None)
    ours, report = encoded(model, x, {"frames": {"layers": layers, **RULE}})
    assert report.frames == left
    assert sum(left) < sum(len(e.tokens.features) for e in ours) - 2
    assert report.rows[0] == report.total > report.rows[1] > report.rows[2]
    assert_same(ours, expected)


@pytest.mark.parametrize("family", MERGING)
def test_merging_tokens_gives_what_a_full_tower_gives_of_equal_tokens(family: str, attn: str) -> None:
    model, x = make(family, attn=attn), two_videos(family, frames=3 if TOYS[family].equal_frames else 2)
    for layers in (None, [1]):
        with tokens_by_hand(model, x, [0, 1, 2] if layers is None else layers, 2):
            expected, _ = encoded(model, x, None)
        ours, report = encoded(model, x, {"tokens": {"layers": layers, "r": 2}})
        assert report.rows[2] < report.total
        assert_same(ours, expected)


@pytest.mark.parametrize("family", ENCODING)
def test_frames_that_did_not_change_are_not_encoded_and_give_what_they_would(family: str) -> None:
    model = make(family)
    video = make_video(family, frames=6)
    still = video[[0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 4, 4]]
    x = build(family, [[5, still, 6]])
    expected, _ = encoded(model, x, None)
    ours, report = encoded(model, x, {"gate": {}})
    assert report.frames == [4]  # two frames a step in some: no step mixes two of these
    assert report.share == pytest.approx(4 / len(ours[0].tokens.features))
    # equal up to the rounding of matrix products of other sizes
    assert_same(ours, expected, 2e-6)
    chunked, _ = encoded(model, x, {"gate": {}}, chunk=2)
    assert_same(chunked, expected, 2e-6)
    by_patch, report = encoded(model, x, {"gate": {"unit": "patch"}})
    assert (report.frames, report.rows) == ([4], [4 * report.total // len(ours[0].tokens.features)] * 3)
    assert_same(by_patch, ours, 0.0)
    assert encoded(model, build(family, [[5, still[:4], 6]]), {"gate": {"unit": "patch"}})[1].frames == [1]


@pytest.mark.parametrize("family", ENCODING)
def test_places_that_changed_are_encoded_alone_and_others_take_their_features_from_where_they_were(family: str) -> None:
    attn = "sdpa" if ENCODING.index(family) % 2 else "eager"
    model, x = make(family, attn=attn), two_videos(family, frames=12)
    for threshold, changed in ((0.05, 0.5), (0.0115, 0.5), (0.0115, 0.95), (0.5, 0.2)):
        with patches_by_hand(model, x, threshold, changed) as left:
            expected, _ = encoded(model, x, None)
        gate = {"unit": "patch", "threshold": threshold, "changed": changed}
        ours, report = encoded(model, x, {"gate": gate})
        assert any(any(frame) and not all(frame) for frame in left)
        tower = tower_of(model, x)
        rows = sum(map(sum, left))
        if tower.batched:  # whole lots of a frame's rows; the free ones count, as they run
            assert rows <= report.rows[0] < report.total
            assert report.rows[0] % tower.videos[0][1] == 0
        else:
            assert report.rows == [rows] * 3
        at = iter(left)
        assert report.frames == [sum(any(next(at)) for _ in range(t)) for t, _ in tower.videos]
        assert_same(ours, expected)
        for chunk in (1, 3, 5):
            chunked, in_parts = encoded(model, x, {"gate": gate}, chunk=chunk)
            assert_same(chunked, expected)
            assert in_parts.frames == report.frames
        batched, _ = encoded(model, x, {"gate": gate}, attention="batched")  # spans of many lengths, as on a GPU
        assert_same(batched, expected)
        late, _ = encoded(model, x, {"gate": gate}, at="projector_output")
        with patches_by_hand(model, x, threshold, changed):
            expected, _ = encoded(model, x, None, at="projector_output")
        assert_same(late, expected)


@pytest.mark.parametrize("family", MERGING)
def test_a_share_of_the_tokens_is_left_where_equal_parts_of_the_rest_merged(family: str) -> None:
    model, x = make(family), two_videos(family)
    tower, windows = tower_of(model, x), windows_of(model, x)
    totals = [p // tower.unit for p in windows]
    for layers, keep in ((None, 0.4), ([0, 2], 0.3), ([1], 0.75), ([1], 0.1)):
        blocks = [0, 1, 2] if layers is None else layers
        left, expected = totals, []
        for block in range(3):
            expected.append(sum(left) * tower.unit)
            if block in blocks:
                wanted = [round(n - n * (1 - keep) * (blocks.index(block) + 1) / len(blocks)) for n in totals]
                left = [max(w, n - (n - tower.fixed) // 2) for w, n in zip(wanted, left, strict=True)]
        _, report = encoded(model, x, {"tokens": {"layers": layers, "keep": keep}})
        assert report.rows == expected
    if len(set(totals)) == 1 and totals[0] >= 12:  # equal parts of 2: the same as r
        ours, _ = encoded(model, x, {"tokens": {"keep": 1 - 6 / totals[0]}})
        by_count, _ = encoded(model, x, {"tokens": {"r": 2}})
        assert_same(ours, by_count, 0.0)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_tokens_may_merge_in_chunks_of_frames(family: str) -> None:
    model, x = make(family), two_videos(family, frames=8)
    whole, report = encoded(model, x, KINDS["tokens"])
    parts, in_parts = encoded(model, x, KINDS["tokens"], chunk=3)
    assert_same(parts, whole, 2e-6)
    assert (in_parts.rows, in_parts.total) == (report.rows, report.total)


# ---------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("family", ENCODING)
def test_with_nothing_to_merge_every_bit_is_that_of_no_reduction_in_the_tower(family: str) -> None:
    # half of the families in each type: what could differ is shared code
    dtype = torch.bfloat16 if ENCODING.index(family) % 2 else torch.float32
    model = make(family, dtype=dtype)
    x = build(family, batch_rows(family)[0], dtype=dtype)
    patch(model, config(None))
    plain, answer = logits(model, x), generate(model, x, 2)
    assert holimerge.last_report(model).encoders == []
    nothing: list[tuple[str, dict[str, Any]]] = [
        ("gate", {}),
        ("gate", {"unit": "patch"}),
        ("frames", {"layers": [1], "similarity": 1.0}),
        ("tokens", {"r": 0}),
        ("tokens", {"keep": 1.0}),
    ]
    for kind, options in nothing:
        if refuses(model, kind):
            continue
        patch(model, config({kind: options}))
        assert torch.equal(logits(model, x), plain)
        assert holimerge.last_report(model).encoders[0].share == 1.0
        # what did merge leaves nothing behind
        patch(model, config(KINDS[kind]))
        logits(model, x)
    patch(model, config(None))
    assert torch.equal(logits(model, x), plain)
    assert torch.equal(generate(model, x, 2).sequences, answer.sequences)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("kind", KINDS)
def test_the_outer_budget_holds_and_generation_equals_recomputation(family: str, kind: str) -> None:
    model = make(family)
    if TOYS[family].as_images or refuses(model, kind):
        pytest.skip("refused: see test_what_a_tower_cannot_do_is_refused")
    x = two_videos(family, frames=12)
    patch(model, config(KINDS[kind]))
    check_cached(model, family, x)
    report = holimerge.last_report(model)
    assert report.encoders[0].share < 1
    for video in report.videos:
        assert video.entering == max(1, int(video.features * 0.25 + 0.5))
    assert report.to_dict()["encoders"][0]["rows"] == report.encoders[0].rows


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_do_not_see_each_other(family: str, kind: str) -> None:
    model = make(family)
    rows = batch_rows(family)[0]
    patch(model, config(KINDS[kind]))
    out = generate(model, build(family, rows), 3)
    check_rows(model, family, rows, out, handle_of(model).selection)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_both_places_of_the_outer_reduction(kind: str, family: str) -> None:
    model = make(family, dtype=torch.bfloat16)
    if refuses(model, kind):
        pytest.skip(refuses(model, kind))
    x = prompt(family, frames=20, dtype=torch.bfloat16)
    for at in ("projector_input", "projector_output"):
        patch(model, config(KINDS[kind], outer={"at": at}))
        assert torch.isfinite(logits(model, x)).all()
        assert torch.equal(logits(model, x), logits(model, x))
        assert holimerge.last_report(model).encoders[0].share < 1


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])  # stock Qwen2.5-VL counts on the default device
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_host_counts_on_the_host_whatever_the_default_device_is(family: str, kind: str | None) -> None:
    model, x = make(family), prompt(family, frames=12)
    patch(model, config(None if kind is None else KINDS[kind]))
    expected = logits(model, x)
    with torch.device("meta"):
        assert torch.equal(logits(model, x), expected)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({}, "encoder: exactly one of frames, tokens, gate is needed; got none"),
        (
            {"gate": {}, "tokens": {"r": 1}},
            "encoder: exactly one of frames, tokens, gate is needed; got tokens and gate",
        ),
        ({"gates": {}}, "encoder.gates: unknown key; did you mean 'gate'? Valid: frames, tokens, gate"),
        ({"gate": {"treshold": 0.0}}, "encoder.gate.treshold: unknown key; did you mean 'threshold'?"),
        ({"gate": {"threshold": -0.1}}, "encoder.gate.threshold: -0.1 is not valid"),
        ({"gate": {"changed": 1.0}}, "encoder.gate.changed: 1.0 is not valid"),
        ({"gate": {"unit": "patches"}}, "encoder.gate.unit: 'patches' is not valid; did you mean 'patch'?"),
        ({"frames": {}}, "encoder.frames.layers: missing"),
        ({"frames": {"layers": []}}, "encoder.frames.layers: []: a list of layers is needed"),
        ({"frames": {"layers": 3}}, "encoder.frames.layers: 3: a list of layers is needed"),
        ({"frames": {"layers": [2, 0]}}, "encoder.frames.layers: [2, 0]: 0 is no layer; valid: an index of at least 1"),
        ({"frames": {"layers": [1.0]}}, "1.0 is no layer"),
        ({"frames": {"layers": [True]}}, "True is no layer"),
        ({"frames": {"layers": [1], "similarity": 0.0}}, "encoder.frames.similarity: 0.0 is not valid"),
        ({"frames": {"layers": [1], "longest": 0}}, "encoder.frames.longest: 0 is not valid"),
        ({"frames": {"layers": None}}, "encoder.frames.layers: None: a list of layers is needed"),
        ({"tokens": {"layers": [-1], "r": 1}}, "-1 is no layer; valid: an index of at least 0"),
        ({"tokens": {"r": -1}}, "encoder.tokens.r: -1 is not valid"),
        ({"tokens": {}}, "encoder.tokens: exactly one of r, keep is needed; got none"),
        ({"tokens": {"r": 1, "keep": 0.5}}, "encoder.tokens: exactly one of r, keep is needed; got both"),
        ({"tokens": {"keep": 0.0}}, "encoder.tokens.keep: 0.0 is not valid"),
    ],
)
def test_a_wrong_encoder_block_is_named_by_its_key(encoder: Any, message: str) -> None:
    with pytest.raises(holimerge.ConfigError, match=re.escape(message)):
        holimerge.load_config(config(encoder))


def test_what_an_encoder_block_does_not_go_with_is_refused() -> None:
    with pytest.raises(holimerge.ConfigError, match="encoder: method keep_all makes the stock call of the tower"):
        holimerge.load_config({"method": "keep_all", "encoder": {"gate": {}}})
    with pytest.raises(
        holimerge.ConfigError, match=r"chunk_frames: encoder\.frames compares the frames of a whole video"
    ):
        holimerge.load_config(config({"frames": {"layers": [1]}}, chunk_frames=4))
    with pytest.raises(holimerge.ConfigError, match="treat_images_as_video encodes every frame as an image"):
        holimerge.load_config(config({"gate": {}}, treat_images_as_video=True))


def test_an_encoder_block_survives_yaml_and_another_kind_replaces_a_presets(tmp_path: Any) -> None:
    for options in (
        {"frames": {"layers": [1, 0.5], "merge": 0.5}},
        {"tokens": {"r": 3}},
        {"gate": {"changed": 0.1}},
        *PATCHES,
    ):
        cfg = holimerge.load_config(config(options))
        assert holimerge.load_config(cfg.to_dict()) == cfg
        (tmp_path / "c.yaml").write_text(cfg.to_yaml())
        assert holimerge.load_config(tmp_path / "c.yaml") == cfg


@pytest.mark.parametrize("family", ENCODING)
def test_what_a_tower_cannot_do_is_refused(family: str) -> None:
    model = make(family)
    for kind, options in KINDS.items():
        if refuses(model, kind):
            with pytest.raises(holimerge.ConfigError, match=re.escape(f"encoder.{kind}: {refuses(model, kind)}")):
                patch(model, config(options))
    assert not refuses(model, "gate")
    assert not refuses(model, "frames")
    with pytest.raises(holimerge.ConfigError, match=r"encoder.frames.layers: 3 is not a block .* valid: 1 to 2"):
        patch(model, config({"frames": {"layers": [3]}}))
    assert "_holimerge_handle" not in model.__dict__


@pytest.mark.parametrize(
    ("kind", "reason"), [("tokens", "tokens: .*takes no sizes"), ("patches", "gate: .*takes no mask")]
)
def test_merged_tokens_and_parts_of_frames_need_an_attention_that_takes_a_bias(kind: str, reason: str) -> None:
    model = make("llava_onevision")
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(holimerge.ConfigError, match=rf"encoder.{reason}.*'sdpa' or 'eager'"):
        patch(model, config(KINDS[kind]))
    patch(model, config(KINDS["gate"]))


def test_patches_of_a_frame_that_they_do_not_fill() -> None:
    frame = torch.arange(3 * 9 * 14.0).view(3, 9, 14)
    found = pixels_by_patch(frame, 4)
    expected = [frame[:, y : y + 4, x : x + 4].flatten() for y in (0, 4) for x in (0, 4, 8)]
    assert torch.equal(found, torch.stack(expected))


def test_gradient_checkpointing_of_the_tower_in_training_is_refused() -> None:
    model = make("qwen2_vl")
    model.gradient_checkpointing_enable()
    x = prompt("qwen2_vl", frames=12)
    patch(model, config(KINDS["frames"]))
    logits(model, x)
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**x)


@pytest.mark.parametrize("family", ["llava_onevision", "smolvlm"])
def test_blocks_get_rows_side_by_side_though_the_stock_embedding_transposes_them(family: str) -> None:
    if family not in TOYS:
        pytest.skip("not in this transformers")
    model, seen = make(family), []
    blocks = next(m for name, m in model.named_modules() if name.endswith(("encoder.layers", "encoder.layer")))
    blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    x = build(family, batch_rows(family)[0])
    logits(model, x)
    patch(model, config(None))
    logits(model, x)
    assert seen == [False, True]


@pytest.mark.parametrize("kind", ["frames", "tokens"])
def test_only_the_hidden_states_that_are_read_get_their_rows_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("llava_onevision"), two_videos("llava_onevision")
    ours, _ = encoded(model, x, KINDS[kind])
    restored = {"frames": FrameRun, "tokens": TokenRun}[kind].restored
    seen: list[int] = []
    monkeypatch.setattr(
        {"frames": FrameRun, "tokens": TokenRun}[kind],
        "restored",
        lambda self, hidden, block: (seen.append(block), restored(self, hidden, block))[1],
    )
    again, _ = encoded(model, x, KINDS[kind])
    assert seen == [2]  # what the last of three blocks returned
    assert_same(again, ours, 0.0)
