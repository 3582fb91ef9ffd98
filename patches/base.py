"""What a model family must say about itself. Everything families share lives here or in `holimerge`, not twice."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holimerge.attention import rotate
from holimerge.encoder.tower import Tower
from holimerge.encoding import Encoded, Grid, Request
from holimerge.tokens import upload


class Family(ABC):
    """A model family; one subclass per file of `patches/`, its instance named FAMILY.

    mrope: whether positions have several axes (then `outer.positions: auto` keeps the original ones).
    framed: whether text may stand between the frames of a video; a token then stays with its frame.
    video_input: whether the model takes videos; if not, frames are handed over as images.
    one_placeholder: whether a video's tokens have the id of an image's (a call then holds either).
    since: the first transformers whose classes are laid out as the family expects.
    no_images: why its images cannot be the frames of a video; empty if they can.
    """

    mrope: bool = False
    framed: bool = False
    video_input: bool = True
    one_placeholder: bool = False
    since: str = "5.16"
    no_images: str = ""

    def core(self, model: Any) -> Any:
        """The module that encodes videos and calls the language model."""
        return model.model

    def language_model(self, model: Any) -> Any:
        """The decoder stack, called with `inputs_embeds`; it has `.layers` and `.config`."""
        return self.core(model).language_model

    def deepstack(self, core: Any) -> int:
        """Decoder layers after which features of the vision tower are added to the hidden states."""
        return 0

    def placeholders(self, core: Any, kind: str, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, L] bool: where placeholders of a kind ("video" or "image") stand, separators included."""
        shared = self.one_placeholder and input_ids is not None
        token: int = getattr(core.config, "image_token_id" if shared else f"{kind}_token_id")
        if input_ids is not None:
            return input_ids == token
        assert inputs_embeds is not None
        embedding = core.get_input_embeddings()
        placeholder = embedding(upload(token, inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def check(self, arguments: dict[str, Any], *, contiguous: bool) -> None:
        """Refuse the arguments of `generate` or a forward that would make a reduction wrong.

        Args:
            arguments: by name.
            contiguous: whether positions will be re-numbered.

        Raises:
            ValueError: with the reason and the way out.
        """
        return

    def no_encoder(self, core: Any, kind: str) -> str:
        """Why the tower cannot reduce inside itself in this way (frames, tokens, gate, or patches for a gate whose unit
        these are); empty if it can."""
        return f"not supported for {core.config.model_type}"

    def graphed(self, core: Any) -> Any:
        """The tower whose calls can be captured as CUDA graphs; None where they wait for the device."""
        return None

    def encoder_tower(self, core: Any, arguments: dict[str, Any], frames: list[int]) -> Tower:
        """What a reduction inside the tower works on.

        Args:
            core: the core module.
            arguments: bound arguments of the function that encodes videos, of one call; maybe empty.
            frames: of each video in them.
        """
        raise NotImplementedError

    @abstractmethod
    def grids(self, core: Any, arguments: dict[str, Any]) -> list[Grid]:
        """One per video (or image, or tile of an image), from the bound arguments of the function that encodes them."""

    def layout(self, core: Any, grid: Grid) -> Tensor | None:
        """What each placeholder of a video stands for, as in `holimerge.placement.Placement`."""
        return None

    def separator(self, core: Any) -> Tensor | None:
        """[D]: what a separator's placeholder holds; None if the model puts it there itself."""
        return None

    def separators(self, core: Any, grid: Grid) -> int:
        """How many of a video's placeholders are separators."""
        layout = self.layout(core, grid)
        return 0 if layout is None else int((layout < 0).sum())

    @abstractmethod
    def encode(
        self, core: Any, features: Callable[..., Any], arguments: dict[str, Any], request: Request
    ) -> list[Encoded]:
        """Run the vision tower; one entry per grid.

        Args:
            core: the core module.
            features: the stock function (`get_video_features` or `get_image_features`).
            arguments: its bound arguments.
            request: what is wanted of it.
        """

    def assemble(self, core: Any, arguments: dict[str, Any], features: list[Tensor]) -> Any:
        """Features per grid, [T N, D] or with their separators, in the stock function's container."""
        return tuple(features)

    def query(self, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries [B, heads, L, d] of a decoder layer's attention. hidden: [B, L, D], its input.

        cos, sin: [B, L, r], or [3, B, L, r] where the axes of a rotary table are not yet joined.
        """
        heads = self._heads(attention.q_proj(hidden), attention)
        return rotated(getattr(attention, "q_norm", _same)(heads).transpose(1, 2), attention, cos, sin)

    def keys(self, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated keys [B, kv_heads, L, d], for where the cache cannot be read."""
        heads = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim))
        return rotated(getattr(attention, "k_norm", _same)(heads).transpose(1, 2), attention, cos, sin)

    def _heads(self, projected: Tensor, attention: Any) -> Tensor:
        """[B, L, heads, d] of what the query projection gives."""
        return projected.unflatten(-1, (-1, attention.head_dim))


def _same(x: Tensor) -> Tensor:
    return x


def rotated(x: Tensor, attention: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as the attention's own model does it. x: [B, heads, L, d]; cos, sin as in `Family.query`."""
    if cos.ndim == x.ndim:  # transformers 5.16 hands three axes to every layer; later versions join them
        sections = attention.rope_parameters["mrope_section"] * 2
        cos, sin = (torch.cat([m[i % 3] for i, m in enumerate(t.split(sections, dim=-1))], dim=-1) for t in (cos, sin))
    stock = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if stock is None:
        return rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))
    result: Tensor = stock(x, x, cos, sin)[0]
    return result
