"""A run survives being killed at any moment: no answer lost, none counted twice, nothing mixed."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_toys import save_checkpoint, save_data, timeless, toy_samples, toy_task
from rich.console import Console

from holimerge.eval.evaluate import evaluate
from holimerge.eval.records import Writer, differences, key_of, lines_of, merge_files, open_run, read_records
from holimerge.eval.show_eval import show_results
from holimerge.eval.workers import Worker, agreed, this_worker, wait_for_all

pytest.importorskip("av")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
CONFIGS = ["unpatched", "holimerge-25"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint("llava_onevision", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_data(tmp_path_factory.mktemp("data"), videos=5, questions=3, broken=(1,))


def run(checkpoint: str, data: str, output: Path, **changes: Any) -> dict[str, Any] | None:
    task = toy_task(toy_samples(data), **changes.pop("task", {}))
    settings: dict[str, Any] = {"num_frames": 4, "configs": CONFIGS, **changes}
    return evaluate(checkpoint, settings.pop("configs"), [task], output, **settings)


def lines(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output.glob("records*.jsonl"))


# --- lines and files -------------------------------------------------------------------------------------------------


def record(n: int, config: str = "a") -> dict[str, Any]:
    return {"task": "t", "config": config, "id": str(n), "text": "\u2028 newline\n in it"}


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    with Writer(tmp_path) as write:
        for n in range(3):
            write(record(n))
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(last, len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = 3 if cut == len(whole) else 2
        assert len(read_records(tmp_path)) == kept
        with Writer(tmp_path) as write:
            write(record(9))
        assert [r["id"] for r in lines_of(path)[0]] == [*["0", "1", "2"][:kept], "9"]


def test_a_line_of_a_machine_that_lost_power(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    good = json.dumps(record(0)).encode() + b"\n"
    path.write_bytes(good + b"\0" * 40 + b"\n")
    assert len(read_records(tmp_path)) == 1
    path.write_bytes(b"\0" * 40 + b"\n" + good)
    with pytest.raises(ValueError, match=r"records\.jsonl, line 1: is damaged"):
        read_records(tmp_path)


def test_a_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    with Writer(tmp_path) as write:
        for n in range(3):
            write(record(n))
            assert len(read_records(tmp_path)) == n + 1


def test_files_of_processes_are_joined_in_order(tmp_path: Path) -> None:
    for rank, numbers in ((0, (4, 0)), (1, (1, 3)), (2, (2, 4))):  # 4 is there twice: killed while joining
        with Writer(tmp_path, rank) as write:
            for n in numbers:
                write(record(n))
    order = [("t", "a", str(n)) for n in range(5)]
    assert [key_of(r) for r in merge_files(tmp_path, order)] == order
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
    assert [key_of(r) for r in lines_of(tmp_path / "records.jsonl")[0]] == order


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    identity = {"seed": 0, "configs": {"a": {"x": [1, 2]}}}
    open_run(tmp_path / "new", identity, resume=False)
    open_run(tmp_path / "also new", identity, resume=True)
    open_run(tmp_path / "new", identity, resume=True)
    with pytest.raises(ValueError, match="--resume"):
        open_run(tmp_path / "new", identity, resume=False)
    with pytest.raises(ValueError, match=r"configs\.a\.x: \[1, 2\], now \[1, 3\]"):
        open_run(tmp_path / "new", {"seed": 0, "configs": {"a": {"x": [1, 3]}}}, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(ValueError, match="not empty"):
            open_run(tmp_path / "other", identity, resume=resume)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".run.json.123").write_text('{"se')  # killed while it wrote run.json
    open_run(tmp_path / "killed", identity, resume=True)


def test_differences_are_named() -> None:
    old = {"a": {"b": 1, "c": None}, "d": "x"}
    assert list(differences(old, old)) == []
    assert list(differences({"a": {}}, {"a": {"unpatched": None}})) == ["a.unpatched: nothing, now null"]
    assert list(differences(old, {"a": {"b": 2, "c": None}, "e": "x"})) == [
        "a.b: 1, now 2",
        'd: "x", now nothing',
        'e: nothing, now "x"',
    ]


# --- killed and resumed ----------------------------------------------------------------------------------------------


def _child(
    work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for the life of the process)
    work(*args, **kwargs)


def forked(work: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None, **kwargs: Any) -> Any:
    assert FORK is not None
    child = FORK.Process(target=_child, args=(work, args, kwargs, environment or {}))
    child.start()
    return child


@forks
def test_killed_at_random_and_resumed(checkpoint: str, data: str, tmp_path: Path) -> None:
    whole = run(checkpoint, data, tmp_path / "whole")
    assert whole is not None
    total = lines(tmp_path / "whole")
    assert total == 30
    output, chance = tmp_path / "killed", random.Random(7)  # noqa: S311
    kills = stops = 0
    while lines(output) < total:
        child = forked(run, checkpoint, data, output, resume=True)
        goal = lines(output) + chance.randrange(5)
        deadline = time.monotonic() + 60
        while lines(output) < goal and child.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.random() * 0.08)
        child.kill()
        child.join()
        stops += child.exitcode == -signal.SIGKILL
        kills += 1
        if kills % 2 and (output / "run.json").exists():  # and as if it had been hit inside a line
            with (output / "records.jsonl").open("ab") as file:
                file.write(b'{"task": "toy", "config": "unpatched", "id": "v3-q')
        assert kills < 60
    assert stops >= 4
    found = run(checkpoint, data, output, resume=True)
    assert timeless(found) == timeless(whole)
    assert lines(output) == total
    both = [[timeless(r) for r in lines_of(folder / "records.jsonl")[0]] for folder in (output, tmp_path / "whole")]
    assert both[0] == both[1]


def test_another_run_is_refused_by_name(checkpoint: str, data: str, tmp_path: Path) -> None:
    run(checkpoint, data, tmp_path, configs=["keep-all"], limit=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed: list[tuple[dict[str, Any], str]] = [
        ({"configs": ["holimerge-10"]}, r"configs\.keep-all"),
        ({"configs": ["unpatched"]}, r"configs\.keep-all: .*, now nothing; configs\.unpatched: nothing, now null"),
        ({"configs": ["keep-all", "unpatched"]}, r"configs\.unpatched: nothing, now null"),
        ({"seed": 1}, "seed: 0, now 1"),
        ({"num_frames": 5}, "num_frames: 4, now 5"),
        ({"protocol": "other"}, r'toy\.protocol: "official", now "other"'),
        ({"sampling": "fps"}, r"toy\.sampling"),
        ({"limit": 3}, r"toy\.samples: 2, now 3"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"attn_implementation": "eager"}, "attn_implementation"),
        (
            {"task": {"load": lambda root: type(first)(first.samples, "revision 2", "here")}},
            r'toy\.revision: "revision 1"',
        ),
        ({"task": {"load": lambda root: type(first)(first.samples[::-1], first.revision, "here")}}, "samples_sha256"),
    ]
    first = toy_task(toy_samples(data)).load(None)
    for change, message in changed:
        with pytest.raises(ValueError, match=message):
            run(checkpoint, data, tmp_path, **{"configs": ["keep-all"], "limit": 2, "resume": True, **change})
    other = tmp_path.parent / "other model"
    for path in Path(checkpoint).iterdir():
        other.mkdir(exist_ok=True)
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="model: "):
        run(str(other), data, tmp_path, configs=["keep-all"], limit=2, resume=True)
    with pytest.raises(ValueError, match="--resume"):
        run(checkpoint, data, tmp_path, configs=["keep-all"], limit=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_questions_under_one_revision_are_refused(checkpoint: str, data: str, tmp_path: Path) -> None:
    """A revision is of the annotations; MVBench's cut segments and whole videos, say, have the same one."""
    samples = toy_samples(data)[:2]
    parts = [dataclasses.replace(sample, start=0.0, end=1.0) for sample in samples]
    settings: dict[str, Any] = {"num_frames": 4, "resume": True}
    evaluate(checkpoint, ["unpatched"], [toy_task(samples)], tmp_path / "out", **settings)
    with pytest.raises(ValueError, match=r"tasks\.toy\.samples_sha256"):
        evaluate(checkpoint, ["unpatched"], [toy_task(parts)], tmp_path / "out", **settings)


