"""The words of the tiny model: its tokenizer, prompt, and the directions in which tower and LLM agree on a meaning."""

from __future__ import annotations

from typing import Any

from .world import COLORS, COLUMNS, DIRECTIONS, NUMBERS, PLACES, REGIONS, ROWS, SHAPES

SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
_OTHER = "user assistant system ? . , : what color is the in which place comes after before how many objects object are where way does move first last shape a of these"  # noqa: E501
WORDS = tuple(dict.fromkeys([*SPECIAL, *COLORS, *SHAPES, *PLACES, *REGIONS, *DIRECTIONS, *NUMBERS, *_OTHER.split()]))
INDEX = {word: index for index, word in enumerate(WORDS)}

# One direction of the embedding space for each meaning that a token can carry.
MEANINGS = (
    *(f"shape:{word}" for word in SHAPES),
    *(f"color:{word}" for word in COLORS),
    *(f"place:{word}" for word in PLACES),
    *(f"row:{word}" for word in ROWS),
    *(f"column:{word}" for word in COLUMNS),
    *(f"number:{word}" for word in NUMBERS),
    "x",
    "y",
    "video",
    "object",
)


def tokenizer() -> Any:
    """A word-level tokenizer, lower case, with LLaVA-OneVision's special tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(INDEX, unk_token="<unk>"))  # noqa: S106
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.,:]"), "isolated")]
    )
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, extra_special_tokens=["<|im_start|>", "<image>", "<video>"], **named
    )


def encode(text: str) -> list[int]:
    """Token ids of a question as `ask` writes it (words apart)."""
    return [INDEX[word] for word in text.split()]
