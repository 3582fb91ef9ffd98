"""A user's whole way in transformers: AutoProcessor, `pipeline`, a chat with the path of a video. Run as a script only.

Real processors need torchvision, which stands beside a CPU torch only in a process of its own (see real_processors.py):
`python real_pipeline.py TORCHVISION JOB` writes, by checkpoint, what every way said.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from real_processors import _define_operators, torchvision_folder

TOKENS = {"max_new_tokens": 6, "do_sample": False}


def run_pipelines(job: dict[str, Any], work: Path) -> dict[str, dict[str, Any]]:
    """Run `main` in a subprocess. job: "chat", and "checkpoints": {folder: its configurations by name}."""
    (work / "job.json").write_text(json.dumps(job))
    command = [sys.executable, __file__, str(torchvision_folder()), str(work / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((work / "results.json").read_text())


def _read_with_pyav() -> None:
    """transformers' PyAV reader in place of torchcodec's, which does not stand beside a CPU torch either."""
    from transformers import video_processing_utils, video_utils

    def fetch(self: Any, where: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(where, list):
            return list(zip(*(fetch(self, one, sample_indices_fn) for one in where), strict=True))
        return video_utils.load_video(where, backend="pyav", sample_indices_fn=sample_indices_fn)

    video_processing_utils.BaseVideoProcessor.fetch_videos = fetch  # type: ignore[method-assign]


def _answers(checkpoint: str, configs: dict[str, Any], chat: list[dict[str, Any]]) -> dict[str, Any]:
    from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

    import holimerge

    def told(model: Any) -> list[dict[str, Any]]:
        return holimerge.last_report(model).to_dict()["videos"]

    pipe = pipeline("any-to-any", model=checkpoint)

    def ask() -> str:
        answer = pipe(text=chat, return_full_text=False, generate_kwargs=dict(TOKENS))
        return answer[0]["generated_text"].strip()

    said: dict[str, Any] = {"stock": ask()}
    for name, cfg in configs.items():
        holimerge.patch_model(pipe.model, cfg)
        said[name] = {"pipeline": (ask(), told(pipe.model))}
    holimerge.unpatch_model(pipe.model)
    said["unpatched"] = ask()

    model = AutoModelForMultimodalLM.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **settings)
    for name, cfg in configs.items():
        holimerge.patch_model(model, cfg)
        answer = model.generate(**inputs, **TOKENS)[:, inputs["input_ids"].shape[1] :]
        said[name]["by hand"] = processor.batch_decode(answer, skip_special_tokens=True)[0].strip(), told(model)
    return said


def main(folder: str, job: str) -> None:
    library = _define_operators(folder)  # kept alive until the end
    sys.path.insert(0, folder)
    _read_with_pyav()
    given = json.loads(Path(job).read_text())
    results = {name: _answers(name, configs, given["chat"]) for name, configs in given["checkpoints"].items()}
    Path(job).with_name("results.json").write_text(json.dumps(results))
    del library


if __name__ == "__main__":
    main(*sys.argv[1:])
