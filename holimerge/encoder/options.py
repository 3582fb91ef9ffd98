"""The `encoder` block of a configuration: exactly one of `frames`, `tokens` and `gate`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..section import ConfigError, Section


class Layered(Section):
    """What happens at some blocks of the tower.

    layers: blocks of the tower, each an index or a share of the depth in (0, 1).
    """

    first: ClassVar[int]  # the lowest index that makes sense
    layers: list[int | float] | None

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        valid = f"an index of at least {cls.first} or a share of the depth between 0 and 1"
        if value is None and not cls.model_fields["layers"].is_required():
            return None
        if not isinstance(value, list) or not value:
            raise ValueError(f"a list of layers is needed, each {valid}")
        for layer in value:
            index = isinstance(layer, int) and not isinstance(layer, bool) and layer >= cls.first
            if not index and not (isinstance(layer, float) and 0 < layer < 1):
                raise ValueError(f"{layer!r} is no layer; valid: {valid}")
        return value

    def resolve(self, kind: str, depth: int) -> list[int]:
        """Indices of the blocks in a tower whose features come from its first `depth` blocks, ascending.

        Raises:
            ConfigError: the tower has no such block.
        """
        if self.layers is None:
            return list(range(depth))
        found = set()
        for layer in self.layers:
            index = layer
            if isinstance(layer, float):  # at least the first block, unless there is none to choose from
                index = min(max(self.first, round(layer * depth)), depth - 1)
            if not self.first <= index < depth:
                raise ConfigError(
                    f"encoder.{kind}.layers: {layer} is not a block that the features of this tower come from; "
                    f"valid: {self.first} to {depth - 1}, or a share of the depth between 0 and 1"
                )
            found.add(int(index))
        return sorted(found)


class Frames(Layered):
    """Similar frames become one on entering these blocks (`holimerge.encoder.frames`).

    layers: blocks of the tower, each an index of at least 1 or a share of the depth in (0, 1).
    similarity: a frame whose running similarity to its segment's first frame is below starts a segment, in (0, 1].
    longest: frames of a segment at most.
    merge: two frames merge from this similarity on; null for that of their segment's first and last frame.
    """

    first: ClassVar[int] = 1
    layers: list[int | float]
    similarity: float = Field(0.65, gt=0, le=1)
    longest: int = Field(8, ge=1)
    merge: float | None = Field(None, ge=-1, le=1)


class Tokens(Layered):
    """Similar tokens of a frame become one in these blocks (`holimerge.encoder.tokens`).

    layers: blocks of the tower, each an index or a share of the depth in (0, 1); null for all.
    r: tokens merged away in each frame at each of these blocks (in Qwen ViTs a token is the patches of one of the
        LLM's, and where they attend in windows, r is of each window); at most half of those there are.
    keep: instead of r, the share of a frame's (or window's) tokens that is left behind the last of these blocks, in
        (0, 1]; equal parts merge at each of them, at most half of those there are.
    """

    first: ClassVar[int] = 0
    layers: list[int | float] | None = None
    r: int | None = Field(default=None, ge=0)
    keep: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_amount(self) -> Tokens:
        if (self.r is None) == (self.keep is None):
            raise ValueError("exactly one of r, keep is needed; got " + ("both" if self.r is not None else "none"))
        return self

    @property
    def nothing(self) -> bool:
        """Whether no token ever merges."""
        return self.r == 0 or self.keep == 1

    def gone(self, place: int, blocks: int, total: int, left: int) -> int:
        """Tokens to merge away in a frame of `total`, of which `left` are left, at the block `place` of so many."""
        if self.keep is None:
            return int(self.r or 0)
        return max(0, left - round(total * (1 - (1 - self.keep) * (place + 1) / blocks)))


class Gate(Section):
    """What did not change is not encoded (`holimerge.encoder.gate`).

    unit: "frame": a frame is encoded as a whole or takes all its features from the last one that was; "patch": each
        place of a frame (a patch; where the tower has a merger, the patches of one token) is encoded anew or takes its
        features from the frame it was last encoded in. Places that are encoded attend to those of their frame alone.
    threshold: a patch (or place) has changed if the mean absolute difference of its pixel values, as the processor
        scales them, is above this.
    changed: a frame is encoded as a whole if more than this share of its patches (or places) has changed, in [0, 1);
        null for 0 with frames and 0.03 with patches, since places without what stands around them are a poor likeness
        of more than that (on the embedded benchmark).
    """

    unit: Literal["frame", "patch"] = "frame"
    threshold: float = Field(0.0, ge=0)
    changed: float | None = Field(None, ge=0, lt=1)

    @property
    def most(self) -> float:
        """The share that `changed` stands for."""
        if self.changed is None:
            return 0.03 if self.unit == "patch" else 0.0
        return self.changed


class Encoder(Section):
    """Reduction inside the vision tower; the outer reduction then works on as many tokens as without it."""

    frames: Frames | None = None
    tokens: Tokens | None = None
    gate: Gate | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Encoder:
        given = [k for k in ("frames", "tokens", "gate") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of frames, tokens, gate is needed; got {' and '.join(given) if given else 'none'}"
            )
        return self

    @property
    def kind(self) -> str:
        """The one that is given: frames, tokens or gate."""
        return next(k for k in ("frames", "tokens", "gate") if getattr(self, k) is not None)

    @property
    def need(self) -> str:
        """What is asked of a tower: the kind, or patches for a gate of these."""
        return "patches" if self.gate is not None and self.gate.unit == "patch" else self.kind
