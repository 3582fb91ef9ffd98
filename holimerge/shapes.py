"""The sizes of video LLMs: read from a Hugging Face config, or named, with sources, for the models people run.

A named shape needs no weights and no network; `count_parameters` builds its real class on the meta device and must
give the published count. The T x N arithmetic of each family lives here, the FLOPs in `holimerge.cost`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Grid = tuple[int, int]


@dataclass(frozen=True)
class TextShape:
    """Sizes of a decoder with grouped-query attention and a gated MLP (three matrices): Qwen2, Qwen2.5, Qwen3, Llama.

    layers: decoder layers. width: hidden size d. heads, kv_heads: query and key/value heads. head_dim: width of one
    head (heads x head_dim may differ from d). mlp: intermediate size m. vocab: rows of the lm_head.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower and of the projector behind it.

    layers, width, heads, mlp: of the ViT. gated: its MLP has three matrices (Qwen2.5-VL), else two.
    patch, temporal_patch: edge in pixels, frames per patch. channels: of the pixels.
    side: patches along the edge of a square frame (SigLIP 384 / 14 = 27), None where the resolution is free (Qwen).
    window: edge of an attention window in patches, 0 for none; full_layers: blocks that see the whole frame anyway.
    merge: edge of the patch group that the projector reads as one row (1 LLaVA, 2 Qwen).
    pooled: edge of the token grid after the pooling behind the projector, None for none.
    projector: widths (in, hidden, out) of its MLP. projectors: how many run (Qwen3-VL: 1 + its deepstack mergers).
    head: SigLIP's attention-pooling head is computed (``vision_use_head``), though its output is not used.
    """

    layers: int
    width: int
    heads: int
    mlp: int
    gated: bool
    patch: int
    temporal_patch: int
    side: int | None
    merge: int
    pooled: int | None
    projector: tuple[int, int, int]
    projectors: int = 1
    window: int = 0
    full_layers: tuple[int, ...] = ()
    channels: int = 3
    head: bool = False

    def frame_grid(self, grid: Grid | None = None) -> Grid:
        """Patches (rows, columns) of one frame; a square tower knows its own, a free one needs `grid`."""
        if self.side is not None:
            if grid is not None and tuple(grid) != (self.side, self.side):
                raise ValueError(f"grid: this tower always has {self.side} x {self.side} patches a frame, got {grid}")
            return self.side, self.side
        if grid is None:
            raise ValueError("grid: this tower takes any resolution; give (rows, columns) of patches of a frame")
        if len(grid) != 2 or any(edge < 1 or edge % self.merge for edge in grid):
            raise ValueError(f"grid: two positive multiples of {self.merge} (rows, columns of patches), got {grid}")
        return grid[0], grid[1]

    def steps(self, frames: int) -> int:
        """Temporal steps of `frames` frames; the processor repeats the last frame of an incomplete step."""
        return -(-frames // self.temporal_patch)

    def tokens_per_step(self, grid: Grid | None = None) -> int:
        """N: tokens of one step that enter the LLM unreduced."""
        rows, columns = self.frame_grid(grid)
        return self.pooled**2 if self.pooled else (rows // self.merge) * (columns // self.merge)

    @property
    def rows_per_token(self) -> int:
        """Projector rows behind one token: the 4 taps of a pooled LLaVA token, one group of 4 patches for Qwen."""
        return min(2, self.side or 2) ** 2 if self.pooled else 1

    @property
    def decision_width(self) -> int:
        """Width of one token before the projector: a pooled patch (LLaVA), the concatenated group of patches (Qwen)."""
        return self.projector[0]

    def attention_pairs(self, grid: Grid, block: int) -> int:
        """Query-key pairs of one head in one frame at `block`: n^2, or the sum over its windows."""
        if not self.window or block in self.full_layers:
            return (grid[0] * grid[1]) ** 2
        return sum(rows**2 for rows in window_rows(grid, self.window))


@dataclass(frozen=True)
class ModelShape:
    """A video LLM: `model_type` as in its Hugging Face config, its decoder and its tower."""

    model_type: str
    text: TextShape
    vision: VisionShape


def text_shape(config: Any) -> TextShape:
    """The decoder's shape of a model's config.

    Raises TypeError where its layers are no plain ones: mixtures of experts, linear attention.
    """
    t = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config.text_config
    experts = any(getattr(t, name, None) for name in ("num_experts", "n_routed_experts", "num_local_experts"))
    if experts or "linear_attention" in (getattr(t, "layer_types", None) or []):
        raise TypeError(f"no FLOPs model for the decoder of {config.model_type!r}; give a budget as retain or tokens")
    return TextShape(
        layers=t.num_hidden_layers,
        width=t.hidden_size,
        heads=t.num_attention_heads,
        kv_heads=t.num_key_value_heads or t.num_attention_heads,
        head_dim=getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads,
        mlp=t.intermediate_size,
        vocab=t.vocab_size,
    )


def shape_of(config: Any) -> ModelShape:
    """The shape of a Hugging Face config object (llava_onevision and llava_video with SigLIP, qwen2_5_vl, qwen3_vl).

    Raises TypeError for any other model type. Source: the classes of transformers 5.23.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "llava_video"):
        raise TypeError(f"no FLOPs model for {kind!r}; supported: llava_onevision, qwen2_5_vl, qwen3_vl, llava_video")
    v = config.vision_config
    text = text_shape(config)
    if kind in ("llava_onevision", "llava_video"):
        if v.model_type != "siglip_vision_model":
            raise TypeError(f"no FLOPs model for a {v.model_type!r} tower; supported: siglip_vision_model")
        features = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        side = v.image_size // v.patch_size
        vision = VisionShape(
            *(v.num_hidden_layers, v.hidden_size, v.num_attention_heads, v.intermediate_size),
            gated=False,
            patch=v.patch_size,
            temporal_patch=1,
            side=side,
            merge=1,
            pooled=side // 2 if kind == "llava_video" else -(-side // 2),
            projector=(v.hidden_size * features, text.width, text.width),
            channels=v.num_channels,
            head=getattr(v, "vision_use_head", True),
        )
        return ModelShape(kind, text, vision)
    group = v.hidden_size * v.spatial_merge_size**2
    windowed = kind == "qwen2_5_vl"
    vision = VisionShape(
        *(v.depth, v.hidden_size, v.num_heads, v.intermediate_size),
        gated=windowed,
        patch=v.patch_size,
        temporal_patch=v.temporal_patch_size,
        side=None,
        merge=v.spatial_merge_size,
        pooled=None,
        projector=(group, group, v.out_hidden_size),
        projectors=1 if windowed else 1 + len(v.deepstack_visual_indexes),
        window=v.window_size // v.patch_size // v.spatial_merge_size * v.spatial_merge_size if windowed else 0,
        full_layers=tuple(v.fullatt_block_indexes) if windowed else (),
        channels=v.in_channels,
    )
    return ModelShape(kind, text, vision)