def test_other_weights_in_the_same_folder_are_refused(checkpoint: str, data: str, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in Path(checkpoint).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    run(str(copy), data, tmp_path / "out", configs=["unpatched"], limit=1)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="model_revision"):
        run(str(copy), data, tmp_path / "out", configs=["unpatched"], limit=1, resume=True)


def test_a_finished_run_is_only_read(
    checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(checkpoint, data, tmp_path, configs=["unpatched"], limit=3)
    monkeypatch.setattr("holimerge.eval.evaluate.load", lambda *a, **k: pytest.fail("the model was loaded"))
    assert run(checkpoint, data, tmp_path, configs=["unpatched"], limit=3, resume=True, batch_size=2) == first


def test_other_conditions_of_a_resumed_run_are_told(checkpoint: str, data: str, tmp_path: Path) -> None:
    """Times of two machines or batch sizes in one median are a mixture, which the summary has to say."""

    def half() -> None:
        path = tmp_path / "records.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
        (tmp_path / "results.json").unlink()

    def again(**changes: Any) -> tuple[dict[str, Any], str]:
        found = run(checkpoint, data, tmp_path, configs=["unpatched"], limit=4, resume=True, **changes)
        assert found is not None
        stream = io.StringIO()
        show_results(found, Console(file=stream, width=150))
        return found["conditions"], stream.getvalue()

    first, text = again()
    assert "earlier" not in first
    half()
    same, text = again()
    assert "earlier" not in same
    assert "mixture" not in text
    half()
    mixed, text = again(batch_size=2, reuse=False)
    assert [(e["batch_size"], e["reuse"]) for e in mixed["earlier"]] == [(1, True)]
    assert "resumed under other conditions (batch_size, reuse): times and memory are a mixture" in text
    half()
    back, _ = again()
    assert [(e["batch_size"], e["reuse"]) for e in back["earlier"]] == [(2, False)]


# --- several processes -----------------------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def ranked(count: int) -> list[dict[str, str]]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def test_launched_by_accelerate(checkpoint: str, data: str, tmp_path: Path) -> None:
    """Two processes by the real launcher and the real command line: one result, that of a single process."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", free_port(), "-m", "holimerge.eval"]
    launch += ["--model", checkpoint, "--config", "unpatched,holimerge-25", "--tasks", "custom", "--data", data]
    launch += ["--num_frames", "4", "--protocol", "lmms_eval_0_3", "--no-cache", "--json"]
    launch += ["--output_path", str(tmp_path / "two")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    alone = evaluate(
        checkpoint, CONFIGS, ["custom"], tmp_path / "one", data=[data], num_frames=4, protocol="lmms_eval_0_3"
    )
    assert timeless(json.loads(done.stdout)) == timeless(alone)  # one process alone has spoken
    assert json.loads((tmp_path / "two" / "results.json").read_text())["conditions"]["processes"] == 2
    assert [path.name for path in (tmp_path / "two").glob("records*")] == ["records.jsonl"]
    assert "unpatched" in done.stderr


@forks
def test_a_rank_that_dies_is_told_and_its_work_resumed(checkpoint: str, data: str, tmp_path: Path) -> None:
    whole = run(checkpoint, data, tmp_path / "whole")
    output = tmp_path / "two"
    first, second = ranked(2)

    def dies(*args: Any, **kwargs: Any) -> None:
        import holimerge.eval.runner as runner

        stock = runner.Runner._answers

        def answers(self: Any, *more: Any) -> Any:
            if lines(output / ".") and (output / "records.rank1.jsonl").stat().st_size:
                os.kill(os.getpid(), signal.SIGKILL)
            return stock(self, *more)

        runner.Runner._answers = answers  # type: ignore[method-assign]
        run(*args, **kwargs)

    def waits(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except TimeoutError as error:
            (tmp_path / "message").write_text(str(error))

    children = [
        forked(waits, checkpoint, data, output, stall_seconds=1.5, environment=first),
        forked(dies, checkpoint, data, output, environment=second),
    ]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, -signal.SIGKILL]
    assert "--resume" in (tmp_path / "message").read_text()
    assert not (output / "results.json").exists()
    assert 0 < lines(output) < 30
    assert (output / "records.rank1.jsonl").exists()
    assert timeless(run(checkpoint, data, output, resume=True)) == timeless(whole)  # by one process alone
    assert [path.name for path in output.glob("records*")] == ["records.jsonl"]


@forks
def test_the_others_stop_when_the_first_refuses(tmp_path: Path) -> None:
    def works(rank: int) -> None:
        def refuse() -> None:
            raise ValueError("not this folder")

        try:
            agreed(this_worker(), refuse)
        except ValueError as error:
            (tmp_path / str(rank)).write_text(str(error))

    children = [forked(works, rank, environment=environment) for rank, environment in enumerate(ranked(2))]
    for child in children:
        child.join(60)
    assert (tmp_path / "0").read_text() == "not this folder"
    assert "process 0 refused" in (tmp_path / "1").read_text()


def test_who_am_i(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert this_worker() == Worker(0, 1, 0)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert this_worker() == Worker(5, 8, 1)
    for wrong in ("8", "-1", "one"):
        monkeypatch.setenv("RANK", wrong)
        with pytest.raises(ValueError, match="accelerate launch"):
            this_worker()


def test_waiting_ends(tmp_path: Path) -> None:
    with Writer(tmp_path, 1) as write:
        write(record(0))
    told: list[int] = []
    wait_for_all(tmp_path, [("t", "a", "0")], told.append)
    with pytest.raises(TimeoutError, match="1 answers"):
        wait_for_all(tmp_path, [("t", "a", "0"), ("t", "a", "1")], told.append, stall=0.3)
    assert told == [1]
