"""lmms-eval's side door: `--model holimerge_llava_onevision` or `holimerge_qwen2_5_vl` in its command line.

    python -m lmms_eval --model holimerge_llava_onevision --tasks mlvu_dev --batch_size 1 --log_samples \\
        --model_args pretrained=llava-hf/llava-onevision-qwen2-7b-ov-hf,config=holimerge-15,num_frames=32

lmms-eval finds `manifests` through the entry point group `lmms_eval.models` and imports `holimerge.eval.lmms_model`
when one of the models is asked for. Nothing in this file imports lmms-eval before that, so it works without.
Videos are read, prompts built and checkpoints loaded by holimerge itself: neither torchvision nor decord nor
qwen-vl-utils is needed (a task's own file may still need some of them). Tried with lmms-eval 0.7.3.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

MODELS = {"holimerge_llava_onevision": "llava_onevision", "holimerge_qwen2_5_vl": "qwen2_5_vl"}
CLASSES = {"holimerge_llava_onevision": "LlavaOnevision", "holimerge_qwen2_5_vl": "Qwen2_5VL"}

# What --model_args takes, with its default.
MODEL_ARGS: dict[str, Any] = {
    "pretrained": None,
    "config": None,
    "num_frames": 32,
    "sampling": "uniform",
    "fps": None,
    "device_map": None,
    "dtype": "auto",
    "attn_implementation": None,
}
UNPATCHED = "none"  # config=none: the model as it is, to compare with
MAX_NEW_TOKENS = 1024  # where a task sets no limit
# lmms-eval gives every task that names no stop string this one, which would cut an answer after its first paragraph.
_NO_STOP = "\n\n"


def manifests() -> list[Any]:
    """What lmms-eval registers. Never raises: lmms-eval would then drop every other package's models too."""
    try:
        from lmms_eval.models.registry_v2 import ModelManifest

        where = f"{__package__}.lmms_model"
        return [ModelManifest(model_id=name, simple_class_path=f"{where}.{CLASSES[name]}") for name in MODELS]
    except Exception as error:
        warnings.warn(f"holimerge's models are not registered with lmms-eval: {error!r}", stacklevel=2)
        return []


def model_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """`--model_args` checked and completed from `MODEL_ARGS`.

    Raises:
        ValueError: an unknown key, one that is missing, or a value of the wrong kind.
    """
    from holimerge.registry import nearest

    valid = ", ".join(MODEL_ARGS)
    for key in given:
        if key not in MODEL_ARGS:
            raise ValueError(f"model_args: unknown key {key!r}{nearest(key, MODEL_ARGS)} Valid: {valid}")
    found = {**MODEL_ARGS, **given}
    if not found["pretrained"]:
        raise ValueError(f"model_args: pretrained=FOLDER_OR_HUB_ID is missing. Valid: {valid}")
    if not found["config"]:
        raise ValueError(
            "model_args: config= is missing: a preset such as holimerge-15, a YAML path, "
            f"or {UNPATCHED} for the model as it is"
        )
    if isinstance(found["num_frames"], bool) or not isinstance(found["num_frames"], int) or found["num_frames"] < 1:
        raise ValueError(f"model_args: num_frames={found['num_frames']!r} is no whole number of at least 1")
    return found


def one_at_a_time(batch_size: Any) -> None:
    """Refuse every `--batch_size` but 1; ValueError."""
    if str(batch_size) != "1":
        raise ValueError(
            f"--batch_size {batch_size}: holimerge's models answer one question at a time, use --batch_size 1 "
            "(and `accelerate launch` for several processes)"
        )


def place(device_map: str | None, device: str | None, environment: Mapping[str, str], cuda: bool) -> str | None:
    """Where to put the model: `device_map`, else `--device`, else each of several processes its own GPU, else None."""
    if device_map or device:
        return device_map or device
    if cuda and int(environment.get("WORLD_SIZE", 1)) > 1:
        return f"cuda:{environment.get('LOCAL_RANK', 0)}"
    return None


def generation_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's `generation_kwargs` as keywords of `generate`, and the strings at which an answer ends.

    A temperature of 0 or none, or do_sample: false, is greedy. Keys that `generate` does not know here (for instance
    image_aspect_ratio) are named in a warning and left out.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != _NO_STOP]
    limit = rest.pop("max_gen_toks", MAX_NEW_TOKENS)
    options: dict[str, Any] = {"max_new_tokens": int(rest.pop("max_new_tokens", limit))}
    for name in ("num_beams", "repetition_penalty"):
        if (value := rest.pop(name, None)) is not None:
            options[name] = value
    temperature = float(rest.pop("temperature", None) or 0)
    sampled = bool(rest.pop("do_sample", temperature > 0)) and temperature > 0
    chosen = {"temperature": temperature, "top_p": rest.pop("top_p", None), "top_k": rest.pop("top_k", None)}
    options |= {"do_sample": sampled, **(chosen if sampled else dict.fromkeys(chosen))}
    if rest:
        warnings.warn(f"generation_kwargs that are not used: {', '.join(sorted(rest))}", stacklevel=2)
    return options, stops


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings, stripped."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


