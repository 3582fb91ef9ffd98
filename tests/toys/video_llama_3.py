"""VideoLLaMA3: one frame a step, its time before it; tokens like those of the frame before are left out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import VideoLlama3ForConditionalGeneration

from .base import FPS, IMAGE, VIDEO, PatchToy, Toy, words


class VideoLlama3Toy(PatchToy):
    real = VideoLlama3ForConditionalGeneration
    text: ClassVar[dict[str, Any]] = {"model_type": "qwen2"}
    sections = None
    mrope = False
    temporal = 1
    # once tokens are left out, "beams" and "samples" fail too: features are repeated by counting placeholders
    stock_fails: ClassVar[dict[str, str]] = {
        "chunked prefill": "the mask of tokens to keep is not cut into chunks",
        "assistant": "a language model does not take the mask of tokens to keep",
    }

    def towers(self, width: int) -> dict[str, dict[str, Any]]:
        vision = {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "patch_size": 4,
        }
        return {"vision_config": vision}

    def kept(self, video: Tensor) -> Tensor:
        """[T, N] bool: tokens of a frame whose pixels differ from those of the frame before, at least one a frame."""
        t, h, w = self.grid(video)
        pixels = self.patches(video).unflatten(0, (t, h * w // 4, 4)).flatten(2)
        differs = (pixels.diff(dim=0).abs().mean(-1) * 255 > 0.1).long()
        kept = torch.cat([differs.new_ones(min(t, 1), h * w // 4), differs])
        kept[kept.sum(1) == 0, 0] = 1
        return kept.bool()

    def video_ids(self, video: Tensor) -> list[int]:
        ids: list[int] = []
        for frame, count in enumerate(self.kept(video).sum(1).tolist()):
            ids += words(f"{',' if frame else ''}Time {frame / FPS:.1f}s:")
            ids += [VIDEO] * count
        return ids

    def image_ids(self, image: Tensor) -> list[int]:
        return [IMAGE] * (image.shape[1] // 4 * image.shape[2] // 4)  # an image's patches are not merged

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        inputs = super().tensors(ids, videos, images, dtype)
        del inputs["mm_token_type_ids"]
        if videos:
            inputs["video_merge_sizes"] = torch.tensor([2] * len(videos))
            inputs["video_compression_mask"] = torch.cat([self.kept(v).flatten() for v in videos])
        if images:
            inputs["pixel_values"] = torch.cat([self.patches(x[None], merge=1) for x in images]).to(dtype)
            inputs["image_merge_sizes"] = torch.tensor([1] * len(images))
        return inputs

    def modules(self, model: Any) -> dict[str, Any]:
        return {"vision": model.model.vision_model, "projector": model.model.projector}

    def last_attention(self, model: Any) -> Any:
        return model.model.vision_model.encoder.layers[-1].self_attn

    def queries_and_keys(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return attention.q_proj(hidden), attention.k_proj(hidden)

    def original_positions(self, model: Any, x: dict[str, Tensor]) -> Tensor:
        return Toy.original_positions(self, model, x)

    def make_projector_linear(self, model: Any) -> None:
        model.model.projector.readout[1] = torch.nn.Identity()


TOY = VideoLlama3Toy()
