"""`treat_images_as_video`: the images of a prompt are the frames of a video, on request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_laws import generate, handle_of, logits, recomputed
from toys import FAMILIES, TOYS, build, make_model, make_pixels, make_video

import holimerge
from holimerge.placement import frames_among_images
from holimerge.registry import family_module

CAN = [name for name in FAMILIES if not family_module(name).FAMILY.no_images]
CANNOT = [name for name in FAMILIES if name not in CAN]
BOTH = [name for name in CAN if "image and video" not in TOYS[name].stock_fails and not TOYS[name].as_images]


def config(inner: int | None = None, **changes: Any) -> dict[str, Any]:
    cfg: dict[str, Any] = {"base": "holimerge-25", "treat_images_as_video": True, "inner": None, **changes}
    if inner is not None:
        cfg["inner"] = {"layer": inner, "retain": 0.5}
    return cfg


def pictures(family: str, count: int = 5, seed: int = 0) -> list[Any]:
    """Text and images in turn, as a prompt of several images has them."""
    height, width = TOYS[family].frame_size or (24, 32)
    frames = make_pixels(count, height, width, seed)
    return [part for i, frame in enumerate(frames) for part in (10 + i, ("image", frame))]


def check_cached(model: Any, family: str, x: dict[str, torch.Tensor]) -> None:
    out = generate(model, x, 3)
    steps = recomputed(model, family, x, out.sequences[:, x["input_ids"].shape[1] :], handle_of(model).selection)
    for ours, fresh in zip(out.logits, steps, strict=True):
        torch.testing.assert_close(ours, fresh, atol=5e-4, rtol=0)


@pytest.mark.parametrize("family", [f for f in CAN if not TOYS[f].as_images])
def test_images_stay_images_unless_asked_for(family):
    model = make_model(family)
    x = build(family, [[5, *pictures(family), 6, 7]])
    plain = logits(model, x)
    holimerge.patch_model(model, {"base": "holimerge-25", "inner": None})
    assert torch.equal(logits(model, x), plain)
    assert holimerge.last_report(model).videos == []
    holimerge.patch_model(model, {"method": "keep_all", "treat_images_as_video": True})
    assert torch.equal(logits(model, x), plain)
    holimerge.patch_model(model, config())
    assert not torch.equal(logits(model, x), plain)


@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
@pytest.mark.parametrize("family", [f for f in CAN if not TOYS[f].as_images])
def test_several_images_are_reduced_as_one_video(family, inner):
    toy = TOYS[family]
    model = make_model(family)
    layer = toy.inner_layers[0] if inner else None
    holimerge.patch_model(model, config(layer))
    rows = [
        [5, *pictures(family), 6, 7],
        [8, *pictures(family, 1, seed=3), 9, 10],
        [11, *pictures(family, 3, seed=2), 12],
    ]
    x = build(family, rows)
    check_cached(model, family, x)
    first, third = holimerge.last_report(model).videos  # an image alone is no video
    per_image = first.grid[0] * first.grid[1]
    assert (first.features, third.features) == (5 * per_image, 3 * per_image)
    assert first.entering == round(5 * per_image * 0.25 + 1e-9)
    selection = handle_of(model).selection
    for row, videos in ((0, [0]), (1, []), (2, [1])):
        with handle_of(model).replaying(selection.of(videos, [row])):
            alone = logits(model, build(family, [rows[row]]))
        with handle_of(model).replaying(selection):
            together = logits(model, x)
        torch.testing.assert_close(together[row, -1], alone[0, -1], atol=5e-4, rtol=0)


@pytest.mark.parametrize("family", BOTH)
def test_images_and_a_video_in_one_prompt_are_two_videos(family):
    toy = TOYS[family]
    model = make_model(family)
    layer = toy.inner_layers[0] if toy.inner_layers else None
    holimerge.patch_model(model, config(layer))
    images = pictures(family, 4)
    x = build(family, [[5, *images[:4], make_video(family), *images[4:], 6, 7]])
    check_cached(model, family, x)
    videos = holimerge.last_report(model).videos
    assert len(videos) == 2
    if layer is not None:
        lengths = {int(v.inner_kept.shape[0]) for v in videos if v.inner_kept is not None}
        assert lengths == {v.entering for v in videos}
        assert sum(v.after_inner or 0 for v in videos) == round(sum(v.entering for v in videos) * 0.5)
    beams = generate(model, x, 3, num_beams=2) if "beams" not in toy.stock_fails else None
    assert beams is None or beams.sequences.shape[0] == 1


@pytest.mark.parametrize("family", [f for f in CAN if not TOYS[f].as_images and TOYS[f].frame_size is None])
def test_images_of_unequal_size_are_refused(family):
    model = make_model(family)
    holimerge.patch_model(model, config())
    small = ("image", make_pixels(1, 16, 16, 0)[0])
    with pytest.raises(ValueError, match=r"treat_images_as_video.*one size.* \d x \d, \d x \d"):
        logits(model, build(family, [[5, *pictures(family, 2), 6, small, 7]]))
    x = build(family, [[5, *pictures(family, 2), 6, 7]])
    assert torch.isfinite(logits(model, x)).all()


@pytest.mark.parametrize("family", CANNOT)
def test_families_whose_images_are_tiles_refuse_by_name(family):
    with pytest.raises(holimerge.ConfigError, match=rf"treat_images_as_video: {family}: .*pixel_values_videos"):
        holimerge.patch_model(make_model(family), config())


@pytest.mark.parametrize("family", [f for f in FAMILIES if TOYS[f].as_images])
def test_families_without_a_video_input_ask_for_it(family):
    model = make_model(family)
    with pytest.raises(holimerge.ConfigError, match=rf"treat_images_as_video: {family} .*set it to true"):
        holimerge.patch_model(model, "holimerge-25")
    assert "_holimerge_handle" not in model.__dict__
    holimerge.patch_model(model, "keep-all")


def test_frames_are_found_by_their_runs():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]]).bool()
    found = frames_among_images(mask, [(1, 1, 2)] * 5)  # the run of four is an image of two tiles
    assert found.videos == [[0, 3]]
    assert found.inside == [[True] * 2 + [False] * 4 + [True] * 2, [False] * 2]
    assert found.within(mask).int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1], [0] * 11]
    with pytest.raises(ValueError, match="10 image placeholders, its images make 12 tokens"):
        frames_among_images(mask, [(1, 1, 2)] * 6)
    with pytest.raises(ValueError, match="no whole image"):
        frames_among_images(mask, [(1, 1, 5)] * 2)