class Answer(NamedTuple):
    """A written answer. entering: tokens of the prompt that entered the LLM, text included."""

    text: str
    entering: int
    written: int


class Score(NamedTuple):
    """One option after a prompt: sum of the log-probabilities of its tokens; whether greedy decoding writes it."""

    log_likelihood: float
    greedy: bool
    entering: int


class VideoAnswerer:
    """A checkpoint, patched or not, that answers lmms-eval's questions; keeps the last question's frames.

    Args:
        arguments: from `model_args`.
        family: the model_type that the checkpoint must have.
        device_map: from `place`.

    Raises:
        ConfigError, ValueError, TypeError, FileNotFoundError, OSError: the configuration or the checkpoint cannot be
            used; before weights are read wherever that can be known.
    """

    def __init__(self, arguments: Mapping[str, Any], family: str, device_map: str | None) -> None:
        from holimerge import load_config, patch_model

        from .load import load, read_config

        config = None if arguments["config"] == UNPATCHED else load_config(arguments["config"])
        found = read_config(str(arguments["pretrained"])).model_type
        if found != family:
            other = next((name for name, kind in MODELS.items() if kind == found), None)
            hint = f"; use --model {other}" if other else ""
            raise ValueError(f"pretrained={arguments['pretrained']}: is a {found} model, not {family}{hint}")
        self.sampling = {
            "frames": arguments["num_frames"],
            "sampling": arguments["sampling"],
            "fps": arguments["fps"],
        }
        options = {name: arguments[name] for name in ("dtype", "attn_implementation")}
        self.model, self.tokenizer, self.settings, self.template = load(
            str(arguments["pretrained"]), device_map=device_map, **options
        )
        self.patched = config is not None
        if config is not None:
            patch_model(self.model, config)
        self._last: tuple[tuple[str, ...], list[Any]] = ((), [])

    def generate(self, question: str, visuals: Any, given: Mapping[str, Any]) -> Answer:
        """Write an answer. visuals: paths of videos or folders of frames, or none; given: the generation_kwargs."""
        options, stops = generation_options(given)
        inputs = self.inputs(question, visuals)
        ids = self.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        text = cut_at(self.tokenizer.decode(ids, skip_special_tokens=True), stops)
        return Answer(text, self._entering(inputs), len(ids))

    def score(self, question: str, visuals: Any, options: Sequence[str]) -> list[Score]:
        """Score options as they are written, their leading space included: one prefill for all of them.

        Raises:
            ValueError: an option without any token.
        """
        from holimerge import score_options

        inputs = self.inputs(question, visuals)
        tokens = [self.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
        for option, ids in zip(options, tokens, strict=True):
            if not ids:
                raise ValueError(f"the option {option!r} has no token")
        with _likeliest(self.model) as seen:
            scores = score_options(self.model, inputs, tokens)
        entering = self._entering(inputs)
        first, rest = seen[0][-1:], iter(seen[1:])
        greedy = [ids == first + (next(rest) if len(ids) > 1 else []) for ids in tokens]
        return [Score(score, hit, entering) for score, hit in zip(scores, greedy, strict=True)]

    def inputs(self, question: str, visuals: Any) -> dict[str, Any]:
        """The model's inputs for a question about what `doc_to_visual` gave."""
        from holimerge.inputs import build_inputs

        from .load import to_model

        built = build_inputs(
            question,
            self.videos(visuals),
            config=self.model.config,
            tokenizer=self.tokenizer,
            settings=self.settings,
            chat_template=self.template,
        )
        return to_model(built, self.model)

    def videos(self, visuals: Any) -> list[Any]:
        """Read what a task shows. Questions about one video come one after another: its frames are read once.

        Raises:
            FileNotFoundError, ValueError: a video that is not there or cannot be read.
            TypeError: something else than videos, for instance pictures.
        """
        from holimerge.video import read_video

        listed = [] if visuals is None else visuals if isinstance(visuals, list | tuple) else [visuals]
        for visual in listed:
            if not isinstance(visual, str | os.PathLike):
                raise TypeError(
                    f"the task shows a {type(visual).__name__}; holimerge's models take paths of videos "
                    "(or of folders of frames) from lmms-eval"
                )
        paths = tuple(os.fspath(visual) for visual in listed)
        if paths != self._last[0]:
            self._last = (), []  # the old frames go before the new ones come
            self._last = paths, [read_video(path, **self.sampling) for path in paths]
        return self._last[1]

    def _entering(self, inputs: Mapping[str, Any]) -> int:
        from holimerge import last_report

        length = int(inputs["input_ids"].shape[1])
        if not self.patched or "pixel_values_videos" not in inputs:
            return length
        videos = last_report(self.model).videos[: len(self._last[1])]  # beam search has copies of them
        return length - sum(video.features - video.entering for video in videos)


@contextmanager
def _likeliest(model: Any) -> Iterator[list[list[int]]]:
    """Inside the block: of every forward of a one-row batch the likeliest next token at each of its positions."""
    seen: list[list[int]] = []

    def note(module: Any, args: Any, logits: Any) -> None:
        seen.append(logits[0].argmax(-1).tolist())

    hook = model.get_output_embeddings().register_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()
