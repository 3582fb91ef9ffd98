"""Qwen2.5-Omni's thinker: a tower as Qwen2.5-VL's, audio, and a video with its sound: both by turns, by the second.

There are no token types: positions are found from the ids.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from .base import AUDIO, FPS, OUTER_END, OUTER_START, VIDEO, VISION_END, VISION_START, PatchToy

MELS = 8
PER_SECOND, SECONDS = 4, 2  # positions and audio tokens a second; seconds a turn


class Qwen25OmniThinkerToy(PatchToy):
    real = Qwen2_5OmniThinkerForConditionalGeneration
    tower: ClassVar[dict[str, Any]] = {"window_size": 16, "fullatt_block_indexes": [2]}
    text: ClassVar[dict[str, Any]] = {"tie_word_embeddings": False}
    config: ClassVar[dict[str, Any]] = {
        **PatchToy.config,
        "audio_token_id": AUDIO,
        "audio_start_token_id": OUTER_START,
        "audio_end_token_id": OUTER_END,
        "position_id_per_seconds": PER_SECOND,
        "seconds_per_chunk": SECONDS,
    }
    markers = (OUTER_START, OUTER_END)
    stock_fails: ClassVar[dict[str, str]] = {"video at the end": "positions are counted with the marker after it"}

    def towers(self, width: int) -> dict[str, dict[str, Any]]:
        audio = {
            "num_mel_bins": MELS,
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "max_source_positions": 64,
            "n_window": 4,
            "output_dim": width,
        }
        return {**super().towers(width), "audio_config": audio}

    def tensors(self, ids: Tensor, videos: list[Tensor], images: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        inputs = super().tensors(ids, videos, images, dtype)
        del inputs["mm_token_type_ids"]
        if videos:
            inputs["video_second_per_grid"] = torch.tensor([self.temporal / FPS] * len(videos))
        return inputs

    def queries_and_keys(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return attention.q(hidden), attention.k(hidden)

    def original_positions(self, model: Any, x: dict[str, Tensor]) -> Tensor:
        return super().original_positions(model, {**x, "second_per_grids": x["video_second_per_grid"]})

    def with_audio(self, video: Tensor, *, tokens: int = 10, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """A prompt of one row: text, audio of so many tokens, text, the video, text."""
        sound = [OUTER_START, *[AUDIO] * tokens, OUTER_END]
        return self._heard([5, 6, *sound, 7, *self.video_ids(video), 11, 12], video, tokens, dtype)

    def with_sound(self, video: Tensor, *, tokens: int = 10, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """A prompt of one row: text, the video with its sound of so many tokens (`use_audio_in_video`), text."""
        t, h, w = self.grid(video)
        times = [int(step * self.temporal / FPS * PER_SECOND) for step in range(t)]
        ids = [VISION_START, OUTER_START]
        for start in range(0, max(times[-1] + 1, tokens), PER_SECOND * SECONDS):
            turn = range(start, start + PER_SECOND * SECONDS)
            ids += [VIDEO] * (sum(time in turn for time in times) * h * w // 4)
            ids += [AUDIO] * len(range(turn.start, min(turn.stop, tokens)))
        inputs = self._heard([5, 6, 7, *ids, OUTER_END, VISION_END, 11, 12], video, tokens, dtype)
        return {**inputs, "use_audio_in_video": True}

    def _heard(self, row: list[int], video: Tensor, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        ids = torch.tensor([row])
        frames = 4 * tokens  # a convolution and a pooling halve them
        g = torch.Generator().manual_seed(tokens)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **self.tensors(ids, [video], [], dtype),
            "input_features": torch.randn(1, MELS, frames + 6, generator=g).to(dtype),  # padded, as every sound is
            "feature_attention_mask": (torch.arange(frames + 6) < frames).long()[None],
        }


TOY = Qwen25OmniThinkerToy()
