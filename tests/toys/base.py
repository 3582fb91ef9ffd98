"""What a family's toy must say: a tiny model of the real class with random weights, and prompts for it.

A text token is an id of 5 to 89. The markers of all families and what a prompt is made of live here; a toy's own file
says only what is its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

VIDEO, IMAGE, PAD, VISION_START, VISION_END, AUDIO = 90, 91, 0, 92, 93, 94
OUTER_START, OUTER_END = 4, 95  # a second pair: around a whole video, or around audio
FPS = 2  # frames a second, where a prompt tells the time
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 4096,
}


def words(text: str) -> list[int]:
    """An id of 5 to 89 for each word, digit and sign: what a processor writes around frames."""
    return [5 + sum(map(ord, part)) % 85 for part in re.findall(r" ?[A-Za-z]+|\S", text)]


class Toy(ABC):
    """One family.

    extra: keys every configuration needs for this family (`treat_images_as_video` where frames are images).
    inner_layers: decoder layers of a toy that an inner merge may sit at; empty where it is refused.
    mrope: whether its positions have three axes, which the model works out from token types and grids.
    frame_size: (height, width) of its frames, None where any multiple of 8 will do.
    as_images: whether frames are handed over as images (there is no video input).
    markers: ids that a model must not write, beside those that all families know.
    stock_fails: what the stock class itself cannot do with a video, and why: "image and video" in one call, "beams",
        "samples" (several of one prompt), "static cache", "prompt lookup", "chunked prefill", "video at the end".
    """

    extra: ClassVar[dict[str, Any]] = {}
    inner_layers: ClassVar[tuple[int, ...]] = (1, 2, 3)
    mrope: ClassVar[bool] = False
    frame_size: ClassVar[tuple[int, int] | None] = None
    as_images: ClassVar[bool] = False
    markers: ClassVar[tuple[int, ...]] = ()
    stock_fails: ClassVar[dict[str, str]] = {}

    @property
    def placeholder(self) -> int:
        """The id that stands for a token of a video."""
        return IMAGE if self.as_images else VIDEO

    @abstractmethod
    def model(self, attn: str, **text: Any) -> Any:
        """The real class at toy size; `text` overrides keys of its text configuration (see TEXT)."""

    @abstractmethod
    def video_ids(self, video: Tensor) -> list[int]:
        """The ids a video [T, 3, H, W] takes in a prompt: placeholders, and the markers or timestamps around them."""

    @abstractmethod
    def image_ids(self, image: Tensor) -> list[int]:
        """The same for an image [3, H, W]."""

    @abstractmethod
    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """What the model takes beside ids [B, L] and mask: pixels, grids, token types."""

    @abstractmethod
    def modules(self, model: Any) -> dict[str, Any]:
        """The modules "vision" (the tower) and "projector" (what makes its output the LLM's tokens)."""

    @abstractmethod
    def make_projector_linear(self, model: Any) -> None:
        """Take activation and norms out of the projector, in place."""

    def language_model(self, model: Any) -> Any:
        return model.model.language_model

    def embed_dim(self, model: Any) -> int:
        return int(model.get_input_embeddings().weight.shape[1])

    def extended(self, x: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
        """The prompt with `new` [B, t] text tokens at its end, as a call without a cache takes it."""
        y = dict(x)
        y["input_ids"] = torch.cat([x["input_ids"], new], 1)
        y["attention_mask"] = torch.cat([x["attention_mask"], torch.ones_like(new)], 1)
        if "mm_token_type_ids" in x:
            y["mm_token_type_ids"] = torch.cat([x["mm_token_type_ids"], torch.zeros_like(new).int()], 1)
        return self.positioned(y)

    def positioned(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prompt with the positions `generate` would use, where the stock model counts padding too."""
        if self.mrope:
            return x
        return {**x, "position_ids": (x["attention_mask"].cumsum(1) - 1).clamp_min(0)}

    def only_placeholders_at_the_end(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """A prompt of one row that ends with its video, without the markers after the last placeholder."""
        end = int((x["input_ids"][0] == self.placeholder).nonzero()[-1]) + 1
        cut = ("input_ids", "attention_mask", "mm_token_type_ids")
        return {k: v[:, :end] if k in cut else v for k, v in x.items()}


class PatchToy(Toy):
    """Families whose towers take flat patches and grids: patches of 4 x 4 pixels, two frames a step, 2 x 2 merged.

    Whatever is not said otherwise is as in Qwen2.5-VL.

    real: the class of the model.
    tower, text, config: what the configurations of tower, decoder and model have beside what all have.
    sections: rotary frequencies of each axis of its positions, None where there is one axis.
    temporal: frames a step.
    """

    real: ClassVar[Any]
    tower: ClassVar[dict[str, Any]] = {}
    text: ClassVar[dict[str, Any]] = {}
    config: ClassVar[dict[str, Any]] = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    sections: ClassVar[list[int] | None] = [1, 1, 2]
    temporal: ClassVar[int] = 2
    mrope = True

    def model(self, attn: str, **text: Any) -> Any:
        merged = {**TEXT, **self.text, **text}
        if self.sections:
            rope = {"rope_type": "default", "mrope_section": self.sections, "rope_theta": 10000.0}
            merged["rope_parameters"] = {**rope, **merged.get("rope_parameters", {})}
        config = self.real.config_class(
            **self.towers(merged["hidden_size"]),
            text_config=merged,
            video_token_id=VIDEO,
            image_token_id=IMAGE,
            tie_word_embeddings=False,
            **self.config,
        )
        return self.real._from_config(config, attn_implementation=attn)

    def towers(self, width: int) -> dict[str, dict[str, Any]]:
        """Configurations of what stands before an LLM of this width."""
        vision = {
            "hidden_size": 32,
            "depth": 3,
            "num_heads": 4,
            "intermediate_size": 40,
            "out_hidden_size": width,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": self.temporal,
        }
        return {"vision_config": {**vision, **self.tower}}

    def grid(self, video: Tensor) -> list[int]:
        t, _, h, w = video.shape
        return [t // self.temporal, h // 4, w // 4]

    def patches(self, video: Tensor, merge: int = 2) -> Tensor:
        """[t h w, 3 * temporal * 16] as the processor lays them out: merge window by merge window."""
        t, h, w = self.grid(video)
        x = video.contiguous().view(t, self.temporal, 3, h // merge, merge, 4, w // merge, merge, 4)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)

    def video_ids(self, video: Tensor) -> list[int]:
        t, h, w = self.grid(video)
        return [VISION_START, *[VIDEO] * (t * h * w // 4), VISION_END]

    def image_ids(self, image: Tensor) -> list[int]:
        return [VISION_START, *[IMAGE] * (image.shape[1] // 8 * image.shape[2] // 8), VISION_END]

    def token_types(self, ids: Tensor) -> Tensor:
        """0 for text, 1 for an image's tokens, 2 for a video's."""
        return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        inputs: dict[str, Any] = {"mm_token_type_ids": self.token_types(ids)}
        if videos:
            inputs["pixel_values_videos"] = torch.cat([self.patches(v) for v in videos]).to(dtype)
            inputs["video_grid_thw"] = torch.tensor([self.grid(v) for v in videos])
        if images:
            repeated = [x.expand(self.temporal, -1, -1, -1) for x in images]
            inputs["pixel_values"] = torch.cat([self.patches(x) for x in repeated]).to(dtype)
            inputs["image_grid_thw"] = torch.tensor([self.grid(x) for x in repeated])
        return inputs

    def modules(self, model: Any) -> dict[str, Any]:
        visual = model.model.visual
        return {"vision": visual, "projector": visual.merger}

    def make_projector_linear(self, model: Any) -> None:
        merger = model.model.visual.merger
        merger.mlp[1] = torch.nn.Identity()
        merger.ln_q = torch.nn.Identity()
