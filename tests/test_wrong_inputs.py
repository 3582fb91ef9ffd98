"""What was wrong once with odd inputs, one test each: a clear error that names what is wrong, or the right result."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hostile import Case, Clip, inputs, sizes_of_videos
from patching import check_cached, generate, handle_of, logits, patch, preset
from toys import SOME, TOYS, build, make_model, make_video

import holimerge
from holimerge.call import videos_by_row
from holimerge.methods.holitom import HolitomOptions, reduce
from holimerge.segment import pair_cosines, unchanged
from holimerge.tokens import Target, VideoTokens

PAIR = ((2, Clip(), 2), (3, Clip(seed=1), 1))


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def patched(family: str, name: str = "holimerge-25", **kwargs: Any) -> Any:
    return patch(make_model(family), {**preset(name, inner=False), **kwargs})


# ------------------------------------------------------------------------------------------------------ clear errors


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_video_without_a_frame_is_refused_by_number(family: str, chunk: int | None) -> None:
    model, x = patched(family, chunk_frames=chunk), inputs(family, Case(rows=PAIR, fault="empty"))
    words = "pixel_values is empty" if TOYS[family].as_images else "pixel_values_videos: video 0 of 2 has no tokens"
    for run in (logits, generate):
        with pytest.raises(ValueError, match=words):
            run(model, x)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llama_3"])
def test_an_empty_video_beside_a_whole_one_is_refused_by_number(family: str) -> None:
    model, x = patched(family), inputs(family, Case(rows=PAIR, fault="one empty"))
    with pytest.raises(ValueError, match=r"video 1 of 2 has no tokens \(frames x rows x columns: 0 x 2 x 2\)"):
        logits(model, x)


@pytest.mark.parametrize("family", [name for name in SOME if "video_grid_thw" in sizes_of_videos(name)])
def test_missing_sizes_are_named(family: str) -> None:
    model, x = patched(family), inputs(family, Case(rows=PAIR, fault="no sizes"))
    for run in (logits, generate):
        with pytest.raises(ValueError, match=r"video_grid_thw .*is missing; .*pixel_values_videos"):
            run(model, x)


@pytest.mark.parametrize("inner", [False, True])
def test_placeholders_in_the_wrong_row_are_named_with_their_numbers(inner: bool) -> None:
    model = patch(make_model("llava_onevision"), preset("holimerge-25", inner))
    x = inputs("llava_onevision", Case(rows=((2,), (2, Clip(), 2)), fault="moved"))
    words = (
        r"row 0 of the prompt has 1 video placeholders, its videos make 33 tokens \(placeholders of all rows: 1, 32;"
    )
    for run in (logits, generate):
        with pytest.raises(ValueError, match=words):
            run(model, x)


def test_rows_hold_whole_videos() -> None:
    assert videos_by_row([5, 0, 7], [2, 3, 7]) == [[0, 1], [], [2]]
    for held in ([4, 8], [5, 1, 6], [13]):
        with pytest.raises(ValueError, match=r"row \d of the prompt has \d+ video placeholders"):
            videos_by_row(held, [2, 3, 7])


# --------------------------------------------------------------------------------------------- not a number, infinite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", ["projector_input", "projector_output"])
def test_a_video_that_is_not_finite_is_refused_and_spares_the_next_call(family: str, at: str, value: float) -> None:
    model = patched(family, outer={"at": at})
    good = build(family, [[5, make_video(family), 6, 7]])
    before = logits(model, good)
    video = make_video(family)
    video[1, 0, 3, 3] = value
    bad = build(family, [[5, video, 6, 7]])
    for run in (logits, generate):
        with pytest.raises(ValueError, match="not finite"):
            run(model, bad)
    assert torch.equal(logits(model, good), before)


def test_where_nothing_is_reduced_such_a_video_gives_what_the_stock_model_gives(family: str) -> None:
    model, video = make_model(family), make_video(family)
    video[1, 0, 3, 3] = torch.nan
    x = build(family, [[5, video, 6, 7]])
    stock = logits(model, x)
    assert stock.isnan().any()
    patch(model, "keep-all")
    torch.testing.assert_close(logits(model, x), stock, equal_nan=True, atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------------ right results


@pytest.mark.parametrize("inner", [False, True])
def test_columns_before_the_first_kept_one_do_not_depend_on_the_batch(inner: bool) -> None:
    """A prompt that begins with its video; its first columns are gone and show the first token that is there."""
    family = "llava_onevision"
    model = patch(make_model(family), {**preset("holimerge-25", inner), "budget": {"tokens": 1}})
    short = [make_video(family, seed=3), 6, 7]
    x, alone = build(family, [short, [*range(5, 11), make_video(family, seed=1), 6, 7]]), build(family, [short])
    together = logits(model, x)[0, x["attention_mask"][0].bool()]
    mine = handle_of(model).selection.of([0], [0])
    assert mine.outer[0].slots[0] > 0
    with handle_of(model).replaying(mine):
        single = logits(model, alone)[0]
    torch.testing.assert_close(together, single, atol=5e-4, rtol=0)
    assert torch.equal(together[0], together[int(mine.outer[0].slots[0])])


def test_an_image_alone_is_not_reported_as_the_video_before_it() -> None:
    family = "internvl"
    model = patched(family)
    generate(model, build(family, [[5, make_video(family), 6, 7]]))
    assert len(holimerge.last_report(model).videos) == 1
    generate(model, build(family, [[5, ("image", make_video(family, frames=1)[0]), 6, 7]]))
    assert holimerge.last_report(model).videos == []


def test_no_picture_at_all_is_refused_not_indexed() -> None:
    x = inputs("smolvlm", Case(rows=PAIR, fault="empty"))
    with pytest.raises(ValueError, match="pixel_values is empty"):
        logits(patched("smolvlm"), x)


def test_pictures_without_a_pixel_mask_may_come_in_chunks() -> None:
    x = inputs("smolvlm", Case(rows=PAIR, fault="no sizes"))
    assert "pixel_attention_mask" not in x
    in_chunks, at_once = (logits(patched("smolvlm", chunk_frames=chunk), x) for chunk in (1, None))
    torch.testing.assert_close(in_chunks, at_once, atol=5e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------- equal tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 32, 896, 3584])
def test_with_similarity_one_equal_tokens_and_no_others_are_unchanged(dtype: torch.dtype, width: int) -> None:
    g = torch.Generator().manual_seed(width)
    still = (torch.randn(1, 64, width, generator=g, dtype=torch.float64) + 1).to(dtype).expand(4, -1, -1).contiguous()
    cosine, _ = pair_cosines(still)
    assert cosine.max() <= 1
    assert unchanged(cosine, 1.0).all()
    if width > 1:  # one number has one direction
        other = still.clone()
        other[2] += 0.05 * torch.randn(64, width, generator=g).to(dtype)
        assert unchanged(pair_cosines(other)[0], 1.0).sum(1).tolist() == [64, 0, 0]


def test_with_similarity_one_a_still_video_is_one_frame_as_the_oracle_says() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(1, 12, 8)), 6, axis=0)
    x[4:, :5] = rng.normal(size=(5, 8))
    scores = rng.random((6, 12))
    expected = oracle.reduce_video(x, scores, keep=20, exact=True, tau=1.0)
    tokens = VideoTokens(torch.from_numpy(x).float(), torch.from_numpy(scores).float())
    record = reduce(tokens, Target(20, 20 / 72), HolitomOptions(similarity=1.0))
    assert record.temporal == expected.removed == 12 * 3 + 12 * 1  # four frames, then two
    assert record.anchor.tolist() == [token.anchor for token in expected.kept]


@pytest.mark.parametrize("family", ["glm4v", "qwen3_vl"])
def test_an_answer_goes_on_where_a_video_ended_whose_last_frame_is_gone(family):
    # black frames: nothing of the last one stays, and the prompt ends with its placeholders
    model = make_model(family)
    holimerge.patch_model(model, {"base": "holitom-05", "inner": None})
    video = torch.zeros_like(make_video(family, frames=4))
    x = TOYS[family].only_placeholders_at_the_end(build(family, [[5, 6, video]]))
    check_cached(model, family, x, 4)
    last = holimerge.last_report(model).videos[0].record
    assert last.kept_per_frame()[-1] == 0
