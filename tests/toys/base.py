"""What a family's toy must say: a tiny model of the real class with random weights, and prompts for it.

A text token is an id of 5 to 89. The markers of all families and what a prompt is made of live here; a toy's own file
says only what is its own.
"""

from __future__ import annotations

import inspect
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import oracle
import torch
import transformers
from packaging.version import Version
from torch import Tensor

HERE = Version(transformers.__version__)
VIDEO, IMAGE, PAD, VISION_START, VISION_END, AUDIO = 90, 91, 0, 92, 93, 94
OUTER_START, OUTER_END = 4, 95  # a second pair: around a whole video, or around audio
FPS = 2  # frames a second, where a prompt tells the time
MODES = (
    "image and video",
    "beams",
    "samples",
    "static cache",
    "prompt lookup",
    "chunked prefill",
    "video at the end",
    "assistant",
    "quantized cache",
    "offloaded cache",
    "embeds",
)
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
    positions, orders: the values of `outer.positions` and `outer.order` that it takes, the usual one first.
    mrope: whether its positions have three axes, which the model works out from token types and grids.
    frame_size: (height, width) of its frames, None where any multiple of 8 will do.
    equal_frames: whether all videos of a call must have the same number of frames.
    as_images: whether frames are handed over as images (there is no video input).
    recurrent: whether some decoder layers keep a state instead of tokens.
    markers: ids that a model must not write, beside those that all families know.
    one_video_a_row: whether all frames of a row make one video, whatever stands between them.
    images_are_frames: whether an image cannot be told from a frame, so that it is reduced as one.
    stock_fails: what the stock class itself cannot do with a video (MODES), with the reason.
    not_by_hand: why `test_reference` cannot build its decoder layer by layer; empty where it does.
    """

    extra: ClassVar[dict[str, Any]] = {}
    inner_layers: ClassVar[tuple[int, ...]] = (1, 2, 3)
    positions: ClassVar[tuple[str, ...]] = ("contiguous", "original")
    orders: ClassVar[tuple[str, ...]] = ("raster", "segment")
    mrope: ClassVar[bool] = False
    frame_size: ClassVar[tuple[int, int] | None] = None
    equal_frames: ClassVar[bool] = False
    as_images: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False
    markers: ClassVar[tuple[int, ...]] = ()
    one_video_a_row: ClassVar[bool] = False
    images_are_frames: ClassVar[bool] = False
    stock_fails: ClassVar[dict[str, str]] = {}
    not_by_hand: ClassVar[str] = ""

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

    @property
    def placeholder(self) -> int:
        """The id that stands for one token of a video."""
        return IMAGE if self.as_images else VIDEO

    def videos(self, row: list[Any]) -> int:
        """How many videos a row (as `build` takes it) holds in the family's eyes."""
        count = sum(isinstance(part, Tensor) or (self.images_are_frames and isinstance(part, tuple)) for part in row)
        return min(count, 1) if self.one_video_a_row else count

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

    # ------------------------------------------- a prompt with one video, by hand: stock modules and eager weights only

    def features(self, model: Any, x: dict[str, Tensor]) -> list[Tensor]:
        """[T N, D] each: what the stock model makes of the video, then what deepstack adds after layers 0, 1, ..."""
        raise NotImplementedError

    def received(self, model: Any, x: dict[str, Tensor]) -> np.ndarray:
        """[T, N]: the attention that each of these tokens receives in the tower."""
        raise NotImplementedError

    def separators(self, model: Any) -> Tensor:
        """[S, D]: what stands at the video's placeholders after those of its tokens."""
        return torch.empty(0, self.embed_dim(model))

    def original_positions(self, model: Any, x: dict[str, Tensor]) -> Tensor:
        """[1, L], or [3, 1, L] where positions have three axes: the stock model's positions of the prompt."""
        return torch.arange(x["input_ids"].shape[1])[None]


def eager_weights(attention: torch.nn.Module, run: Callable[[], Any]) -> Tensor:
    """[T, heads, queries, keys]: the weights that a module of eager attention returned while `run` ran."""
    maps: list[Tensor] = []
    hook = attention.register_forward_hook(lambda _module, _args, out: maps.append(out[1]))
    run()
    hook.remove()
    return torch.cat(maps)


