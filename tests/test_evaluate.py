"""`holimerge eval`: the numbers are those of the models, whatever is saved on the way, and errors are told."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from eval_toys import (
    OPTIONS,
    QUESTIONS,
    first_letter,
    letter_tokenizer,
    save_checkpoint,
    save_data,
    timeless,
    toy_samples,
    toy_task,
)
from fingerprint import fingerprint
from rich.console import Console
from typer.testing import CliRunner

import holimerge
from holimerge.eval.answering import best_option, option_tokens, score_answer
from holimerge.eval.cli import app
from holimerge.eval.evaluate import evaluate
from holimerge.eval.frame_cache import FrameCache
from holimerge.eval.load import load, to_model
from holimerge.eval.plain import markdown, plain
from holimerge.eval.plan import data_roots, load_configs, split_names
from holimerge.eval.records import lines_of
from holimerge.eval.reuse import reusing
from holimerge.eval.run import patched
from holimerge.eval.show_eval import EvalProgress, duration_text, show_results
from holimerge.eval.tasks.base import Extracted, Prompt, Sample, Task
from holimerge.inputs import FAMILIES, build_inputs, collate
from holimerge.video import read_video

pytest.importorskip("av")
CONFIGS = ["unpatched", "keep-all", "holimerge-25", "holitom-10"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_checkpoint(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_data(tmp_path_factory.mktemp("data"), videos=4, questions=3, broken=(1,))


@pytest.fixture(scope="module")
def runs(
    checkpoints: dict[str, str], data: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Results and records of both families in the plainest way: one by one, nothing cached, nothing reused."""
    found = {}
    for family, model in checkpoints.items():
        output = tmp_path_factory.mktemp("plain")
        found[family] = ask(model, data, output, reuse=False)
    return found


