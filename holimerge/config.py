"""Configuration: what to reduce, to what budget, how. Frozen, YAML in and out, every error names its key."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .cost import inner_kept
from .encoder.options import Encoder, Frames, Gate, Tokens
from .registry import list_methods, list_presets, method_module, nearest, preset_text
from .section import ConfigError as ConfigError
from .section import Section as Section

LIMITS = ("retain", "tokens", "flops", "ttft_ms", "memory_gib")


class Budget(Section):
    """How many video tokens may enter the LLM: the most that meet every limit given; at least one limit.

    retain: share of the video's own tokens, per video, in (0, 1].
    tokens: count per video, at least 1.
    flops: share of the unpatched LLM prefill (text included), per prompt, in (0, 1].
    ttft_ms: time to the first token of a prompt by itself, from `generate` on, as predicted for the device.
    memory_gib: peak memory of a prompt by itself, weights included, as computed from the sizes.
    exact: exactly that many tokens, known before a feature exists; false follows the authors' rounding, which limits
        other than `retain` are then met by about.
    """

    retain: float | None = Field(None, gt=0, le=1)
    tokens: int | None = Field(None, ge=1)
    flops: float | None = Field(None, gt=0, le=1)
    ttft_ms: float | None = Field(None, gt=0)
    memory_gib: float | None = Field(None, gt=0)
    exact: bool = True

    @model_validator(mode="after")
    def _some_limit(self) -> Budget:
        if all(getattr(self, k) is None for k in LIMITS):
            raise ValueError(f"at least one of {', '.join(LIMITS)} is needed; got none")
        return self

    @property
    def of_prompt(self) -> list[str]:
        """The limits that are solved for a prompt, not for a video alone."""
        return [k for k in ("flops", "ttft_ms", "memory_gib") if getattr(self, k) is not None]

    @property
    def estimated(self) -> list[str]:
        """The limits that need a cost model of the whole model: its tower, its projector, its decoder."""
        return [k for k in ("ttft_ms", "memory_gib") if getattr(self, k) is not None]

    def cap(self, total: int) -> int:
        """The most tokens of a video of `total` = T N that `retain` and `tokens` allow."""
        most = total
        if self.retain is not None:
            # the share as it is written: 0.009 of 1500 is 13.5, which floats put below the half
            most = min(most, max(1, math.floor(Fraction(str(self.retain)) * total + Fraction(1, 2))))
        return most if self.tokens is None else min(most, self.tokens)

    def keep(self, total: int) -> int:
        """K, the tokens to keep of a video of `total` = T N tokens (separators not counted).

        A budget with limits on the prompt needs the prompt: see `holimerge.planning.solve.share_out`.
        """
        if self.of_prompt:
            raise ValueError(f"a {self.of_prompt[0]} budget is solved for a prompt, not for a video alone")
        return self.cap(total)


class OuterOptions(Section):
    """What every outer reduction shares; a method adds its own keys in its file.

    at: reduce the projector's input (fewer tokens are projected) or its output (the authors' way).
    order: sequence by raster order of the tokens' anchors, or by segment with its static tokens first.
    positions: contiguous re-numbers, original keeps each anchor's; auto is contiguous on 1-D RoPE, original on mRoPE.
    """

    at: Literal["projector_input", "projector_output"] = "projector_input"
    order: Literal["raster", "segment"] = "raster"
    positions: Literal["auto", "contiguous", "original"] = "auto"


class Inner(Section):
    """Merging inside the LLM, once, at decoder layer `layer`.

    layer: an index of at least 1, or a share of the depth in (0, 1): the nearest layer that the model allows.
    retain: share of the prompt's entering video tokens that is kept, in (0, 1].
    merge: mean (weighted by the tokens each holds, order-independent), pairwise (the authors' running average),
        drop (nothing is merged, as FastV).
    compact_cache: after the prompt, layers below `layer` forget the merged tokens too. Decoding then reads and holds
        less, and those layers no longer see what they saw of them: an approximation beyond the merge itself.
    """

    layer: int | float
    retain: float = Field(0.5, gt=0, le=1)
    merge: Literal["mean", "pairwise", "drop"] = "mean"
    compact_cache: bool = False

    @field_validator("layer")
    @classmethod
    def _layer(cls, value: int | float) -> int | float:
        good = value >= 1 if isinstance(value, int) else 0 < value < 1
        if isinstance(value, bool) or not good:
            raise ValueError(
                "a layer is an index of at least 1 (the query's attention is read one layer below) "
                "or a share of the depth between 0 and 1"
            )
        return value

    def resolve(self, depth: int, valid: Sequence[int] = ()) -> int:
        """The decoder layer's index in a model of `depth` layers; ConfigError if there is no such layer.

        A share of the depth goes to the nearest of the `valid` layers, if they are given (the lower of two).
        """
        layer = self.layer
        if isinstance(layer, float):
            wanted = min(max(1, round(layer * depth)), depth - 1)
            layer = min(valid, key=lambda k: (abs(k - wanted), k), default=wanted)
        if not 1 <= layer < depth:
            raise ConfigError(
                f"inner.layer: {self.layer} is not a layer of this model; valid: 1 to {depth - 1}, "
                "or a share of the depth between 0 and 1"
            )
        return layer

    def keep(self, count: int) -> int:
        """How many of `count` video tokens stay: Python's round (half to even, as the authors'), at least one."""
        return inner_kept(count, self.retain) if count else 0


class Config(Section):
    """A whole configuration; see `load_config`.

    method: a name of `holimerge.list_methods()`.
    budget: None for a method that keeps all tokens.
    outer: the method's options (None for a method that has none).
    inner: None for no merging inside the LLM.
    encoder: None for no reduction inside the vision tower.
    chunk_frames: temporal steps per call of the vision tower, for long videos; None for one call.
    tower_attention: where a tower attends in windows or frames of one long sequence, stock calls attention once for
        each, batched once for all of one length; auto is batched on a GPU, where a call costs more than its work, and
        stock on a CPU, where batched saves little and is equal to the unpatched model only up to rounding.
    treat_images_as_video: the images of a prompt (two or more, of one size) are the frames of a video.
    cuda_graph: on a GPU, calls of LLaVA's vision towers are captured once for each shape of their input and replayed,
        so that the host no longer launches every kernel; the memory of a call stays taken. Without a GPU, in towers
        that wait for the device at each call, and where gradients are on, it changes nothing.
    more_frames: how many times as many frames as asked for are read (by `holimerge ask`, `eval` and `bench`): what the
        reduction saves is spent on seeing more. A patched model itself takes the frames that it is given.
    """

    method: str
    budget: Budget | None = None
    outer: SerializeAsAny[OuterOptions] | None = None
    inner: Inner | None = None
    encoder: Encoder | None = None
    chunk_frames: int | None = Field(None, ge=1)
    cuda_graph: bool = False
    tower_attention: Literal["auto", "stock", "batched"] = "auto"
    treat_images_as_video: bool = False
    more_frames: int = Field(1, ge=1)

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        if value not in list_methods():
            raise ValueError(f"unknown method{nearest(value, list_methods())} Valid: {', '.join(list_methods())}")
        return value

    @field_validator("outer", mode="before")
    @classmethod
    def _outer(cls, value: Any, info: ValidationInfo) -> Any:
        if "method" not in info.data:  # the method itself is wrong; its own error is enough
            return None
        options = method_module(info.data["method"]).METHOD.options
        if options is None:
            if value is not None:
                raise ValueError(f"method {info.data['method']} takes no outer block")
            return None
        if isinstance(value, OuterOptions):
            value = value.model_dump()
        return options.model_validate({} if value is None else value, strict=True)

    @model_validator(mode="after")
    def _fits_method(self) -> Config:
        method = method_module(self.method).METHOD
        if method.options is None and self.budget is not None:
            raise ValueError(f"budget: method {self.method} keeps every token and takes no budget")
        if method.options is None and self.chunk_frames is not None:
            raise ValueError(f"chunk_frames: method {self.method} makes the stock call of the tower, in one piece")
        if method.options is None and self.tower_attention == "batched":
            raise ValueError(f"tower_attention: method {self.method} makes the stock call of the tower")
        self._fits_encoder(method.options is None)
        self._fits_graph(method.options is None)
        if method.options is not None and self.budget is None:
            raise ValueError(
                f"budget: method {self.method} needs one, e.g. {{retain: 0.1}}, {{tokens: 640}} or {{ttft_ms: 300}}"
            )
        if method.options is not None and self.outer is None:
            # `outer` was absent, so its validator did not run: take the method's defaults
            object.__setattr__(self, "outer", method.options())
        return self

    def _fits_encoder(self, keeps_all: bool) -> None:
        if self.encoder is None:
            return
        if keeps_all:
            raise ValueError(f"encoder: method {self.method} makes the stock call of the tower")
        if self.treat_images_as_video:
            raise ValueError(
                "encoder: treat_images_as_video encodes every frame as an image of its own; hand the frames over as a "
                "video, or leave encoder out"
            )
        if self.chunk_frames is not None and self.encoder.frames is not None:
            raise ValueError(
                "chunk_frames: encoder.frames compares the frames of a whole video inside the tower; leave one of both "
                "out"
            )

    def _fits_graph(self, keeps_all: bool) -> None:
        if not self.cuda_graph:
            return
        if keeps_all:
            raise ValueError(f"cuda_graph: method {self.method} makes the stock call of the tower")
        if self.treat_images_as_video:
            raise ValueError("cuda_graph: treat_images_as_video encodes images, whose number varies; leave one out")
        if self.encoder is not None and self.encoder.tokens is None:
            raise ValueError(
                f"cuda_graph: encoder.{self.encoder.kind} decides on the host how many frames go on, so that the call "
                "cannot be captured; use encoder.tokens, or leave one of both out"
            )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that `load_config` turns back into an equal configuration."""
        return _without_defaults_of_null(self)

    def to_yaml(self) -> str:
        """YAML text that `load_config` (as a file) turns back into an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _without_defaults_of_null(section: BaseModel) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            plain[name] = _without_defaults_of_null(value)
        elif value is not None or info.default is not None:
            plain[name] = value
    return plain


class _UniqueKeyLoader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, where YAML would silently take the last."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"{key!r}: a key is a word (line {key_node.start_mark.line + 1})")
        if key in seen:
            raise ConfigError(f"{key}: given twice (line {key_node.start_mark.line + 1})")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _parse_yaml(text: str, origin: str) -> dict[str, Any]:
    try:
        # what yaml.safe_load does, by our subclass of its loader: no tag can construct a Python object
        loader = _UniqueKeyLoader(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: a configuration is a mapping of keys, got {type(data).__name__}")
    return data


def _override(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            below = dict(merged[key])
            if key == "budget" and set(LIMITS) & set(value):
                # other limits replace the preset's, they do not stand beside it
                below = {k: v for k, v in below.items() if k not in LIMITS}
            if key == "encoder" and set(value) - set(below):
                below = {}  # so does another kind of encoder reduction
            if key == "tokens" and {"r", "keep"} & set(value):
                below = {k: v for k, v in below.items() if k not in ("r", "keep")}
            merged[key] = _override(below, value)
        else:
            merged[key] = value
    return merged


def _with_base(data: Mapping[str, Any], seen: tuple[str, ...] = ()) -> dict[str, Any]:
    changes = dict(data)
    base = changes.pop("base", None)
    if base is None:
        return changes
    if not isinstance(base, str) or base not in list_presets():
        raise ConfigError(
            f"base: {base!r} is no preset{nearest(base, list_presets())} Valid: {', '.join(list_presets())}"
        )
    if base in seen:
        raise ConfigError(f"base: presets name each other in a circle: {' -> '.join((*seen, base))}")
    return _override(_with_base(_parse_yaml(preset_text(base), f"preset {base}"), (*seen, base)), changes)


def _known_keys(path: tuple[Any, ...], method: Any) -> list[str]:
    if not path:
        return [*Config.model_fields, "base"]
    if path[0] == "outer":
        options: type[BaseModel] | None = OuterOptions
        if method in list_methods():
            options = method_module(method).METHOD.options
        return list(options.model_fields) if options is not None else []
    sections: dict[str, type[BaseModel]] = {"budget": Budget, "inner": Inner, "encoder": Encoder}
    kinds: dict[str, type[BaseModel]] = {"frames": Frames, "tokens": Tokens, "gate": Gate}
    section = sections.get(str(path[0])) if len(path) == 1 else kinds.get(str(path[1]))
    return list(section.model_fields) if section else []


def _explain(error: ValidationError, data: Mapping[str, Any]) -> str:
    lines = []
    for e in error.errors():
        # a union's branches appear in the location ("layer", "int"): they are no keys of the user's
        path = e["loc"][:-1] if e["loc"][-2:-1] == ("layer",) else e["loc"]
        name = ".".join(map(str, path)) or "configuration"
        value, kind, ctx = e["input"], e["type"], e.get("ctx", {})
        if kind == "extra_forbidden":
            keys = _known_keys(path[:-1], data.get("method"))
            text = f"unknown key{nearest(path[-1], keys)} Valid: {', '.join(keys)}"
        elif kind == "missing":
            text = f"missing; valid: {', '.join(list_methods())}" if name == "method" else "missing"
        elif kind == "value_error":
            shown = f"{value!r}: " if path and not isinstance(value, Mapping) else ""
            text = f"{shown}{ctx['error']}"
        elif path == ("method",):
            text = f"{value!r} is not valid; valid: {', '.join(list_methods())}"
        elif path and path[-1] == "layer":  # one wrong value, two branches of a union
            text = f"{value!r} is neither an index of at least 1 nor a share of the depth between 0 and 1"
        elif kind == "literal_error":
            choices = re.findall(r"'([^']*)'", ctx["expected"])
            text = f"{value!r} is not valid{nearest(value, choices)} Valid: {', '.join(choices)}"
        else:
            text = f"{value!r} is not valid: {e['msg']}"
        line = f"{name}: {text}" if path else text
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def load_config(cfg: str | os.PathLike[str] | Mapping[str, Any] | Config) -> Config:
    """Read a configuration.

    Args:
        cfg: a preset's name (`list_presets()`), a path to a YAML file, a dict, or a `Config` (returned as it is).
            A dict or file may name a preset as `base` and override keys of it.

    Raises:
        ConfigError: (a ValueError) naming the key's path, the value and the valid choices or the nearest spelling.
        FileNotFoundError: the path does not exist.
        TypeError: `cfg` is none of these.
    """
    if isinstance(cfg, Config):
        return cfg
    if isinstance(cfg, Mapping):
        data, origin = _with_base(cfg), ""
    elif isinstance(cfg, (str, os.PathLike)):
        text = os.fspath(cfg)
        if text in list_presets():
            data, origin = _with_base({"base": text}), f"preset {text}: "
        elif Path(text).is_file():
            try:
                content = Path(text).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{text}: not a UTF-8 text: {error}") from None
            data, origin = _with_base(_parse_yaml(content, text)), f"{text}: "
        elif text.endswith((".yaml", ".yml")) or os.sep in text:
            raise FileNotFoundError(f"no configuration file {text!r}")
        else:
            presets = list_presets()
            raise ConfigError(f"no preset {text!r}{nearest(text, presets)} Valid: {', '.join(presets)}, or a YAML path")
    else:
        raise TypeError(f"cfg is a preset's name, a path, a dict or a Config, not {type(cfg).__name__}")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(origin + _explain(error, data)) from None
