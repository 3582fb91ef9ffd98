"""What a run is going to do, decided before any weight is loaded: tasks, configurations, samples, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holimerge.config import Config, load_config
from holimerge.registry import list_presets
from holimerge.video import SAMPLINGS

from .conditions import version_of
from .frame_cache import sampled_hash
from .records import SCHEMA, Key
from .tasks.base import Sample, Task

UNPATCHED = "unpatched"
_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class Plan:
    """One task of a run: its samples, those of one video together, and how they are asked."""

    task: Task
    protocol: str
    sampling: str
    max_new_tokens: int
    samples: tuple[Sample, ...]
    revision: str
    source: str

    def groups(self) -> list[list[Sample]]:
        """The samples by video (or part of a video), in the order in which the videos first appear."""
        found: dict[tuple[Any, ...], list[Sample]] = {}
        for sample in self.samples:
            place = (sample.video_id, str(sample.video), sample.start, sample.end)
            found.setdefault(place, []).append(sample)
        return list(found.values())

    def keys(self, configs: Mapping[str, Any]) -> list[Key]:
        """(task, config, id) of every answer the task needs."""
        return [(self.task.name, name, sample.id) for name in configs for sample in self.samples]

    def identity(self) -> dict[str, Any]:
        """What may change an answer, ready for JSON."""
        # what is asked besides the annotations' revision: cut and whole videos, for instance, are of one revision
        asked = [(s.id, s.video_id, s.question, s.options, s.answer, s.start, s.end) for s in self.samples]
        return {
            "revision": self.revision,
            "protocol": self.protocol,
            "sampling": self.sampling,
            "answer_by": self.task.answer_by,
            "max_new_tokens": self.max_new_tokens,
            "samples": len(self.samples),
            "samples_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        }


def split_names(values: Sequence[str]) -> list[str]:
    """Names given several times or joined by commas, each once, in order."""
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def load_configs(names: Sequence[str]) -> dict[str, Config | None]:
    """Configurations by the name they have in tables: a preset's, a file's stem, or `unpatched` (None).

    Raises:
        ConfigError: a configuration that cannot be used.
        ValueError: none at all, or two of one name.
    """
    found: dict[str, Config | None] = {}
    for given in names:
        name = given if given == UNPATCHED or given in list_presets() else Path(given).stem
        if name == UNPATCHED != given:
            raise ValueError(f"config {given!r}: {UNPATCHED!r} is the name of the model as it is; rename the file")
        if name in found:
            raise ValueError(f"config {given!r}: there is another one called {name!r}; rename its file")
        found[name] = None if given == UNPATCHED else load_config(given)
    if not found:
        raise ValueError(f"no config: give {UNPATCHED}, a preset ({', '.join(list_presets())}) or a YAML file")
    return found


def data_roots(values: Sequence[str], tasks: Sequence[str], known: Sequence[str]) -> dict[str, Path]:
    """Where each task's data lie, from `--data ROOT` (all tasks) and `--data TASK=ROOT`.

    Raises:
        ValueError: two roots for one task, or one for a task that is not asked for.
    """
    roots: dict[str, Path] = {}
    everybody: Path | None = None
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and name in {*tasks, *known}:
            if name not in tasks:
                raise ValueError(f"--data {value}: task {name!r} is not asked for; asked are {', '.join(tasks)}")
            if name in roots:
                raise ValueError(f"--data {value}: task {name!r} has a folder already, {roots[name]}")
            roots[name] = Path(rest).expanduser()
        elif everybody is not None:
            raise ValueError(f"--data {value}: {everybody} is there for all tasks; write TASK=FOLDER for several")
        else:
            everybody = Path(value).expanduser()
    if everybody is not None:
        roots = {name: roots.get(name, everybody) for name in tasks}
    return roots


def plan_task(
    task: Task, root: Path | None, *, protocol: str | None = None, sampling: str | None = None, limit: int | None = None
) -> Plan:
    """Load a task's samples and settle how they are asked.

    Args:
        task: the benchmark.
        root: its data, as `Task.load` takes it.
        protocol: None is the task's own.
        sampling: rule of frame sampling; None is the protocol's.
        limit: only the first samples of the data set.

    Raises:
        ValueError: a protocol or rule the task does not know, no samples, or ids that are not unique.
        whatever `Task.load` raises.
    """
    if protocol is not None and protocol not in task.protocols:
        raise ValueError(f"task {task.name}: unknown protocol {protocol!r}; valid: {', '.join(task.protocols)}")
    chosen = protocol if protocol is not None else task.protocols[0]
    rule = sampling if sampling is not None else task.sampling[chosen]
    if rule not in SAMPLINGS:
        raise ValueError(f"task {task.name}: unknown sampling {rule!r}; valid: {', '.join(SAMPLINGS)}")
    loaded = task.load(root)
    samples = list(loaded.samples)[:limit]
    if not samples:
        raise ValueError(f"task {task.name}: {loaded.source} has no samples")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ValueError(f"task {task.name}: two samples have the id {sample.id!r}")
        seen.add(sample.id)
    return Plan(
        task,
        chosen,
        rule,
        task.max_new_tokens[chosen],
        tuple(samples),
        loaded.revision,
        loaded.source,
    )


def model_revision(model: str, config: Any) -> str:
    """What stands for a checkpoint: the hub's commit, or a hash over the files of a folder.

    model: as given; config: the loaded Hugging Face config.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or "unknown")
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_FILES and path.is_file():
            digest.update(f"{path.name} {sampled_hash(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def identity_of(
    model: str,
    hf_config: Any,
    configs: Mapping[str, Config | None],
    plans: Sequence[Plan],
    *,
    seed: int,
    num_frames: int,
    dtype: str,
    attn_implementation: str | None,
) -> dict[str, Any]:
    """Everything that may change an answer, ready for JSON; a run is only resumed with the same."""
    return {
        "schema": SCHEMA,
        "model": model,
        "model_type": hf_config.model_type,
        "model_revision": model_revision(model, hf_config),
        "configs": {name: None if config is None else config.to_dict() for name, config in configs.items()},
        "tasks": {plan.task.name: plan.identity() for plan in plans},
        "seed": seed,
        "num_frames": num_frames,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "versions": {package: version_of(package) for package in ("holimerge", "torch", "transformers", "av")},
    }
