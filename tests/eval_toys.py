"""A checkpoint, videos and questions small enough to evaluate in a test, on disk as a user's are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import toys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from holimerge.eval.tasks.base import Extracted, Loaded, Prompt, Sample, Task
from holimerge.inputs import DEFAULT_TEMPLATES
from holimerge.preprocess import LLAVA
from holimerge.video import synthetic_clip, write_video

_TEXT = "user assistant system what moves here first then which one is it red blue green round small left right"
WORDS = _TEXT.split()


def letter_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words as tokens; most of what a random model can write begins with a letter of an option."""
    video, image = ("<video>", "<image>") if family in LLAVA else ("<|video_pad|>", "<|image_pad|>")
    names = {0: "<pad>", 1: "<unk>", 2: "<|im_start|>", 3: "<|im_end|>", toys.VIDEO: video, toys.IMAGE: image}
    names |= {toys.VISION_START: "<|vision_start|>", toys.VISION_END: "<|vision_end|>"}
    free = [i for i in range(toys.TEXT["vocab_size"]) if i not in names]
    letters = ["ABCD"[i % 4] + str(i) for i in range(len(free) - len(WORDS))]
    vocabulary = {name: i for i, name in names.items()} | dict(zip([*WORDS, *letters], free, strict=True))
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
    extra = [name for name in names.values() if name not in special.values()]
    return PreTrainedTokenizerFast(tokenizer_object=raw, extra_special_tokens=extra, **special)


def save_checkpoint(family: str, folder: Path) -> str:
    """A toy model with the files a published checkpoint has."""
    toys.make_model(family, gain=3.0).save_pretrained(folder)
    letter_tokenizer(family).save_pretrained(folder)
    if family in LLAVA:
        values: dict[str, Any] = {"size": {"height": 28, "width": 28}, "resample": 3}
        values |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    else:
        values = {"min_pixels": 16 * 16, "max_pixels": 24 * 32, "patch_size": 4}
        values |= {"temporal_patch_size": 2, "merge_size": 2}
    (folder / "chat_template.jinja").write_text(DEFAULT_TEMPLATES[family])
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return str(folder)


QUESTIONS = ("what moves here", "which one is first", "is it red then blue", "what is small")
OPTIONS = ("red", "blue round", "left one", "green")


def save_data(folder: Path, videos: int = 4, questions: int = 3, broken: Sequence[int] = ()) -> str:
    """A data set for the task `custom`; questions of one video do not stand together. Videos in `broken` are no videos.

    The third video has fewer frames than the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for v in range(videos):
        path = folder / f"clip{v}.mp4"
        if v in broken:
            path.write_bytes(b"no video at all")
        else:
            write_video(path, synthetic_clip(5 if v == 2 else 12, 32, 48, seed=v), fps=4)
    lines = []
    for q in range(questions):
        for v in range(videos):
            row = {"id": f"v{v}-q{q}", "video": f"clip{v}.mp4", "question": QUESTIONS[q], "options": list(OPTIONS)}
            lines.append(row | {"answer": (v + q) % 4, "category": ("kind", "sort")[q % 2]})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def toy_samples(folder: str) -> list[Sample]:
    """The samples of `save_data`."""
    rows = [json.loads(line) for line in (Path(folder) / "questions.jsonl").read_text().splitlines()]
    return [
        Sample(
            id=row["id"],
            video=Path(folder) / row["video"],
            video_id=row["video"],
            question=row["question"],
            options=tuple(row["options"]),
            answer=row["answer"],
            category=row["category"],
            groups={"duration": "short" if row["video"] < "clip2" else "long"},
        )
        for row in rows
    ]


def first_letter(raw: str, sample: Sample, protocol: str, seed: int) -> Extracted:
    """The first letter of an option in the answer."""
    return Extracted(next(("ABCD".index(c) for c in raw if c in "ABCD"), None))


def share_correct(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A headline."""
    return {"score": 100 * sum(r["correct"] for r in records) / len(records)}


def toy_task(samples: Sequence[Sample], **changes: Any) -> Task:
    """A task with these samples, answered by generation."""
    values: dict[str, Any] = {
        "name": "toy",
        "load": lambda root: Loaded(samples, "revision 1", "here"),
        "prompt": lambda sample, protocol, seconds: Prompt(sample.question),
        "extract": first_letter,
        "headline": share_correct,
        "homepage": "nowhere",
        "max_new_tokens": {"official": 4},
        "protocols": ("official", "other"),
    }
    return Task(**{**values, **changes})


def timeless(value: Any) -> Any:
    """Records or results without what differs from run to run: times, memory, what was paid, machine."""
    if isinstance(value, dict):
        gone = ("ms", "peak_memory_bytes", "conditions", "reused", "batch")
        return {k: timeless(v) for k, v in value.items() if k not in gone}
    return [timeless(v) for v in value] if isinstance(value, list) else value
