"""A patched model inside transformers' `pipeline`, with real processors, on the path of a video file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from around import settings
from eval_toys import save_checkpoint
from real_pipeline import run_pipelines
from toys import FAMILIES, TOYS

from holimerge.inputs import DEFAULT_TEMPLATES
from holimerge.video import synthetic_clip, write_video

# what a published checkpoint's processor_config.json says beside the files that save_checkpoint writes
PROCESSORS = {"llava_onevision": {"num_image_tokens": 49, "vision_feature_select_strategy": "full"}}


def test_a_pipeline_answers_as_its_parts_do(tmp_path: Path) -> None:
    """One process for all families: it is its imports that take the time."""
    video = tmp_path / "clip.mp4"
    write_video(video, synthetic_clip(8, 32, 48), fps=4)
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": "what moves here"}]
    checkpoints: dict[str, dict[str, Any]] = {}
    families = [
        family for family in FAMILIES if family in DEFAULT_TEMPLATES and family != "llava_video"
    ]  # no processor
    for family in families:
        (tmp_path / family).mkdir()
        folder = save_checkpoint(family, tmp_path / family)
        (tmp_path / family / "processor_config.json").write_text(json.dumps(PROCESSORS.get(family, {})))
        checkpoints[folder] = {"keep-all": {"base": "keep-all", **TOYS[family].extra}, **settings(family)}
    job = {"chat": [{"role": "user", "content": content}], "checkpoints": checkpoints}
    said = run_pipelines(job, tmp_path)
    assert len(said) == len(families) > 0
    for folder, answers in said.items():
        assert answers["stock"]
        assert answers["unpatched"] == answers["stock"]
        assert answers["keep-all"]["pipeline"][0] == answers["stock"]
        for name in checkpoints[folder]:
            assert answers[name]["pipeline"] == answers[name]["by hand"]
        kept = {name: answers[name]["pipeline"][1][0] for name in checkpoints[folder]}
        assert kept["keep-all"]["entering"] == kept["keep-all"]["features"] == 4 * kept["outer"]["entering"]
        assert answers["outer"]["pipeline"][0] != answers["stock"]
        if "inner" in kept:
            assert kept["inner"]["after_inner"] < kept["inner"]["entering"]
