"""`holimerge eval`: a model under several configurations on benchmarks, fairly and so that it can be killed.

The order is: video by video, and for each video configuration by configuration. A video is decoded and preprocessed
once for all of them, and encoded once for all its questions in each (`reuse`). Answers are written as they come
(`records`). What is asked, and how, is settled before a weight is loaded (`plan`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .conditions import conditions
from .frame_cache import FrameCache
from .load import DTYPES, Loaded, load, read_config
from .plan import Plan, data_roots, identity_of, load_configs, plan_task
from .records import RESULTS, Key, Writer, check_run, merge_files, open_run, read_json, read_records, write_json
from .run import devices_of
from .runner import Meter, Runner, Video
from .scores import results_of
from .tasks.base import Sample, Task
from .workers import STALL_SECONDS, Worker, agreed, this_worker, wait_for_all

MACHINE = "machine.json"


def evaluate(
    model: str,
    configs: Sequence[str],
    tasks: Sequence[str | Task],
    output: Path,
    *,
    data: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    num_frames: int = 32,
    protocol: str | None = None,
    sampling: str | None = None,
    resume: bool = False,
    device_map: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    cache: FrameCache | None = None,
    reuse: bool = True,
    stall_seconds: float = STALL_SECONDS,
    meter: Meter | None = None,
) -> dict[str, Any] | None:
    """Answer every question of the tasks under every configuration.

    Args:
        model: a hub id or a folder.
        configs: presets, YAML files, or "unpatched".
        tasks: names of `holimerge.eval.tasks.list_tasks()`, or tasks.
        output: the run's folder; with several processes one that all of them see.
        data: "ROOT" for all tasks, "TASK=ROOT" for one; a task without gets None (the hub's cache).
        limit: only the first samples of each data set.
        batch_size: prompts generated together (likelihoods are scored one prompt at a time).
        seed: of random fallbacks and intervals; answers themselves are greedy.
        num_frames: frames of each video; at most so many under `fps` sampling.
        protocol: of prompts and answer extraction; None is each task's first.
        sampling: rule of `holimerge.video`; None is the protocol's.
        resume: go on with the run in `output`.
        device_map, dtype, attn_implementation: as `holimerge.eval.load.load` takes them. Of several processes each
            takes the GPU of its local number, unless a device_map is given.
        cache: of sampled frames; None decodes every time.
        reuse: encode a video once for all its questions.
        stall_seconds: how long process 0 waits without any new answer of the others.
        meter: shows how far it is.

    Returns:
        what results.json holds (`holimerge.eval.scores.results_of`); None in every process but the first.

    Raises:
        ConfigError, ValueError, TypeError, FileNotFoundError, OSError: whatever is wrong with the arguments, the data,
            the output folder or the checkpoint, before weights are loaded where it can be known.
        TimeoutError: another process has died.
    """
    for name, number in (("batch_size", batch_size), ("num_frames", num_frames), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: {number}; at least 1 is needed")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; valid: {', '.join(DTYPES)}")
    worker = this_worker()
    meter = meter if meter is not None and worker.rank == 0 else None
    chosen = load_configs(configs)
    hf_config = read_config(model)
    for config in chosen.values():
        if config is not None and config.inner is not None:
            config.inner.resolve(hf_config.text_config.num_hidden_layers)
    plans = plan_tasks(tasks, data, protocol=protocol, sampling=sampling, limit=limit)
    identity = identity_of(
        model,
        hf_config,
        chosen,
        plans,
        seed=seed,
        num_frames=num_frames,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    agreed(worker, lambda: open_run(output, identity, resume))
    if worker.rank:
        if not output.is_dir():
            raise ValueError(f"{output}: process {worker.rank} does not see the folder of process 0; it must be shared")
        check_run(output, identity)
    done = read_records(output).keys()
    keys = [key for plan in plans for key in plan.keys(chosen)]
    mine = [_share(plan, chosen, done, worker) for plan in plans]
    if meter is not None:
        total = sum(len(group) for plan in plans for group in _groups(plan, worker)) * len(chosen)
        meter.begin(total, total - sum(len(video.missing) for share in mine for video in share))
    if any(mine):
        if meter is not None:
            meter.say("loading the model")
        loaded = _loaded(model, worker, device_map, dtype, attn_implementation)
        if worker.rank == 0:
            machine = _machine(loaded, worker, batch_size, reuse, cache)
            write_json(output / MACHINE, _with_earlier(output / MACHINE, machine) if done else machine)
        with Writer(output, worker.rank) as write:
            runner = Runner(loaded, chosen, write, meter, batch_size, seed, num_frames, cache, reuse)
            runner.check()
            if meter is not None:
                meter.say("asking")
            for plan, share in zip(plans, mine, strict=True):
                runner.run(plan, share)
    if worker.rank:
        return None
    wait_for_all(output, keys, _waiting(meter), stall_seconds)
    records = merge_files(output, keys)
    machine = read_json(output / MACHINE) if (output / MACHINE).is_file() else {}
    results = results_of(identity, plans, chosen, records, machine)
    write_json(output / RESULTS, results)
    return results


def plan_tasks(
    tasks: Sequence[str | Task],
    data: Sequence[str],
    *,
    protocol: str | None = None,
    sampling: str | None = None,
    limit: int | None = None,
) -> list[Plan]:
    """Find tasks by name and load their samples; raises as `holimerge.eval.plan` says."""
    from .tasks import get_task, list_tasks

    if not tasks:
        raise ValueError(f"no task: give one of {', '.join(list_tasks())}")
    found = [get_task(task) if isinstance(task, str) else task for task in tasks]
    names = [task.name for task in found]
    if len(set(names)) < len(names):  # records would be taken for one another's
        raise ValueError(f"a task is there twice: {', '.join(names)}")
    roots = data_roots(data, names, list_tasks())
    return [plan_task(task, roots.get(task.name), protocol=protocol, sampling=sampling, limit=limit) for task in found]


def _groups(plan: Plan, worker: Worker) -> list[list[Sample]]:
    """The videos of one process: every N-th, whole, so that each is decoded and encoded in one place."""
    return plan.groups()[worker.rank :: worker.size]


def _share(plan: Plan, configs: Mapping[str, Any], done: Collection[Key], worker: Worker) -> list[Video]:
    """What one process still has to do."""
    share = []
    for group in _groups(plan, worker):
        asked = {(name, sample.id) for name in configs for sample in group}
        missing = {(name, sample) for name, sample in asked if (plan.task.name, name, sample) not in done}
        if missing:
            share.append(Video(group, missing))
    return share


def _loaded(model: str, worker: Worker, device_map: str | None, dtype: str, attn: str | None) -> Loaded:
    import torch

    if device_map is None and worker.size > 1 and torch.cuda.is_available():
        device_map = f"cuda:{worker.local % torch.cuda.device_count()}"
    return load(model, device_map=device_map, dtype=dtype, attn_implementation=attn)


def _machine(loaded: Loaded, worker: Worker, batch_size: int, reuse: bool, cache: FrameCache | None) -> dict[str, Any]:
    """Conditions of the answers: where and with which settings that change times only."""
    return conditions(
        loaded.model.device,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        attn=str(getattr(loaded.model.config, "_attn_implementation", None)),
        devices_used=max(1, len(devices_of(loaded.model))),
        processes=worker.size,
        batch_size=batch_size,
        reuse=reuse,
        frame_cache=cache is not None,
    )


def _with_earlier(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Conditions, with those of earlier starts of this run that differ in more than load and date as `earlier`."""

    def told(one: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in one.items() if key not in ("load_average", "date", "earlier")}

    if not path.is_file():
        return machine
    before, now = read_json(path), json.loads(json.dumps(machine))
    earlier = list(before.get("earlier", []))
    for one in (told(before), told(now)):
        earlier = [other for other in earlier if told(other) != one]
    if told(before) != told(now):
        earlier.append({key: value for key, value in before.items() if key != "earlier"})
    return {**machine, "earlier": earlier} if earlier else machine


def _waiting(meter: Meter | None) -> Callable[[int], None]:
    def say(missing: int) -> None:
        if meter is not None:
            meter.say(f"waiting for {missing} answers of other processes")

    return say
