"""transformers' real video processors beside a CPU build of torch, for comparison only.

They need torchvision, whose wheel does not load with another build of torch: its C++ operators are missing, and naming
them is enough for what the processors use. So torchvision goes into a folder of its own, and this file, run as a
script, is the only process that sees that folder: `python real_processors.py FOLDER JOBS RESULTS`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

Jobs = dict[str, dict[str, Any]]


def torchvision_folder() -> Path:
    """Install torchvision (without its dependencies) into a cached folder; skip the test where pip cannot."""
    import pytest
    from filelock import FileLock

    major, minor, patch = re.match(r"(\d+)\.(\d+)\.(\d+)", torch.__version__).groups()  # type: ignore[union-attr]
    if major != "2":
        pytest.skip(f"do not know which torchvision belongs to torch {torch.__version__}")
    wanted = f"torchvision==0.{int(minor) + 15}.{patch}"
    home = Path(__file__).resolve().parent.parent / ".venv"
    if not (home / "bin").is_dir() or not os.access(home, os.W_OK):
        home = Path(tempfile.gettempdir()) / f"holimerge-{os.getuid()}"
    home.mkdir(exist_ok=True, parents=True)
    folder = home / "torchvision-for-tests" / wanted
    with FileLock(str(home / "torchvision-for-tests.lock")):
        if not (folder / "torchvision").is_dir():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), wanted]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=180)
            except subprocess.TimeoutExpired:
                pytest.skip(f"pip install {wanted} took longer than 180 s")
            if done.returncode:
                pytest.skip(f"pip cannot install {wanted}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return folder


def run_real(jobs: Jobs, workdir: Path) -> dict[str, dict[str, Any]]:
    """Run jobs with the real processors in a subprocess. Returns their outputs by job name."""
    folder = torchvision_folder()
    torch.save(jobs, workdir / "jobs.pt")
    command = [sys.executable, __file__, str(folder), str(workdir / "jobs.pt"), str(workdir / "results.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(workdir / "results.pt", weights_only=True)


def _define_operators(folder: str) -> Any:
    source = (Path(folder) / "torchvision" / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', source))):
        library.define(f"{name}() -> ()")
    return library


def _video_processor(job: dict[str, Any]) -> Any:
    from transformers import LlavaOnevisionVideoProcessor, Qwen2VLVideoProcessor

    cls = LlavaOnevisionVideoProcessor if job["model_type"] == "llava_onevision" else Qwen2VLVideoProcessor
    fixed = {} if job["model_type"] == "llava_onevision" else {"cap_pixels_per_frame": job.get("cap", False)}
    if "folder" in job:
        return cls.from_pretrained(job["folder"], **fixed)
    return cls(**job.get("settings", {}), **fixed)


def _pixels(job: dict[str, Any]) -> dict[str, Any]:
    out = _video_processor(job)(videos=[job["frames"].numpy()], return_tensors="pt", do_sample_frames=False)
    return {key: value for key, value in out.items() if isinstance(value, torch.Tensor)}


def _indices(job: dict[str, Any]) -> dict[str, Any]:
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=job["total"], fps=job["source_fps"])
    return {"indices": _video_processor(job).sample_frames(metadata, fps=job["fps"]).long()}


def _inputs(job: dict[str, Any]) -> dict[str, Any]:
    import transformers as hf
    from transformers.video_utils import VideoMetadata

    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(job["tokenizer"])
    if job["model_type"] == "llava_onevision":
        processor: Any = hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(),
            tokenizer,
            _video_processor(job),
            num_image_tokens=job["patches_per_frame"],
            vision_feature_select_strategy="full",
            chat_template=job["chat_template"],
        )
    else:
        processor = hf.Qwen2_5_VLProcessor(
            hf.Qwen2VLImageProcessor(), tokenizer, _video_processor(job), chat_template=job["chat_template"]
        )
    texts = []
    for question, count in job["questions"]:
        content = [{"type": "video"}] * count + [{"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    videos = [frames.numpy() for frames in job["frames"]] or None
    metadata = [
        VideoMetadata(total_num_frames=total, fps=fps, frames_indices=indices) for total, fps, indices in job["clocks"]
    ]
    extra = {"video_metadata": metadata, "do_sample_frames": False} if videos else {}
    out = processor(text=texts, videos=videos, padding=True, padding_side="left", return_tensors="pt", **extra)
    return {key: value for key, value in out.items() if isinstance(value, torch.Tensor)}


def main(folder: str, jobs: str, results: str) -> None:
    library = _define_operators(folder)  # kept alive until the end
    sys.path.insert(0, folder)
    kinds = {"pixels": _pixels, "indices": _indices, "inputs": _inputs}
    loaded = torch.load(jobs, weights_only=True)
    torch.save({name: kinds[job["kind"]](job) for name, job in loaded.items()}, results)
    del library


if __name__ == "__main__":
    main(*sys.argv[1:])