@dataclass(frozen=True)
class Shape:
    """A model that can be costed without weights: a named one, or a folder with a config.json.

    config: keyword arguments of its Hugging Face config. source: what was read, and where. parameters: published
    count, None for a folder; parameters_source: where; digits: its significant digits. frames: default T.
    grid: default patches (rows, columns) of a frame, None where the tower is square. separators: newlines and the
    like in a video; separators_per_step: the same for each frame or temporal step. pooled: token grid edge where it
    differs from what the Hugging Face class does. note: what differs from that class, in words.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(repr=False)
    source: str
    parameters: int | None = None
    parameters_source: str = ""
    digits: int = 0
    frames: int = 32
    grid: Grid | None = None
    separators: int = 0
    separators_per_step: int = 0
    pooled: int | None = None
    note: str = ""

    def model(self) -> ModelShape:
        """The sizes of this model."""
        shape = shape_of(build_config(self))
        if self.pooled is None:
            return shape
        return replace(shape, vision=replace(shape.vision, pooled=self.pooled))

    def separator_count(self, frames: int) -> int:
        """Separators beside the unreduced tokens of `frames` frames."""
        return self.separators + self.separators_per_step * self.model().vision.steps(frames)


def build_config(shape: Shape | str) -> Any:
    """The Hugging Face config object of a shape or of a name or folder that `load_shape` takes."""
    from transformers import AutoConfig

    shape = load_shape(shape) if isinstance(shape, str) else shape
    return AutoConfig.for_model(shape.model_type, **shape.config)


def load_shape(name_or_folder: str | Path) -> Shape:
    """A named shape, or the shape of a local folder with a config.json.

    Raises ValueError for an unknown name, TypeError for a folder of an unsupported model.
    """
    name = str(name_or_folder)
    if name in SHAPES:
        return SHAPES[name]
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"shape: the folder {name!r} has no config.json")
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(name, local_files_only=True)
        shape_of(config)
        llava = config.model_type == "llava_onevision"
        return Shape(
            name=name,
            model_type=config.model_type,
            config={key: value for key, value in config.to_dict().items() if key != "model_type"},
            source=f"{name}/config.json",
            grid=None if llava else QWEN_GRID,
            separators=1 if llava else 0,
        )
    near = difflib.get_close_matches(name, SHAPES, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"shape: {name!r} is neither a folder nor a known name; nearest: {near}; valid: {', '.join(SHAPES)}"
    )


def count_parameters(config: Any) -> int:
    """Parameters of the real model class, built on the meta device without weights (tied ones counted once)."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def window_rows(grid: Grid, window: int) -> list[int]:
    """Patches of each attention window of a frame, in the order of a windowed tower's sequence.

    grid: patches (rows, columns) of the frame. window: edge in patches; what is left at the right and below makes
    smaller ones.
    """
    rows, columns = ([window] * (edge // window) + [edge % window] * bool(edge % window) for edge in grid)
    return [r * c for r in rows for c in columns]


def _qwen2(*sizes: int) -> dict[str, Any]:
    """layers, width, heads, key/value heads, mlp, vocabulary, under their names in Qwen2Config and its heirs."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dict(zip((*keys, "vocab_size"), sizes, strict=True))


def _llava(text: dict[str, Any], tied: bool = False) -> dict[str, Any]:
    siglip = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "vision_use_head": False}
    siglip |= {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 26}
    decoder = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **text}
    return {"vision_config": siglip, "text_config": decoder, "tie_word_embeddings": tied}


def _qwen25(text: dict[str, Any], tied: bool) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vit = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "tokens_per_second": 2}
    return {
        "vision_config": {**vit, "out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [7, 15, 23, 31]},
        "text_config": {**text, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000, "rope_parameters": rope},
        "tie_word_embeddings": tied,
    }


QWEN_GRID: Grid = (18, 32)  # example resolution 252 x 448: 9 x 16 = 144 tokens a step
_SIGLIP = (
    "tower: SiglipVisionConfig (26 layers of so400m-patch14-384, no head) as written in transformers "
    "convert_llava_onevision_weights_to_hf.py"
)
_VOCAB = "; the llava-hf conversions pad the vocabulary (two new tokens, next multiple of 64), under 0.2 % of the count"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "llava-onevision-0.5b",
            "llava_onevision",
            _llava(_qwen2(24, 896, 14, 2, 4864, 151936), tied=True),
            f"lmms-lab/llava-onevision-qwen2-0.5b-ov; decoder: Qwen/Qwen2-0.5B config.json; {_SIGLIP}{_VOCAB}",
            890_000_000,
            "0.89B in a comparison table of the Fast-Video-0.8B project; no first-party figure could be read",
            2,
            separators=1,
        ),
        Shape(
            "llava-onevision-7b",
            "llava_onevision",
            _llava(_qwen2(28, 3584, 28, 4, 18944, 152064)),
            "lmms-lab/llava-onevision-qwen2-7b-ov config.json (as copied into a unit test of PaddleMIX); "
            f"{_SIGLIP}{_VOCAB}",
            8_030_000_000,
            "8.03B params on the Hugging Face page of zixianma/llava_ov_7b_tune_vision_293k (by its name a fine-tune)",
            3,
            separators=1,
        ),
        Shape(
            "llava-onevision-72b",
            "llava_onevision",
            _llava(_qwen2(80, 8192, 64, 8, 29568, 152064)),
            f"lmms-lab/llava-onevision-qwen2-72b-ov-sft; decoder: Qwen/Qwen2-72B config.json; {_SIGLIP}{_VOCAB}",
            73_200_000_000,
            "73.2B params, github.com/jakemanger/whatmodel pages/model/llava-onevision-qwen2-72b-ov.md",
            3,
            separators=1,
        ),
        Shape(
            "llava-video-7b",
            "llava_onevision",
            _llava(_qwen2(28, 3584, 28, 4, 18944, 152064)),
            "lmms-lab/LLaVA-Video-7B-Qwen2 (modules of LLaVA-OneVision-7B; mm_spatial_pool_mode average, "
            f"mm_newline_position grid); {_SIGLIP}",
            8_030_000_000,
            "8.03B params on the Hugging Face page of llava-hf/LLaVA-Next-Video-7B-Qwen2-hf (a conversion); the "
            "shards of lmms-lab/LLaVA-Video-7B-Qwen2 (4.88 + 4.93 + 4.99 + 1.26 GB in bf16) say the same",
            3,
            frames=64,
            separators_per_step=13,
            pooled=13,
            note="no Hugging Face class of its own: costed as LlavaOnevision with average pooling 27 -> 13 "
            "(169 tokens a frame) and one newline after each of the 13 rows of a frame",
        ),
        Shape(
            "qwen2.5-vl-3b",
            "qwen2_5_vl",
            _qwen25(_qwen2(36, 2048, 16, 2, 11008, 151936), tied=True),
            "Qwen/Qwen2.5-VL-3B-Instruct config.json (printed in a public report together with its modules)",
            3_754_622_976,
            "ModelScope model_size of Qwen/Qwen2.5-VL-3B-Instruct (quoted in a public survey of 2026-09-26)",
            10,
            grid=QWEN_GRID,
        ),
        Shape(
            "qwen2.5-vl-7b",
            "qwen2_5_vl",
            _qwen25(_qwen2(28, 3584, 28, 4, 18944, 152064), tied=False),
            "Qwen/Qwen2.5-VL-7B-Instruct (module print in github.com/acproject/duorou docs/qwen2.5vl_graph.md)",
            8_292_166_656,
            "Hugging Face metadata of Qwen/Qwen2.5-VL-7B-Instruct revision cc594898 (total_size 16584333312 in bf16)",
            10,
            grid=QWEN_GRID,
        ),
        Shape(
            "qwen3-vl-8b",
            "qwen3_vl",
            {
                "vision_config": {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
                "text_config": {
                    **_qwen2(36, 4096, 32, 8, 12288, 151936),
                    "head_dim": 128,
                    "max_position_embeddings": 262144,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
                },
                "tie_word_embeddings": False,
            },
            "Qwen/Qwen3-VL-8B-Instruct config.json (printed in a public report together with its weights)",
            8_767_123_696,
            "Hugging Face metadata of Qwen/Qwen3-VL-8B-Instruct revision 0c351dd0 (total_size 17534247392 in bf16)",
            10,
            grid=(16, 28),
            separators_per_step=8,
            note="example resolution 256 x 448; 8 separators a step: vision start and end and 6 for a timestamp such "
            "as <3.5 seconds> (longer times take one or two more)",
        ),
    )
}
