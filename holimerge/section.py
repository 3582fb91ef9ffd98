"""A block of the configuration, and the error of one that cannot be used."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key's path, the value and what is valid."""


class Section(BaseModel):
    """A block of the configuration: unknown keys and loose types are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