def ask(model: str, data: str, output: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    task = changes.pop("task", None) or toy_task(toy_samples(data))
    settings: dict[str, Any] = {"configs": CONFIGS, "num_frames": 6, **changes}
    results = evaluate(model, settings.pop("configs"), [task], output, **settings)
    assert results is not None
    assert results == json.loads((output / "results.json").read_text())
    return results, lines_of(output / "records.jsonl")[0]


def asked(family: str, words: int) -> dict[str, torch.Tensor]:
    """A prompt about the video of `toys.prompt` with a question of so many words."""
    return toys.build(family, [[5, 6, 7, toys.make_video(family), *range(11, 11 + words)]])


# --- the same answers in every way ----------------------------------------------------------------------------------


def test_answers_are_those_of_generate(
    family: str, checkpoints: dict[str, str], data: str, runs: dict[str, Any]
) -> None:
    results, records = runs[family]
    model, tokenizer, settings, template = load(checkpoints[family])
    by_key = {(r["config"], r["id"]): r for r in records}
    assert len(by_key) == len(records) == 12 * len(CONFIGS)
    different = set()
    for config in CONFIGS:
        if config != "unpatched":
            holimerge.patch_model(model, config)
        for sample in toy_samples(data):
            record = by_key[config, sample.id]
            if sample.video_id == "clip1.mp4":
                assert record["error"]["at"] == "video"
                assert "clip1.mp4" in record["error"]["text"]
                assert record["correct"] is None
                continue
            inputs = build_inputs(
                sample.question,
                read_video(sample.video, frames=6),
                config=model.config,
                tokenizer=tokenizer,
                settings=settings,
                chat_template=template,
            )
            out = model.generate(**to_model(inputs, model), max_new_tokens=4, do_sample=False)
            raw = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            choice = first_letter(raw, sample, "", 0).choice
            assert (record["raw"], record["choice"], record["correct"]) == (raw, choice, choice == sample.answer)
            assert record["frames"] == (5 if sample.video_id == "clip2.mp4" else 6)
            different.add(raw)
            if config != "unpatched":
                video = holimerge.last_report(model).videos[0]
                assert record["tokens"]["entering"] == video.entering
                assert record["tokens"]["after_inner"] == video.after_inner
                text = inputs["input_ids"].shape[1] - video.features - video.separators
                assert record["tokens"]["text"] == text
    assert len(different) > 15  # the questions, videos and configurations do matter here
    scored = [r for r in records if r["config"] == "holitom-10" and r["error"] is None]
    found = results["tasks"]["toy"]["configs"]["holitom-10"]
    assert found["accuracy"]["percent"] == pytest.approx(100 * sum(r["correct"] for r in scored) / 9, abs=1e-3)


@pytest.mark.parametrize(
    "way",
    [
        {"reuse": True},
        {"batch_size": 4},
        {"batch_size": 4, "reuse": False},
        {"cache": True, "batch_size": 2},
        {"cache": "filled"},
    ],
    ids=str,
)
def test_every_way_gives_the_same(
    family: str, checkpoints: dict[str, str], data: str, runs: dict[str, Any], tmp_path: Path, way: dict[str, Any]
) -> None:
    cache = FrameCache(tmp_path / "cache") if "cache" in way else None
    if way.get("cache") == "filled":
        assert cache is not None
        ask(checkpoints[family], data, tmp_path / "before", cache=cache, configs=["unpatched"])
        assert cache.hits == 0
    found = ask(checkpoints[family], data, tmp_path / "out", **{**way, "cache": cache})
    plain_results, plain_records = runs[family]
    assert [timeless(r) for r in found[1]] == [timeless(r) for r in plain_records]
    assert timeless(found[0]) == timeless(plain_results)
    if way.get("cache") == "filled":
        assert cache is not None
        assert cache.hits == 3
        readable = [r for r in found[1] if r["error"] is None]
        assert all("decode" in r["reused"] and "decode" not in r["ms"] for r in readable)


@pytest.mark.parametrize("config", CONFIGS)
def test_reused_features_are_the_same_bits(family: str, config: str) -> None:
    model = toys.make_model(family)
    other = asked(family, 9)  # a longer question about the same video
    prompts = [toys.prompt(family), other, toys.prompt(family)]
    model.generate(**other, max_new_tokens=2)  # transformers notes things of its own at the first call
    before = fingerprint(model)
    with patched(model, None if config == "unpatched" else holimerge.load_config(config)):
        plainly = [model(**inputs).logits for inputs in prompts]
        written = [model.generate(**inputs, max_new_tokens=5, do_sample=False) for inputs in prompts]
        inside = fingerprint(model)
        with reusing(model) as reuse:
            for inputs, logits, tokens in zip(prompts, plainly, written, strict=True):
                assert torch.equal(model(**inputs).logits, logits)
                assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
            assert (reuse.paid, reuse.reused) == (1, 5)
            changed = {**prompts[0], "pixel_values_videos": prompts[0]["pixel_values_videos"].clone()}
            changed["pixel_values_videos"].view(-1)[-1] += 1e-3
            model(**changed)
            assert (reuse.paid, reuse.reused) == (2, 5)
        assert fingerprint(model) == inside
    assert fingerprint(model) == before


def test_a_flops_budget_is_not_reused_for_a_longer_question(family: str) -> None:
    model = toys.make_model(family)
    config = holimerge.load_config({"base": "holimerge-25", "budget": {"flops": 0.5}})
    prompts = [toys.prompt(family), asked(family, 30)]
    kept = []
    with patched(model, config):
        plainly = [model(**inputs).logits for inputs in prompts]
        with reusing(model, 2) as reuse:
            for _ in range(2):
                for inputs, logits in zip(prompts, plainly, strict=True):
                    assert torch.equal(model(**inputs).logits, logits)
                    kept.append(holimerge.last_report(model).videos[0].entering)
            assert (reuse.paid, reuse.reused) == (2, 2)
    assert kept[0] != kept[1]
    assert kept[:2] == kept[2:]


def test_two_questions_about_one_video_in_a_batch(family: str) -> None:
    """Each row's report tells of its own inner merge, although both share the encoded video."""
    model = toys.make_model(family)
    rows = [asked(family, n) for n in (5, 9)]
    batch = collate(rows, toys.PAD)
    with patched(model, holimerge.load_config("holimerge-25")):
        alone = []
        for row in rows:
            model(**row)
            alone.append(holimerge.last_report(model).videos[0].inner_kept)
        with reusing(model, 2) as reuse:
            model(**batch)
            assert (reuse.paid, reuse.reused) == (1, 1)
            together = [video.inner_kept for video in holimerge.last_report(model).videos]
    for a, b in zip(alone, together, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


# --- what is paid and told -------------------------------------------------------------------------------------------


def test_more_frames_are_read_where_a_configuration_asks_for_them(
    checkpoints: dict[str, str], data: str, tmp_path: Path
) -> None:
    (tmp_path / "more.yaml").write_text("base: holimerge-25\nmore_frames: 2\nbudget: {retain: 0.125}\n")
    configs = ["unpatched", str(tmp_path / "more.yaml"), "holimerge-25"]
    samples = [s for s in toy_samples(data) if s.id in ("v0-q0", "v2-q0", "v3-q0")]  # clips of 12, 5 and 12 frames
    results, records = ask(
        checkpoints["llava_onevision"], data, tmp_path / "out", configs=configs, num_frames=4, task=toy_task(samples)
    )
    found = {(r["config"], r["id"]): (r["frames"], r["tokens"]["entering"]) for r in records}
    for name in ("v0-q0", "v3-q0"):
        assert found["unpatched", name] == (4, 64)
        assert found["more", name] == (8, 16)
        assert found["holimerge-25", name] == (4, 16)
    assert found["more", "v2-q0"] == (5, 10)  # no more than there are
    assert results["tasks"]["toy"]["configs"]["more"]["ms"]["decode"]["n"] == 3


def test_what_was_not_paid_has_no_time(checkpoints: dict[str, str], data: str, tmp_path: Path) -> None:
    results, records = ask(checkpoints["llava_onevision"], data, tmp_path)
    for config in CONFIGS:
        for record in (r for r in records if r["config"] == config and r["error"] is None):
            first = record["id"].endswith("q0")
            reduces = config.startswith("holi")
            stages = {"decode", "preprocess", "vision", *(("reduce", "project") if reduces else ())}
            assert set(record["reused"]) == (set() if first else stages)
            assert set(record["ms"]) >= (stages if first else set()) | {"ttft", "prefill"}
            assert not set(record["ms"]) & set(record["reused"])
        found = results["tasks"]["toy"]["configs"][config]["ms"]
        assert found["decode"]["n"] == found["ttft"]["n"] == found["vision"]["n"] == 3  # videos that can be read
        assert found["prefill"]["n"] == 9
    kept = results["tasks"]["toy"]["configs"]["holimerge-25"]
    assert kept["tokens"]["entering"]["median"] == 24  # a quarter of 6 x 16
    assert kept["tokens"]["after_inner"]["median"] == 12
    flops = [results["tasks"]["toy"]["configs"][name]["flops"]["total"]["median"] for name in CONFIGS]
    assert flops[0] == flops[1] > flops[2] > 0


def test_results_tell_what_was_run(runs: dict[str, Any], data: str) -> None:
    results, _ = runs["llava_onevision"]
    assert (results["kind"], results["schema"]) == ("eval", 1)
    run, task = results["run"], results["tasks"]["toy"]
    assert run["configs"]["unpatched"] is None
    assert holimerge.load_config(run["configs"]["holitom-10"]) == holimerge.load_config("holitom-10")
    assert run["tasks"]["toy"]["revision"] == "revision 1"
    assert (run["seed"], run["num_frames"], run["tasks"]["toy"]["sampling"]) == (0, 6, "uniform")
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in run["versions"]["torch"]
    assert results["conditions"]["dtype"] == "float32"
    assert "commit" in results["conditions"]
    assert task["samples"]["id"] == [sample.id for sample in toy_samples(data)]
    found = task["configs"]["unpatched"]
    counts = {"samples": 12, "scored": 9, "unreadable": 3, "unreadable_videos": 1, "unshowable": 0, "secret": 0}
    assert {key: found["counts"][key] for key in counts} == counts
    assert found["accuracy"]["n"] == 9
    assert found["errors_wrong"]["n"] == 12
    assert found["errors_wrong"]["percent"] == pytest.approx(found["accuracy"]["percent"] * 9 / 12, abs=1e-3)
    assert set(found["by_category"]) == {"kind", "sort"}
    assert {k: v["n"] for k, v in found["by_group"]["duration"].items()} == {"short": 3, "long": 6}
    assert found["headline"] == {"score": pytest.approx(found["accuracy"]["percent"], abs=1e-3)}
    assert found["correct"].count(None) == 3
    assert sum(c for c in found["correct"] if c is not None) == found["counts"]["correct"]
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 0


def test_answers_without_a_choice_and_secret_ones(checkpoints: dict[str, str], data: str, tmp_path: Path) -> None:
    samples = [s for s in toy_samples(data) if s.video_id == "clip0.mp4"]
    samples[2] = dataclasses.replace(samples[2], answer=None)
    read = {samples[0].id: Extracted(None), samples[1].id: Extracted(samples[1].answer, fallback=True)}
    task = toy_task(samples, extract=lambda raw, sample, protocol, seed: read.get(sample.id, Extracted(0)))
    results, records = ask(checkpoints["llava_onevision"], data, tmp_path, task=task, configs=["unpatched"])
    counts = results["tasks"]["toy"]["configs"]["unpatched"]["counts"]
    assert (counts["no_answer"], counts["fallback"], counts["secret"], counts["scored"]) == (1, 1, 1, 2)
    assert [r["correct"] for r in records] == [False, True, None]
    assert results["tasks"]["toy"]["configs"]["unpatched"]["accuracy"]["percent"] == 50


def test_a_question_that_cannot_be_shown_stops_nothing(checkpoints: dict[str, str], data: str, tmp_path: Path) -> None:
    samples = toy_samples(data)[:1] + toy_samples(data)[4:5]
    samples[0] = dataclasses.replace(samples[0], question="what is <video> here")
    results, records = ask(
        checkpoints["llava_onevision"], data, tmp_path, task=toy_task(samples), configs=["unpatched", "holimerge-25"]
    )
    assert [r["error"] and r["error"]["at"] for r in records] == ["prompt", None] * 2
    counts = results["tasks"]["toy"]["configs"]["unpatched"]["counts"]
    assert (counts["unshowable"], counts["scored"]) == (1, 1)
    # the one that could be asked paid for the video
    assert "decode" in records[1]["ms"]


def test_a_sample_without_a_video_and_one_that_is_prepared(
    checkpoints: dict[str, str], data: str, tmp_path: Path
) -> None:
    made: list[str] = []

    def prepare(sample: Sample) -> None:
        made.append(sample.id)
        (tmp_path / "made.mp4").write_bytes((Path(data) / "clip0.mp4").read_bytes())

    samples = [dataclasses.replace(s, video=tmp_path / "made.mp4", video_id="made") for s in toy_samples(data)[:2]]
    samples.append(dataclasses.replace(samples[0], id="none", video=None, video_id="none"))
    task = toy_task(samples, prepare=prepare)
    _, records = ask(checkpoints["llava_onevision"], data, tmp_path / "out", task=task, configs=["keep-all"])
    assert made == [samples[0].id, "none"]  # once a video
    assert [r["error"] is None for r in records] == [True, True, False]
    assert "names no video" in records[2]["error"]["text"]


def test_prompts_get_the_times_and_all_their_parts(checkpoints: dict[str, str], data: str, tmp_path: Path) -> None:
    seen: list[tuple[str, list[float]]] = []

    def prompt(sample: Sample, protocol: str, seconds: Any) -> Prompt:
        seen.append((protocol, list(seconds)))
        return Prompt(sample.question, system="you left", answer_prefix="then which")

    samples = [dataclasses.replace(toy_samples(data)[0], start=1.0, end=2.5)]
    task = toy_task(samples, prompt=prompt, sampling={"other": "left"})
    results, records = ask(
        checkpoints["llava_onevision"], data, tmp_path, task=task, configs=["unpatched"], protocol="other", num_frames=3
    )
    assert seen == [("other", [1.0, 1.5, 2.0])]
    assert results["run"]["tasks"]["toy"]["sampling"] == "left"
    tokenizer = letter_tokenizer("llava_onevision")
    plain_words = len(tokenizer(samples[0].question)["input_ids"])
    assert records[0]["tokens"]["text"] >= plain_words + 4


# --- by likelihood ---------------------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_score_options(
    family: str, checkpoints: dict[str, str], data: str, tmp_path: Path
) -> None:
    task = toy_task(toy_samples(data), prompt=None, extract=None, answer_by="likelihood")
    _, records = ask(checkpoints[family], data, tmp_path / "reused", task=task, batch_size=3)
    _, plainly = ask(checkpoints[family], data, tmp_path / "plain", task=task, reuse=False)
    assert [timeless(r) for r in records] == [timeless(r) for r in plainly]
    model, tokenizer, settings, template = load(checkpoints[family])
    holimerge.patch_model(model, "holimerge-25")
    options = [tokenizer(text)["input_ids"] for text in OPTIONS]
    choices = set()
    for record in (r for r in records if r["config"] == "holimerge-25" and r["error"] is None):
        sample = next(s for s in toy_samples(data) if s.id == record["id"])
        inputs = build_inputs(
            sample.question,
            read_video(sample.video, frames=6),
            config=model.config,
            tokenizer=tokenizer,
            settings=settings,
            chat_template=template,
        )
        scores = holimerge.score_options(model, to_model(inputs, model), options)
        assert record["likelihoods"] == scores
        assert record["choice"] == scores.index(max(scores))
        assert record["raw"] is None
        choices.add(record["choice"])
        first = record["id"].endswith("q0")
        if first:
            assert record["ms"]["ttft"] > record["ms"]["prefill"] > 0
    assert len(choices) > 1


@pytest.mark.parametrize("config", [None, "holimerge-25"])
def test_time_to_first_token_ends_before_the_options(family: str, config: str | None) -> None:
    model, inputs = toys.make_model(family), toys.prompt(family)
    loaded = None if config is None else holimerge.load_config(config)
    with patched(model, loaded):
        layer = model.model.language_model.layers[0]
        hook = layer.register_forward_pre_hook(lambda *_: time.sleep(0.2))
        begin = time.perf_counter()
        answer = score_answer(model, inputs, [[5, 6, 7], [6, 5], [7]], config=loaded)
        total = (time.perf_counter() - begin) * 1000
        hook.remove()
    assert total >= 600  # the prompt and two options of several tokens
    for stage in ("ttft", "prefill"):
        assert 200 <= answer.ms[stage] < 400, stage
    assert answer.ms["prefill"] < answer.ms["ttft"]


def test_tokens_of_options() -> None:
    tokenizer = letter_tokenizer("llava_onevision")
    assert option_tokens(tokenizer, ["  red ", "left one"]) == [tokenizer(t)["input_ids"] for t in ("red", "left one")]

    class Spelled:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    assert option_tokens(Spelled(), ["a"]) == [[97]]
    assert option_tokens(Spelled(), ["a"], "The answer is") == [[32, 97]]
    assert option_tokens(Spelled(), ["a"], "The answer is ") == [[97]]
    with pytest.raises(ValueError, match="no tokens"):
        option_tokens(Spelled(), ["a", " "])
    assert best_option([-2.0, -1.0, -1.0]) == 1
    assert best_option([-math.inf, -math.inf]) == 0


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_line(
    checkpoints: dict[str, str], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["eval", "--model", checkpoints["llava_onevision"], "--config", "unpatched", "--config", "holimerge-25"]
    arguments += ["--tasks", "custom", "--data", f"custom={data}", "--output_path", str(tmp_path / "out")]
    arguments += ["--batch_size", "2", "--num_frames", "6", "--limit", "6", "--protocol", "lmms_eval_0_3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for text in ("custom, 6 samples, protocol lmms_eval_0_3", "accuracy", "entering the LLM", "cannot be read"):
        assert text in done.stdout
    assert "12 of 12" in done.stderr
    assert "left" in done.stderr  # the time
    assert len(list((tmp_path / "cache" / "holimerge" / "frames").iterdir())) == 3
    again = CliRunner().invoke(app, [*arguments, "--resume", "--json"])
    assert json.loads(again.stdout) == json.loads((tmp_path / "out" / "results.json").read_text())
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--tasks", "customs"], "custom"),
        (["--tasks", ""], "no task"),
        (["--config", "holimerge-16"], "holimerge-15"),
        (["--protocol", "lmms"], "lmms_eval_0_7"),
        (["--sampling", "random"], "uniform"),
        (["--data", "mvbench=/tmp"], "not asked for"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--limit", "0"], "limit"),
        (["--batch-size", "0"], "batch_size"),
        (["--dtype", "float32", "--cache-size", "lots"], "size"),
        (["--model", "/no/model"], "/no/model"),
    ],
)
def test_mistakes_are_told_before_any_work(
    checkpoints: dict[str, str], data: str, tmp_path: Path, change: list[str], words: str
) -> None:
    given = {"--model": checkpoints["llava_onevision"], "--tasks": "custom", "--data": data, "--config": "unpatched"}
    given["--output"] = str(tmp_path / "out")
    given |= dict(zip(change[::2], change[1::2], strict=True))
    done = CliRunner().invoke(app, ["eval", *(x for pair in given.items() for x in pair)])
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_names_and_folders(tmp_path: Path) -> None:
    assert split_names(["a,b", "c", " b ,"]) == ["a", "b", "c"]
    (tmp_path / "mine.yaml").write_text("base: holimerge-15\n")
    found = load_configs(["unpatched", "holimerge-10", str(tmp_path / "mine.yaml")])
    assert list(found) == ["unpatched", "holimerge-10", "mine"]
    assert found["unpatched"] is None
    (tmp_path / "holimerge-10.yaml").write_text("base: holimerge-15\n")
    with pytest.raises(ValueError, match="rename"):
        load_configs(["holimerge-10", str(tmp_path / "holimerge-10.yaml")])
    with pytest.raises(ValueError, match="no config"):
        load_configs([])
    (tmp_path / "unpatched.yaml").write_text("base: holimerge-15\n")
    with pytest.raises(ValueError, match="the model as it is"):  # its column would look like the baseline
        load_configs([str(tmp_path / "unpatched.yaml")])
    assert data_roots(["/a", "y=/b"], ["x", "y"], ["x", "y", "z"]) == {"x": Path("/a"), "y": Path("/b")}
    assert data_roots(["/odd=name"], ["x"], ["x"]) == {"x": Path("/odd=name")}
    for wrong in (["/a", "/b"], ["x=/a", "x=/b"], ["z=/a"]):
        with pytest.raises(ValueError, match="--data"):
            data_roots(wrong, ["x", "y"], ["x", "y", "z"])


def test_ids_must_be_unique(checkpoints: dict[str, str], data: str, tmp_path: Path) -> None:
    samples = toy_samples(data)[:1] * 2
    with pytest.raises(ValueError, match="two samples have the id 'v0-q0'"):
        ask(checkpoints["llava_onevision"], data, tmp_path / "out", task=toy_task(samples))
    with pytest.raises(ValueError, match="has no samples"):
        ask(checkpoints["llava_onevision"], data, tmp_path / "out", task=toy_task([]))
    two = [toy_task(toy_samples(data)[:1]), toy_task(toy_samples(data)[1:])]
    with pytest.raises(ValueError, match="twice: toy, toy"):
        evaluate(checkpoints["llava_onevision"], ["unpatched"], two, tmp_path / "out")


def test_what_is_lost_is_told(checkpoints: dict[str, str], data: str, tmp_path: Path) -> None:
    samples = [s for s in toy_samples(data) if s.video_id != "clip1.mp4"][:3]
    samples[1] = dataclasses.replace(samples[1], video=Path("/no/such\x1b[2J.mp4"), category="lost")
    results, _ = ask(checkpoints["llava_onevision"], data, tmp_path, task=toy_task(samples), configs=["unpatched"])
    found = results["tasks"]["toy"]["configs"]["unpatched"]
    assert found["unscored_categories"] == ["lost"]
    assert "no such video file" in found["first_error"]
    stream = io.StringIO()
    show_results(results, Console(file=stream, width=150))
    text = stream.getvalue()
    assert "first error: /no/such[2J.mp4: no such video file" in text
    assert "means over categories lack them: lost" in text
    assert "go on with --resume" in text
    found["peak_memory_bytes"] = None  # a system that does not tell
    stream = io.StringIO()
    show_results(results, Console(file=stream, width=150))
    (line,) = (line for line in stream.getvalue().splitlines() if "peak memory" in line)
    assert line.split()[-2] == "-"


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_words_of_data_sets_are_plain(checkpoints: dict[str, str], data: str, tmp_path: Path) -> None:
    samples = [
        dataclasses.replace(toy_samples(data)[0], category="[red]\x1b[31m|odd\x07[/]", groups={"[b]": "[/b]\u202e"})
    ]
    task: Task = toy_task(samples)
    results, _ = ask(checkpoints["llava_onevision"], data, tmp_path, task=task, configs=["unpatched"])
    stream = io.StringIO()
    show_results(results, Console(file=stream, width=150, force_terminal=False))
    text = stream.getvalue()
    assert "[red][31m|odd[/]" in text
    assert "[b] [/b]" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_plain_and_markdown() -> None:
    assert plain("a\x1b[2J\tb\n\x00c \u202edesrever\x9b") == "a[2J b c desrever"
    assert markdown("a|b *c* <script> `d` [e](f)") == r"a\|b \*c\* \<script\> \`d\` \[e\]\(f\)"


def test_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("holimerge.eval.show_eval.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with EvalProgress(Console(file=stream, width=100)) as meter:
        meter.begin(1000, 400)
        meter.say("[bold]asking\x1b[1m")
        for _ in range(30):
            now[0] += 1
            meter.step("[task]", 2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "400 of 1000 answers are there already"
    assert lines[1] == "[bold]asking[1m"
    assert lines[2:] == [
        "[task]: 402 of 1000, 2.0 a second, 4:59 left",
        "[task]: 432 of 1000, 2.0 a second, 4:44 left",
    ]
    assert duration_text(3723.4) == "1:02:03"


def test_questions_differ() -> None:
    assert len(set(QUESTIONS)) == 4
