"""lmms-lab's LLaVA-Video checkpoints, rewritten for `holimerge.llava_video`: `holimerge convert-llava-video`.

They are written by the LLaVA-NeXT code (github.com/LLaVA-VL/LLaVA-NeXT, class `LlavaQwenForCausalLM`), which
transformers cannot read: other names, one flat config, no preprocessor file, a chat template that knows no videos. That
code cuts the last of the tower's 27 layers off before it saves and reads the last of the 26 left, before its final
norm, whatever `mm_vision_select_layer` says; `get_2dPool` halves each side; `mm_newline_position` is read as
"one_token" where it is missing.

The training scripts leave `mm_spatial_pool_mode` at its default, "bilinear", and the authors' evaluation command
(docs/LLaVA_Video_1003.md there) sets "average", on which the published scores rest: `pool` says which is meant.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from holimerge.inputs import DEFAULT_TEMPLATES
from holimerge.preprocess import default_settings

ARCHITECTURE = "LlavaQwenForCausalLM"
TOWERS = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    }
}
# The conversation the authors train and ask with (their "qwen_1_5"): Qwen's system turn, the video on its own line.
TEMPLATE = DEFAULT_TEMPLATES["qwen2_5_vl"].replace("<|vision_start|><|video_pad|><|vision_end|>", "<video>\n")
SHARD = "5GB"

_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rope_theta")
_TEXT = (
    *("num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_dropout"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# What these keys of the old config may be; anything else changes what the model computes.
_LAYOUT: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_spatial_pool_mode": ("average",),
    "mm_spatial_pool_stride": (2, None),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "add_faster_video": (False, None),
}
# Beginnings of our names and of theirs; the first that fits counts.
_TOWER = "model.vision_tower.vision_tower.vision_model."
_LAYER = re.compile(re.escape(_TOWER) + r"encoder\.layers\.\d+\.layer_norm1\.weight")
_NAMES = (
    ("model.vision_tower.vision_model.", _TOWER),
    ("model.vision_tower.", _TOWER),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
)
_CONSTANTS = (".rotary_emb.inv_freq", ".embeddings.position_ids")  # buffers that older files hold; computed anew


def convert_llava_video(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    newline: str | None = None,
    pool: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Rewrite a LLaVA-Video checkpoint into a folder that `holimerge.eval.load.load` and the Auto classes read.

    Everything is checked before anything is written; weights keep their dtype and are in memory once.

    Args:
        source: the folder as published: config.json, safetensors, tokenizer.
        target: a new or empty folder.
        newline: "grid", "frame" or "one_token"; None is the checkpoint's own `mm_newline_position`.
        pool: "average" for a checkpoint whose `mm_spatial_pool_mode` says something else (see the top of this module).
        say: told what is being done.

    Returns:
        folder, newline, tokens_per_frame (without newlines), dtype and parameters, ready for JSON.

    Raises:
        FileNotFoundError: no such folder, or files missing in it.
        FileExistsError: target is not empty.
        ValueError: another architecture, layout or tower; weights as pickles; weights that are missing, too many, or of
            another shape, by their names; no room for two more tokens.
    """
    import torch

    from holimerge.llava_video import LlavaVideoForConditionalGeneration, side_of

    folder, out = Path(source).expanduser(), Path(target).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty folder; give a new one")
    raw = _old_config(folder)
    _check_layout(folder, raw, pool)
    files = _weight_files(folder)
    found = _shapes(files)
    config = _new_config(folder, raw, newline, sum(map(bool, map(_LAYER.fullmatch, found))))
    tokenizer = _tokenizer(folder, config)

    with torch.device("meta"):
        model = LlavaVideoForConditionalGeneration(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    ours = {name: _old_name(name) for name in model.state_dict() if name not in tied}
    _check_weights(folder, {old: list(model.state_dict()[name].shape) for name, old in ours.items()}, found, tied)
    say("reading the weights")
    model.load_state_dict(_tensors(files, {old: name for name, old in ours.items()}), assign=True, strict=False)
    model.tie_weights()
    model.generation_config = _generation(folder, raw)
    say("writing the checkpoint")
    try:
        model.save_pretrained(out, max_shard_size=SHARD)
        tokenizer.save_pretrained(out)
        (out / "video_preprocessor_config.json").write_text(json.dumps(_preprocessor(config), indent=2) + "\n")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # half a checkpoint helps nobody, and fills the disk
        raise
    return {
        "folder": str(out),
        "newline": config.video_newline,
        "tokens_per_frame": side_of(config) ** 2,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is no JSON object ({error})") from error


def _old_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint of the right architecture."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; download the checkpoint first, for instance with "
            "`hf download lmms-lab/LLaVA-Video-7B-Qwen2 --local-dir FOLDER`"
        )
    raw = _json(folder / "config.json")
    if ARCHITECTURE not in (raw.get("architectures") or []):
        kind = f"architectures {raw.get('architectures')}, model_type {raw.get('model_type')!r}"
        raise ValueError(f"{folder}: {kind}; only checkpoints of {ARCHITECTURE} are converted")
    if lacking := [key for key in _NEEDED if raw.get(key) is None]:
        raise ValueError(f"{folder / 'config.json'}: lacks {', '.join(lacking)}")
    return raw


def _check_layout(folder: Path, raw: Mapping[str, Any], pool: str | None) -> None:
    """Refuse what our class does not compute."""
    if pool not in (None, "average"):
        raise ValueError(f"pool: {pool!r} is not valid; valid: average")
    for key, valid in _LAYOUT.items():
        value = raw.get(key)
        if value in valid or (key == "mm_spatial_pool_mode" and pool is not None):
            continue
        hint = ""
        if key == "mm_spatial_pool_mode":
            hint = "; the authors' evaluation sets average whatever the file says: --pool average does the same"
        known = ", ".join("nothing" if v is None else str(v) for v in valid)
        raise ValueError(f"{folder / 'config.json'}: {key} is {value!r}; supported: {known}{hint}")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files, by the index if there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ValueError(f"{index}: has no weight_map")
        files = sorted(set(map(str, named.values())))
        if gone := [name for name in files if Path(name).name != name or not (folder / name).is_file()]:
            raise FileNotFoundError(f"{index}: names files that are not there: {', '.join(gone)}")
        return [folder / name for name in files]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder}: the weights are pickles ({pickles[0]}), which can run code when they are read; "
            "only safetensors are converted"
        )
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")


