"""Models with random weights: a small stand-in for the demo and the toy bench, and any named shape at full size.

They are real Hugging Face classes. Nothing about their answers means anything; their times and FLOPs do.
"""

from __future__ import annotations

from typing import Any

_TEXT = (
    "a and answer bird blue box circle cut fast frame green happens in is it left light moves no of on one pattern red "
    "right round scene second seen shape slow square still stripes texture the then this to turns two video we what "
    "while yes yellow"
)
WORDS = tuple(_TEXT.split())
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


def toy_tokenizer() -> Any:
    """A word-level tokenizer with LLaVA-OneVision's special tokens; words it does not know become `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "user", "assistant", "?", ".", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, extra_special_tokens=["<|im_start|>", "<image>", "<video>"], **named
    )


def toy_config(quick: bool = False) -> Any:
    """A narrow LLaVA-OneVision with the real token geometry: 27 x 27 patches a frame, pooled to 14 x 14 = 196 tokens.

    quick: 7 x 7 patches and 16 tokens, for tests.
    """
    from transformers import LlavaOnevisionConfig

    side = 98 if quick else 384
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    vocabulary = len(SPECIAL) + 4 + len(WORDS)
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": side,
            "patch_size": 14,
            "vision_use_head": False,
            **vision,
        },
        text_config={
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32768,
            **text,
        },
        video_token_index=SPECIAL.index("<video>"),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[side, side]],
        tie_word_embeddings=False,
    )


def random_model(
    config: Any, *, device: Any = "cpu", dtype: Any = None, attn_implementation: str | None = None, seed: int = 0
) -> Any:
    """The real class of `config` with random weights, made on the device in the dtype (float32 if None).

    It never ends its answer by itself and never writes a placeholder.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype or torch.float32, **options)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    tokens = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "vision_start", "vision_end")]
    settings.suppress_tokens = [token for token in tokens if token is not None]
    return model.eval()


def describe(config: Any) -> str:
    """The sizes of a model in one line."""
    from holimerge.shapes import shape_of

    shape = shape_of(config)
    t, v = shape.text, shape.vision
    return (
        f"{config.model_type}: tower {v.layers} layers x {v.width}, {v.projector[0]} -> {t.width}; "
        f"LLM {t.layers} layers x {t.width}, {t.heads} heads ({t.kv_heads} for keys), MLP {t.mlp}"
    )
