"""A LLaVA-Video checkpoint with random weights as lmms-lab publishes them, and what it computes, step by step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

SIDE, POOLED, WIDTH, LAYERS = 7, 3, 32, 3  # 7 x 7 patches: an odd side, as 27 is
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
TOWER |= {"image_size": 14 * SIDE + 6, "patch_size": 14}  # 384 is no multiple of 14 either
TEXT = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 272, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THEIRS = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    **TEXT,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "torch_dtype": "float32",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384, 384]],
    "image_token_index": 151646,
    "add_faster_video": False,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "vision_config": TOWER,
    "mm_hidden_size": TOWER["hidden_size"],
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_use_im_start_end": False,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@dataclass
class Parts:
    """What LLaVA-Video is made of, with random weights."""

    tower: Any
    projector: nn.Sequential
    newline: Tensor
    language_model: Any

    @classmethod
    def random(cls, seed: int = 0) -> Parts:
        torch.manual_seed(seed)
        rope = {"rope_type": "default", "rope_theta": THEIRS["rope_theta"]}
        text = Qwen2Config(**TEXT, rope_parameters=rope, tie_word_embeddings=False)
        parts = cls(
            SiglipVisionModel(SiglipVisionConfig(**TOWER, vision_use_head=False)),
            nn.Sequential(nn.Linear(24, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
            torch.randn(WIDTH),
            Qwen2ForCausalLM(text),
        )
        with torch.no_grad():
            for module in (parts.tower, parts.projector, parts.language_model):
                for name, p in module.named_parameters():
                    p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
                module.eval()
        return parts

    def their_weights(self) -> dict[str, Tensor]:
        """Under the names LLaVA-NeXT saves them with."""
        tower = {k.removeprefix("vision_model."): v for k, v in self.tower.state_dict().items()}
        weights = {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in tower.items()}
        weights |= {f"model.mm_projector.{k}": v for k, v in self.projector.state_dict().items()}
        weights |= {"model.image_newline": self.newline, **self.language_model.state_dict()}
        return {name: tensor.clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def logits(self, before: list[int], pixels: Tensor, after: list[int], newline: str) -> Tensor:
        """[L, vocabulary] for text, a video [T, 3, H, W] and text, one step at a time as the model is described."""
        seen: list[Tensor] = []
        last = next(m for n, m in self.tower.named_modules() if n.endswith(f"encoder.layers.{LAYERS - 1}"))
        hook = last.register_forward_hook(lambda *a: seen.append(a[2] if isinstance(a[2], Tensor) else a[2][0]))
        self.tower(pixels)
        hook.remove()
        sequence: list[Tensor] = []
        for patches in self.projector(seen[0]):  # [SIDE * SIDE, WIDTH] of one frame
            for row in range(POOLED):
                for column in range(POOLED):
                    corners = [(2 * row + i) * SIDE + 2 * column + j for i in (0, 1) for j in (0, 1)]
                    sequence.append(sum(patches[c] for c in corners) / 4)
                if newline == "grid":
                    sequence.append(self.newline)
            if newline == "frame":
                sequence.append(self.newline)
        if newline == "one_token":
            sequence.append(self.newline)
        embed = self.language_model.get_input_embeddings()
        whole = torch.cat([embed(torch.tensor(before)), torch.stack(sequence), embed(torch.tensor(after))])
        return self.language_model(inputs_embeds=whole[None]).logits[0]


def write_theirs(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    """A folder with the files of lmms-lab's repositories."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(THEIRS | changes))
    names = sorted(weights)
    halves = {SHARDS[0]: names[::2], SHARDS[1]: names[1::2]}
    for file, held in halves.items():
        save_file({name: weights[name].contiguous() for name in held}, folder / file, {"format": "pt"})
    where = {name: file for file, held in halves.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(256 + i): {"content": token, "special": True, "normalized": False} for i, token in enumerate(SPECIAL)}
    tokens = {"tokenizer_class": "Qwen2Tokenizer", "processor_class": "LlavaProcessor", "added_tokens_decoder": added}
    tokens |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": 32768}
    tokens |= {"chat_template": "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    generation = {"eos_token_id": [258, 256], "pad_token_id": 256, "do_sample": True, "temperature": 0.7, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps({"attn_implementation": "sdpa", **generation}))
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    return folder