def _shapes(files: list[Path]) -> dict[str, list[int]]:
    """Name and shape of every weight, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as shard:
                found |= {name: list(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read ({error}); was it downloaded whole?") from error
    return {name: shape for name, shape in found.items() if not name.endswith(_CONSTANTS)}


def _tensors(files: list[Path], names: Mapping[str, str]) -> dict[str, Any]:
    """The weights of `names`, under our names; they stay mapped files until they are used."""
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in files:
        with safe_open(path, "pt") as shard:
            tensors |= {names[old]: shard.get_tensor(old) for old in shard.keys() if old in names}  # noqa: SIM118
    return tensors


def _old_name(name: str) -> str:
    """What LLaVA-NeXT calls our weight."""
    for here, there in _NAMES:
        if name.startswith(here):
            return there + name.removeprefix(here)
    return name


def _new_config(folder: Path, raw: Mapping[str, Any], newline: str | None, layers: int) -> Any:
    """Our config. layers: of the tower, as found in the weights."""
    from transformers import Qwen2Config, SiglipVisionConfig

    from holimerge.llava_video import NEWLINES, LlavaVideoConfig

    chosen = newline or raw.get("mm_newline_position") or "one_token"
    if chosen not in NEWLINES:
        where = f"{folder / 'config.json'}: mm_newline_position" if newline is None else "newline:"
        raise ValueError(f"{where} {chosen!r} is not valid; valid: {', '.join(NEWLINES)}")
    name = str(raw.get("mm_vision_tower"))
    sizes = raw.get("vision_config") or TOWERS.get(name.rsplit("/", 1)[-1])
    if not isinstance(sizes, dict):
        raise ValueError(
            f"{folder / 'config.json'}: mm_vision_tower {name!r} is not known; known: google/{', google/'.join(TOWERS)}"
        )
    vision = SiglipVisionConfig(**sizes | {"vision_use_head": False})
    if layers != vision.num_hidden_layers:
        raise ValueError(
            f"{folder}: the weights hold {layers} layers of the vision tower {name}, "
            f"{vision.num_hidden_layers} are expected"
        )
    scaling = dict(raw.get("rope_scaling") or {})
    rope = {"rope_type": scaling.pop("type", "default"), "rope_theta": raw["rope_theta"], **scaling}
    given = {key: raw[key] for key in (*_NEEDED, *_TEXT) if key in raw and key != "rope_theta"}
    tied = bool(raw.get("tie_word_embeddings", False))
    text = Qwen2Config(**given, rope_parameters=rope, tie_word_embeddings=tied)
    return LlavaVideoConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        video_newline=chosen,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )


def _tokenizer(folder: Path, config: Any) -> Any:
    """The tokenizer with `<image>`, `<video>` and the authors' conversation; their ids go into the config."""
    from transformers import AddedToken, AutoTokenizer

    # with a config at hand the old config.json, which says "llava", is not asked
    tokenizer = AutoTokenizer.from_pretrained(str(folder), config=config.text_config)
    tokens = ["<image>", "<video>"]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"{folder}: no room in the vocabulary: with {' and '.join(tokens)} the tokenizer has {len(tokenizer)} "
            f"tokens, the embedding {config.text_config.vocab_size} rows"
        )
    config.image_token_index, config.video_token_index = map(tokenizer.convert_tokens_to_ids, tokens)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _check_weights(
    folder: Path, expected: Mapping[str, list[int]], found: Mapping[str, list[int]], spare: set[str]
) -> None:
    """Compare names and shapes; spare: names that may be there or not."""
    for what, names in (
        ("lack", [name for name in expected if name not in found]),
        ("hold unknown", [name for name in found if name not in expected and name not in spare]),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{folder}: the weights {what} {', '.join(names[:5])}{more}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{folder}: {name} has shape {found[name]}; by config.json it has {shape}")


def _generation(folder: Path, raw: Mapping[str, Any]) -> Any:
    """How the checkpoint generates: its file, else the special tokens of its config."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(str(folder))
    return GenerationConfig(**{key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")})


def _preprocessor(config: Any) -> dict[str, Any]:
    """SigLIP's preprocessing, as transformers' video processors write theirs."""
    settings = default_settings(config.model_type, config)
    return {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "do_resize": True,
        "size": dict(zip(("height", "width"), settings.size, strict=True)),
        "resample": settings.resample,
        "do_rescale": True,
        "rescale_factor": settings.rescale,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "do_convert_rgb": True,
    }
