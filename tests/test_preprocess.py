"""Frames to pixels: equal to transformers' processors, right by hand-made oracles, and clear on bad files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from real_processors import run_real

from holimerge.preprocess import (
    Settings,
    default_settings,
    llava_onevision_pixels,
    load_preprocessor,
    qwen2_vl_pixels,
    smart_resize,
)
from holimerge.video import FrameTable, sample_indices, synthetic_clip

# As the published checkpoints have them.
LLAVA_FILE = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}
QWEN_FILE = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SHAPES = [(4, 240, 320), (3, 97, 131), (1, 300, 200), (2, 384, 384), (8, 30, 40), (5, 28, 420)]
RATES = [(300, 30.0, 2.0), (300, 29.97, 2.0), (17, 25.0, 60.0), (5, 10.0, 2.0), (9000, 25.0, 4.0), (101, 24.0, 0.01)]


def frames_like(shape: tuple[int, int, int], noise: bool) -> torch.Tensor:
    if noise:
        return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    return torch.from_numpy(synthetic_clip(shape[0], max(16, shape[1]), max(16, shape[2])))


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def cases() -> dict[str, tuple[Settings, dict[str, Any], torch.Tensor]]:
    """Name -> (our settings, the real processor's arguments, frames)."""
    found = {}
    for shape in SHAPES:
        for noise in (True, False):
            frames = frames_like(shape, noise)
            for family in ("llava_onevision", "qwen2_5_vl"):
                found[f"{family} {shape} {noise}"] = (Settings(family), {"model_type": family}, frames)
    odd = frames_like((3, 100, 75), True)
    small = {"size": {"height": 42, "width": 56}, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    ours = Settings("llava_onevision", size=(42, 56), resample=2, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    found["llava bilinear"] = (ours, {"model_type": "llava_onevision", "settings": small}, odd)
    ours = Settings("qwen2_5_vl", patch_size=8, temporal_patch_size=3, merge_size=3, min_pixels=600, max_pixels=5000)
    theirs = {"patch_size": 8, "temporal_patch_size": 3, "merge_size": 3, "min_pixels": 600, "max_pixels": 5000}
    found["qwen odd sizes"] = (ours, {"model_type": "qwen2_5_vl", "settings": theirs}, odd)
    ours = Settings("qwen2_5_vl", cap_pixels_per_frame=True, max_video_tokens=200, min_pixels=784)
    theirs = {"max_video_tokens": 200, "min_pixels": 784}
    found["qwen capped"] = (
        ours,
        {"model_type": "qwen2_5_vl", "settings": theirs, "cap": True},
        frames_like(SHAPES[0], True),
    )
    return found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Everything this module asks of the real processors, in one subprocess."""
    work = tmp_path_factory.mktemp("real")
    jobs: dict[str, dict[str, Any]] = {
        name: {"kind": "pixels", "frames": frames, **theirs} for name, (_, theirs, frames) in cases().items()
    }
    for name, family, files in FILES:
        folder = write(work / name.replace(" ", "-"), **files)
        jobs[name] = {
            "kind": "pixels",
            "model_type": family,
            "folder": str(folder),
            "frames": frames_like((3, 90, 160), True),
        }
    for total, source_fps, fps in RATES:
        values = {"total": total, "source_fps": source_fps, "fps": fps}
        jobs[f"{total} {source_fps} {fps}"] = {"kind": "indices", "model_type": "qwen2_5_vl", **values}
    return run_real(jobs, work)


FILES = [
    ("llava image file", "llava_onevision", {"preprocessor_config": LLAVA_FILE}),
    ("qwen image file", "qwen2_5_vl", {"preprocessor_config": QWEN_FILE}),
    (
        "qwen video file wins",
        "qwen2_5_vl",
        {
            "preprocessor_config": QWEN_FILE,
            "video_preprocessor_config": QWEN_FILE
            | {"size": {"shortest_edge": 3136, "longest_edge": 20000}}
            | {"min_pixels": None, "max_pixels": None},
        },
    ),
    (
        "nested file wins",
        "llava_onevision",
        {
            "preprocessor_config": LLAVA_FILE,
            "processor_config": {"video_processor": LLAVA_FILE | {"size": {"height": 56, "width": 70}}},
        },
    ),
    (
        "all three files",
        "llava_onevision",
        {
            "preprocessor_config": LLAVA_FILE,
            "video_preprocessor_config": LLAVA_FILE | {"size": {"height": 28, "width": 42}},
            "processor_config": {"video_processor": LLAVA_FILE | {"size": {"height": 56, "width": 70}}},
        },
    ),
    (
        "both spellings of the pixel bounds",
        "qwen2_5_vl",
        {"preprocessor_config": QWEN_FILE | {"max_pixels": 9000, "size": {"shortest_edge": 784, "longest_edge": 5000}}},
    ),
    (
        "plain processor file",
        "llava_onevision",
        {"preprocessor_config": LLAVA_FILE, "processor_config": {"num_image_tokens": 729}},
    ),
]


@pytest.mark.parametrize("name", list(cases()))
def test_pixels_equal_the_real_processor(real: dict[str, dict[str, Any]], name: str) -> None:
    settings, _, frames = cases()[name]
    ours, theirs = settings.pixels(frames), real[name]
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        assert value.shape == theirs[key].shape
        assert (value - theirs[key]).abs().max() <= 1e-6, key


@pytest.mark.parametrize(("name", "family", "files"), FILES)
def test_files_are_read_as_transformers_reads_them(
    real: dict[str, dict[str, Any]], tmp_path: Path, name: str, family: str, files: dict[str, Any]
) -> None:
    settings = load_preprocessor(write(tmp_path / "model", **files), family)
    assert settings.source.endswith(".json")
    ours = settings.pixels(frames_like((3, 90, 160), True))
    for key, value in ours.items():
        assert value.shape == real[name][key].shape
        assert (value - real[name][key]).abs().max() <= 1e-6


@pytest.mark.parametrize(("total", "source_fps", "fps"), RATES)
def test_fps_sampling_equals_the_real_processor(
    real: dict[str, dict[str, Any]], total: int, source_fps: float, fps: float
) -> None:
    seconds = np.arange(total) / source_fps
    table = FrameTable(np.arange(total), np.arange(1), seconds, total / source_fps, source_fps, counted=False)
    ours = sample_indices(table, sampling="fps", fps=fps)
    assert ours.tolist() == real[f"{total} {source_fps} {fps}"]["indices"].tolist()


def test_patches_are_cut_in_the_order_the_model_reads_them() -> None:
    """A slow oracle: every patch located by its frame pair, window and place in the window."""
    t, rows, columns, p, m = 2, 4, 6, 2, 2
    frames = torch.randint(0, 256, (2 * t, rows * p, columns * p, 3), dtype=torch.uint8)
    values, grid = qwen2_vl_pixels(
        frames, patch_size=p, merge_size=m, min_pixels=1, max_pixels=10**6, mean=(0, 0, 0), std=(1, 1, 1), rescale=1.0
    )
    assert grid.tolist() == [[t, rows, columns]]
    expected = []
    for time in range(t):
        for window_row in range(rows // m):
            for window_column in range(columns // m):
                for row in range(window_row * m, window_row * m + m):
                    for column in range(window_column * m, window_column * m + m):
                        pair = frames[2 * time : 2 * time + 2, row * p : row * p + p, column * p : column * p + p]
                        expected.append(pair.permute(3, 0, 1, 2).reshape(-1).float())
    assert torch.equal(values, torch.stack(expected))


def test_an_odd_frame_is_paired_with_itself() -> None:
    frames = frames_like((3, 56, 56), True)
    values, grid = qwen2_vl_pixels(frames, min_pixels=784, max_pixels=10**6)
    longer, _ = qwen2_vl_pixels(torch.cat((frames, frames[-1:])), min_pixels=784, max_pixels=10**6)
    assert grid[0, 0] == 2
    assert torch.equal(values, longer)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (28, 28), (719, 1281), (2160, 3840), (30, 5000), (99, 7)])
@pytest.mark.parametrize("bounds", [(3136, 12845056), (100352, 602112)])
def test_smart_resize_keeps_its_promises(height: int, width: int, bounds: tuple[int, int]) -> None:
    rows, columns = smart_resize(height, width, factor=28, min_pixels=bounds[0], max_pixels=bounds[1])
    assert rows % 28 == 0
    assert columns % 28 == 0
    assert rows * columns <= max(bounds[1], 28 * max(rows, columns))
    assert rows * columns >= bounds[0] or round(height / 28) * round(width / 28) * 784 > bounds[1]
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_resize(1, 201, factor=28, min_pixels=1, max_pixels=100)


def test_llava_pixels_on_a_flat_colour() -> None:
    frames = np.full((2, 50, 70, 3), (0, 51, 255), np.uint8)
    values = llava_onevision_pixels(frames, size=(8, 10), mean=(0.5, 0.2, 0.0), std=(0.5, 1.0, 2.0))
    assert values.shape == (1, 2, 3, 8, 10)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[0, 1, :, 3, 3], torch.tensor([-1.0, 0.0, 0.5]))


def test_torchvision_is_not_used() -> None:
    assert "torchvision" not in sys.modules


def test_defaults_follow_the_config_of_a_toy_model(tmp_path: Path) -> None:
    vision = SimpleNamespace(image_size=42, patch_size=7, temporal_patch_size=2, spatial_merge_size=3)
    config = SimpleNamespace(vision_config=vision)
    assert default_settings("llava_onevision", config).size == (42, 42)
    with pytest.warns(UserWarning, match="no preprocessor file"):
        settings = load_preprocessor(tmp_path, "qwen2_5_vl", config)
    assert (settings.patch_size, settings.merge_size, settings.source) == (7, 3, "defaults")


@pytest.mark.parametrize(
    ("family", "content", "message"),
    [
        ("llava_onevision", LLAVA_FILE | {"do_center_crop": True}, "do_center_crop"),
        ("llava_onevision", LLAVA_FILE | {"do_resize": False}, "do_resize"),
        ("llava_onevision", LLAVA_FILE | {"size": {"shortest_edge": 384}}, "height and width"),
        ("llava_onevision", LLAVA_FILE | {"resample": 1}, "resample 1"),
        ("qwen2_5_vl", QWEN_FILE | {"max_pixels": 3000}, "below min_pixels"),
        ("qwen2_5_vl", QWEN_FILE | {"image_mean": [0.5]}, "three numbers"),
        ("qwen2_5_vl", QWEN_FILE | {"patch_size": 0.5}, "whole numbers"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, family: str, content: Any, message: str) -> None:
    write(tmp_path, preprocessor_config=content)
    with pytest.raises(ValueError, match=message) as error:
        load_preprocessor(tmp_path, family)
    assert "preprocessor_config.json" in str(error.value)


def test_a_hub_model_is_read_from_the_cache_or_refused(tmp_path: Path) -> None:
    cached = tmp_path / "models--a--b"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    write(cached / "snapshots" / "abc", preprocessor_config=LLAVA_FILE)
    hub = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert load_preprocessor("a/b", "llava_onevision", **hub).mean == (0.5, 0.5, 0.5)
    with pytest.raises(OSError, match="a/c"):  # never the defaults of another model
        load_preprocessor("a/c", "llava_onevision", **hub)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="llava_onevision, qwen2_vl, qwen2_5_vl"):
        load_preprocessor(tmp_path, "gpt2")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_preprocessor(tmp_path / "nowhere", "qwen2_5_vl")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_preprocessor(tmp_path, "qwen2_5_vl")
    for bad in (np.zeros((2, 8, 8, 3)), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            Settings("llava_onevision").pixels(bad)
    with pytest.raises(ValueError, match="at least 1"):
        replace(Settings("llava_onevision"), size=(0, 4))
