"""What a model family must say about itself. Everything families share lives in `holimerge`, not here twice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holimerge.attention import rotate
from holimerge.tokens import MergeRecord, VideoTokens


@dataclass
class Encoded:
    """One video after the vision tower.

    tokens: what the reduction decides on.
    everything: () -> [T N, D], all tokens through the stock projector on the stock tensor.
    merged: (record) -> [K, D], the kept tokens, projected.
    """

    tokens: VideoTokens
    everything: Callable[[], Tensor]
    merged: Callable[[MergeRecord], Tensor]


class Family(ABC):
    """A model family; one subclass per file of `patches/`, its instance named FAMILY.

    mrope: whether positions have several axes (then `outer.positions: auto` keeps the original ones).
    separators: placeholder tokens of a video that are none of its own tokens (a newline), after them.
    """

    mrope: bool = False
    separators: int = 0

    def core(self, model: Any) -> Any:
        """The module that encodes videos and calls the language model."""
        return model.model

    def language_model(self, model: Any) -> Any:
        """The decoder stack, called with `inputs_embeds`; it has `.layers` and `.config`."""
        return self.core(model).language_model

    def video_mask(self, core: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, L] bool: where video placeholders stand (separators included)."""
        token: int = core.config.video_token_id
        if input_ids is not None:
            return input_ids == token
        assert inputs_embeds is not None
        embedding = core.get_input_embeddings()
        placeholder = embedding(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    @abstractmethod
    def grids(self, core: Any, arguments: dict[str, Any]) -> list[tuple[int, int, int]]:
        """(T, rows, columns) of each video's tokens as the LLM would see them, from `get_video_features`' arguments."""

    @abstractmethod
    def encode(
        self,
        core: Any,
        features: Callable[..., Any],
        arguments: dict[str, Any],
        *,
        at: str,
        scored: bool,
        chunk: int | None,
    ) -> list[Encoded]:
        """Run the vision tower.

        Args:
            core: the core module.
            features: the stock `get_video_features`.
            arguments: its bound arguments.
            at: "projector_input" or "projector_output".
            scored: whether received attention is needed.
            chunk: frames per call of the tower; None for one stock call.
        """

    @abstractmethod
    def assemble(self, core: Any, features: list[Tensor]) -> Any:
        """Per-video features [T N, D] in the container the stock `get_video_features` returns them in."""

    def query(self, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries of one token per row.

        Args:
            attention: the decoder layer's attention module.
            hidden: [B, D], its input at those tokens.
            cos, sin: [B, d] (or [3, B, d] where rotary sections are not yet interleaved).

        Returns:
            [B, heads, d].
        """
        return self._rotated(attention.q_proj(hidden), attention, cos, sin)

    def keys(self, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated keys [B, kv_heads, L, d], where the cache cannot be read. hidden: [B, L, D]; cos, sin: [B, L, d]."""
        return self._rotated(attention.k_proj(hidden), attention, cos, sin).transpose(1, 2)

    def _rotated(self, projected: Tensor, attention: Any, cos: Tensor, sin: Tensor) -> Tensor:
        heads = projected.unflatten(-1, (-1, attention.head_dim))
        return rotate(heads, cos.unsqueeze(-2), sin.unsqueeze(-2))