class FrameToy(Toy):
    """Families without a video input: each frame is an image with a run of placeholders and text of its own.

    A video's frame is one picture; an image is three, two tiles and the whole.
    """

    as_images = True
    one_video_a_row = True
    extra: ClassVar[dict[str, Any]] = {"treat_images_as_video": True}
    frame_size = (32, 32)
    per_frame: ClassVar[int] = 16

    @abstractmethod
    def begins_an_image(self, ids: list[int], start: int, length: int) -> bool:
        """Whether the run of `length` placeholders at `start` of a row is the first of an image, and not a frame."""

    def pictures(self, ids: Tensor, videos: list[Tensor], images: list[Tensor]) -> list[list[Tensor]]:
        """The pictures [3, H, W] of each row in the order of their placeholders."""
        frames, whole, rows = iter([frame for video in videos for frame in video]), iter(images), []
        for row in ids.tolist():
            waiting: list[Tensor] = []
            rows.append([])
            for is_picture, run in itertools.groupby(range(len(row)), lambda i, row=row: row[i] == IMAGE):
                if not is_picture:
                    continue
                places = list(run)
                if self.begins_an_image(row, places[0], len(places)):
                    image = next(whole)
                    waiting += [image.flip(1), image.flip(2), image]
                for _ in range(len(places) // self.per_frame):
                    rows[-1].append(waiting.pop(0) if waiting else next(frames))
        assert next(frames, None) is None
        assert next(whole, None) is None
        return rows


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
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 48 * self.temporal)

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

    def last_attention(self, model: Any) -> Any:
        return self.modules(model)["vision"].blocks[-1].attn

    def queries_and_keys(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[S, heads d] each, not yet rotated."""
        q, k, _ = attention.qkv(hidden).chunk(3, dim=-1)
        return q, k

    def features(self, model: Any, x: dict[str, Tensor]) -> list[Tensor]:
        features = model.model.get_video_features
        wanted = inspect.signature(features).parameters
        output = features(**{name: x[name] for name in wanted if name in x})
        return [output.pooler_output[0], *(level[0] for level in getattr(output, "deepstack_features", None) or [])]

    def received(self, model: Any, x: dict[str, Tensor]) -> np.ndarray:
        # no weights are returned: from the block's own projections, in the tower's (maybe windowed) order
        modules, seen = self.modules(model), {}
        block = self.last_attention(model)
        hooks = [
            block.register_forward_pre_hook(lambda _m, a, k: seen.update(hidden=a[0], **k), with_kwargs=True),
            modules["projector"].register_forward_hook(lambda _m, _a, out: seen.update(merged=out)),
        ]
        features = self.features(model, x)[0]
        for hook in hooks:
            hook.remove()
        hidden, (cos, sin) = seen["hidden"], seen["position_embeddings"]
        q, k = (y.view(len(hidden), block.num_heads, -1).transpose(0, 1) for y in self.queries_and_keys(block, hidden))

        def rotated(t: Tensor) -> Tensor:
            half = t.shape[-1] // 2
            return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

        frames, rows, columns = x["video_grid_thw"][0].tolist()
        steps = [[y.double().numpy() for y in rotated(t).split(rows * columns, 1)] for t in (q, k)]
        received = [oracle.received_attention(*pair, block.scaling) for pair in zip(*steps, strict=True)]
        grouped = np.concatenate(received).reshape(-1, 4).mean(1)
        # find the raster order by matching feature rows
        order = [int((seen["merged"] - feature).abs().sum(-1).argmin()) for feature in features]
        assert sorted(order) == list(range(len(order)))
        return grouped[order].reshape(frames, -1)

    def original_positions(self, model: Any, x: dict[str, Tensor]) -> Tensor:
        wanted = inspect.signature(model.model.get_rope_index).parameters
        return model.model.get_rope_index(**{name: x[name] for name in wanted if name in x})[0]
