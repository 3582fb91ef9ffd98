"""lmms-eval's own command line on our models: its files hold what holimerge computes directly.

`make test-lmms` makes the environment (the one pytest runs in, with lmms-eval on top, named after it with -lmms).
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from test_cli import save_checkpoint

import holimerge
from holimerge.eval import lmms_plugin
from holimerge.eval.lmms_plugin import (
    MAX_NEW_TOKENS,
    VideoAnswerer,
    cut_at,
    generation_options,
    manifests,
    model_args,
    one_at_a_time,
    place,
)
from holimerge.eval.load import Loaded, load, to_model
from holimerge.eval.tasks import synthetic
from holimerge.eval.tiny import CHECKPOINT
from holimerge.inputs import build_inputs
from holimerge.video import read_video, synthetic_clip, write_video

pytest.importorskip("av")
ROOT = Path(__file__).parents[1]
PYTHON = Path(sys.prefix + "-lmms") / "bin" / "python"
needs_lmms_eval = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: `make test-lmms` makes it")
CONFIG, FRAMES, WORDS = "holimerge-15", 6, 5
MODELS = {family: f"holimerge_{family}" for family in lmms_plugin.MODELS.values()}


# --- what holimerge computes directly --------------------------------------------------------------------------------


class Direct(NamedTuple):
    """One question: scores of the options, whether greedy writes them, the greedy text, tokens entering the LLM."""

    scores: list[float]
    greedy: list[bool]
    text: str
    entering: int


def ask(loaded: Loaded, question: str, videos: list[str], options: list[str], config: str | None) -> Direct:
    model, tokenizer, settings, template = loaded
    inputs = build_inputs(
        question,
        [read_video(video, frames=FRAMES) for video in videos],
        config=model.config,
        tokenizer=tokenizer,
        settings=settings,
        chat_template=template,
    )
    inputs = to_model(inputs, model)
    length = inputs["input_ids"].shape[1]
    tokens = [tokenizer(option)["input_ids"] for option in options]
    if config is not None:
        holimerge.patch_model(model, config)
    try:
        written = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)[0, length:].tolist()
        entering = length
        if config is not None and videos:
            (video,) = holimerge.last_report(model).videos
            entering += video.entering - video.features
        scores = [holimerge.score_options(model, inputs, [ids])[0] for ids in tokens]
    finally:
        if config is not None:
            holimerge.unpatch_model(model)
    text = tokenizer.decode(written, skip_special_tokens=True).strip()
    return Direct(scores, [written[: len(ids)] == ids for ids in tokens], text, entering)


class Setting(NamedTuple):
    """A checkpoint's folder, the rows of its data set, and what holimerge says about each, reduced and not."""

    folder: str
    rows: list[dict[str, Any]]
    reduced: list[Direct]
    full: list[Direct]


def rows_of(loaded: Loaded, clips: list[str]) -> list[dict[str, Any]]:
    """Two questions a video with options of one, two (what greedy decoding writes) and three tokens."""
    rows = []
    for n, (clip, words) in enumerate((clip, words) for clip in clips for words in ("what moves", "what word3 here")):
        asked = f"{words} ?"
        begin = ask(loaded, asked, [clip], ["word1"], CONFIG).text.split()[:2]
        options = [f"word{n + 2}", " ".join(begin), f"{begin[0]} word{n + 4} word7"]
        options = options[n % 3 :] + options[: n % 3]
        scores = ask(loaded, asked, [clip], options, CONFIG).scores
        order = sorted(range(3), key=scores.__getitem__)
        # the last two rows have a right answer that is neither the likeliest nor the least likely
        answer = order[1] if n >= 4 else order[2]
        rows.append({"id": n, "video": clip, "question": asked, "options": options, "answer": answer})
    return rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: save_checkpoint(family, folder / family) for family in lmms_plugin.MODELS.values()}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{n}.mp4", synthetic_clip(24, 48, 64, seed=n), fps=8) for n in range(3)]


@pytest.fixture(scope="module")
def settings(folders: dict[str, Path], clips: list[str]) -> dict[str, Setting]:
    found = {}
    for family, folder in folders.items():
        loaded = load(folder)
        rows = rows_of(loaded, clips)
        answers = [
            [ask(loaded, row["question"], [row["video"]], row["options"], config) for row in rows]
            for config in (CONFIG, None)
        ]
        found[family] = Setting(str(folder), rows, *answers)
    return found


# --- lmms-eval's command line ----------------------------------------------------------------------------------------


def write_choice(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """A likelihood task `NAME_choice`; gives the lines that another task on the same rows begins with."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: video
doc_to_text: question
"""
    (folder / f"{name}_choice.yaml").write_text(
        f"""\
task: {name}_choice
{common}doc_to_target: answer
doc_to_choice: options
output_type: multiple_choice
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return common


def write_tasks(folder: Path, family: str, setting: Setting) -> None:
    """A likelihood task and a generation task on the same rows, as lmms-eval's users write them."""
    rows = [{**row, "said": direct.text} for row, direct in zip(setting.rows, setting.reduced, strict=True)]
    common = write_choice(folder, family, rows)
    (folder / f"{family}_say.yaml").write_text(
        f"""\
task: {family}_say
{common}doc_to_target: said
output_type: generate_until
generation_kwargs: {{max_new_tokens: {WORDS}, temperature: 0, do_sample: false, num_beams: 1, top_p: 1.0}}
process_results: !function scoring.same_text
metric_list: [{{metric: same, aggregation: mean, higher_is_better: true}}]
"""
    )
    (folder / "scoring.py").write_text(
        "def same_text(row, found):\n    return {'same': float(found[0] == row['said'])}"
    )


def write_mlvu(folder: Path, videos: Path, clip: str) -> str:
    """lmms-eval's own MLVU task on one row and one video of ours, where its data set would lie; the row's question."""
    videos.mkdir(parents=True)
    (videos / "plot.mp4").symlink_to(clip)
    (bundled,) = PYTHON.parents[1].glob("lib/python*/site-packages/lmms_eval/tasks/mlvu/mlvu_dev.yaml")
    row = {"video_name": "plot.mp4", "question": "what moves ?", "answer": "B", "task_type": "plotQA"}
    (folder / "mlvu.jsonl").write_text(json.dumps(row))
    (folder / "mlvu.yaml").write_text(
        f"""\
include: {bundled}
task: mlvu_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "mlvu.jsonl"}}}}}
generation_kwargs: {{max_new_tokens: {WORDS}, temperature: 0}}
"""
    )
    return row["question"]


def lmms_eval(tmp_path: Path, *arguments: str, module: tuple[str, ...] = ("-m", "lmms_eval")) -> str:
    """Run lmms-eval offline, with caches of its own; returns what it printed."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "default",
    }
    done = subprocess.run(
        [str(PYTHON), *module, *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def read_samples(out: Path, task: str) -> list[dict[str, Any]]:
    (file,) = out.rglob(f"*_samples_{task}.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def check_samples(out: Path, family: str, answers: list[Direct]) -> None:
    """Every option's loss, every text and every token count is what holimerge computes directly."""
    choices, said = (read_samples(out, f"{family}_{task}") for task in ("choice", "say"))
    assert len(choices) == len(said) == len(answers) == 6
    for sample, direct in zip(choices, answers, strict=True):
        found = sample["filtered_resps"]  # written as texts
        assert [float(loss) for loss, _ in found] == pytest.approx([-score for score in direct.scores], abs=1e-4)
        assert [greedy for _, greedy in found] == list(map(str, direct.greedy))
        assert sample["token_counts"] == [{"input_tokens": direct.entering}] * 3
    for sample, direct in zip(said, answers, strict=True):
        assert sample["filtered_resps"] == direct.text
        assert sample["token_counts"] == [{"input_tokens": direct.entering, "output_tokens": WORDS}]


def read_results(out: Path) -> dict[str, Any]:
    (file,) = out.rglob("*_results.json")
    return json.loads(file.read_text())


def accuracy(setting: Setting, answers: list[Direct]) -> float:
    best = [max(range(3), key=direct.scores.__getitem__) for direct in answers]
    return sum(a == row["answer"] for a, row in zip(best, setting.rows, strict=True)) / len(best)


@needs_lmms_eval
def test_the_command_line_finds_what_holimerge_computes(settings: dict[str, Setting], tmp_path: Path) -> None:
    family = "llava_onevision"
    setting = settings[family]
    write_tasks(tmp_path / "tasks", family, setting)
    question = write_mlvu(tmp_path / "tasks", tmp_path / "hf" / "mlvu", setting.rows[0]["video"])
    out = tmp_path / "out"
    printed = lmms_eval(
        tmp_path,
        *("--model", MODELS[family], "--tasks", f"{family}_choice,{family}_say,mlvu_here", "--batch_size", "1"),
        *("--model_args", f"pretrained={setting.folder},config={CONFIG},num_frames={FRAMES},dtype=float32"),
        *("--include_path", str(tmp_path / "tasks"), "--output_path", str(out), "--log_samples"),
    )
    assert f"|{family}_choice|" in printed
    assert "not used" not in printed
    check_samples(out, family, setting.reduced)
    found = read_results(out)
    assert found["results"][f"{family}_choice"]["acc,none"] == pytest.approx(4 / 6)
    assert found["results"][f"{family}_say"]["same,none"] == 1
    assert found["n-samples"][f"{family}_choice"]["effective"] == 6
    assert found["efficiency"]["by_task"][f"{family}_say"]["total_input_tokens"] == sum(
        direct.entering for direct in setting.reduced
    )
    (sample,) = read_samples(out, "mlvu_here")
    asked = f"{question}\nOnly give the best option.\nBest option: ("
    direct = ask(load(setting.folder), asked, [setting.rows[0]["video"]], ["word1"], CONFIG)
    assert (sample["input"], sample["filtered_resps"]) == (asked, direct.text)
    assert all(a.entering < b.entering for a, b in zip(setting.reduced, setting.full, strict=True))


@needs_lmms_eval
def test_several_runs_of_one_file(settings: dict[str, Setting], tmp_path: Path) -> None:
    """The other family reduced, the same unpatched."""
    family = "qwen2_5_vl"
    setting = settings[family]
    write_tasks(tmp_path / "tasks", family, setting)
    common = {"tasks": f"{family}_choice,{family}_say", "include_path": str(tmp_path / "tasks"), "log_samples": True}
    start = f"pretrained={setting.folder},num_frames={FRAMES}"
    runs = {
        "reduced": {"model_args": f"{start},config={CONFIG}"},
        "full": {"model_args": f"{start},config=none"},
    }
    listed = [
        {"model": MODELS[family], **common, **run, "output_path": str(tmp_path / name)} for name, run in runs.items()
    ]
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(listed))
    lmms_eval(tmp_path, "--config", str(tmp_path / "runs.yaml"))
    for name, answers in (("reduced", setting.reduced), ("full", setting.full)):
        check_samples(tmp_path / name, family, answers)
        found = read_results(tmp_path / name)["results"]
        assert found[f"{family}_choice"]["acc,none"] == pytest.approx(accuracy(setting, answers))


@needs_lmms_eval
def test_the_embedded_model_answers_a_likelihood_task(tmp_path: Path) -> None:
    """Synthetic test videos through lmms-eval: the same right and wrong answers as `holimerge eval` gives."""
    from holimerge.eval.evaluate import evaluate

    samples = [sample for sample in synthetic.load(tmp_path / "videos").samples if sample.raw["index"] < 3]
    rows = []
    for n, sample in enumerate(samples):
        synthetic.prepare(sample)
        options = list(sample.options)
        rows.append(
            {
                "id": n,
                "video": str(sample.video),
                "question": sample.question,
                "options": options,
                "answer": sample.answer,
            }
        )
    setting = Setting(str(CHECKPOINT), rows, [], [])
    write_choice(tmp_path / "tasks", "synthetic", rows)
    found = evaluate(
        setting.folder,
        ["holimerge-25"],
        ["synthetic"],
        tmp_path / "ours",
        data=[f"synthetic={tmp_path / 'videos'}"],
        limit=len(samples),
        dtype="float32",
    )
    assert found is not None
    lmms_eval(
        tmp_path,
        *("--model", MODELS["llava_onevision"], "--tasks", "synthetic_choice", "--batch_size", "1"),
        *("--model_args", f"pretrained={setting.folder},config=holimerge-25,num_frames=32,dtype=float32"),
        *("--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"),
    )
    ours = found["tasks"]["synthetic"]["configs"]["holimerge-25"]
    theirs = [int(sample["acc"]) for sample in read_samples(tmp_path / "out", "synthetic_choice")]
    assert theirs == ours["correct"]
    assert read_results(tmp_path / "out")["results"]["synthetic_choice"]["acc,none"] == pytest.approx(
        ours["accuracy"]["percent"] / 100, abs=1e-3
    )
    assert sum(theirs) > len(theirs) / 2


INSIDE = """
import json, sys, holimerge, holimerge.eval.cli, holimerge.eval.lmms_plugin
found = {"early": [name for name in sys.modules if name.startswith("lmms_eval")]}
import lmms_eval.models as models
found["models"] = models.list_available_models()
for kind, text, more in (
    ("key", "pretrained=here,config=holimerge-15,num_frame=8", {"batch_size": 1}),
    ("batch", "pretrained=here,config=holimerge-15", {"batch_size": "4", "device": None}),
    ("folder", "pretrained=./gone,config=holimerge-15,dtype=bfloat16", {"batch_size": "1", "device": "cpu"}),
):
    try:
        models.get_model("holimerge_qwen2_5_vl").create_from_arg_string(text, more)
    except Exception as error:
        found[kind] = repr(error)
print(json.dumps(found))
"""


@needs_lmms_eval
def test_inside_lmms_eval(tmp_path: Path) -> None:
    """Its list has our models beside its own, and mistakes in --model_args say what is valid."""
    found = json.loads(lmms_eval(tmp_path, module=("-W", "ignore", "-c", INSIDE)).splitlines()[-1])
    assert found["early"] == []
    assert {*MODELS.values(), "qwen2_5_vl"} < set(found["models"])
    assert "unknown key 'num_frame'; did you mean 'num_frames'? Valid: pretrained, config," in found["key"]
    assert "--batch_size 4: holimerge's models answer one question at a time" in found["batch"]
    assert "./gone: no such folder with a model" in found["folder"]


# --- without lmms-eval -----------------------------------------------------------------------------------------------


def test_the_entry_point_is_declared() -> None:
    (point,) = (e for e in metadata.entry_points(group="lmms_eval.models") if e.value.startswith("holimerge."))
    assert point.load() is manifests


def imports_at_the_top(file: Path) -> set[str]:
    """Packages that importing a file imports: every import statement outside of functions."""
    found, waiting = set(), list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def test_only_one_file_imports_lmms_eval() -> None:
    files = [file for folder in ("holimerge", "patches", "configs", "eval") for file in (ROOT / folder).rglob("*.py")]
    assert [file.name for file in files if "lmms_eval" in imports_at_the_top(file)] == ["lmms_model.py"]
    assert [file.name for file in files if "lmms_model" in file.read_text(encoding="utf-8")] == ["lmms_plugin.py"]


@pytest.mark.parametrize("content", [None, "1 / 0", "def ModelManifest(): pass"], ids=["missing", "broken", "changed"])
def test_a_broken_lmms_eval_breaks_nothing(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    if content is not None:
        monkeypatch.delitem(sys.modules, "lmms_eval")
        (tmp_path / "lmms_eval" / "models").mkdir(parents=True)
        for file in ("__init__", "models/__init__"):
            (tmp_path / "lmms_eval" / f"{file}.py").touch()
        (tmp_path / "lmms_eval" / "models" / "registry_v2.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="not registered"):
        assert manifests() == []


def test_model_args_are_checked() -> None:
    given = {"pretrained": "here", "config": CONFIG}
    assert model_args(given) == {**lmms_plugin.MODEL_ARGS, **given}
    assert model_args({**given, "num_frames": 8})["num_frames"] == 8
    for wrong, message in (
        ({"pretrained": "here"}, "config= is missing"),
        ({"config": CONFIG}, "pretrained=FOLDER_OR_HUB_ID is missing"),
        ({**given, "num_frames": 0}, "num_frames=0"),
        ({**given, "num_frames": "many"}, "num_frames='many'"),
        ({**given, "max_frames": 3}, r"unknown key 'max_frames'.*Valid: pretrained, config, num_frames, sampling, fps"),
    ):
        with pytest.raises(ValueError, match=message):
            model_args(wrong)
    for size in (2, "8", "auto"):
        with pytest.raises(ValueError, match="one question at a time"):
            one_at_a_time(size)
    one_at_a_time("1")


def test_the_place_of_a_model() -> None:
    several = {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}
    assert place("auto", "cuda:1", several, True) == "auto"
    assert place(None, "cuda:1", several, True) == "cuda:1"
    assert place(None, None, several, True) == "cuda:2"
    assert place(None, None, several, False) is None
    assert place(None, None, {}, True) is None


def test_generation_options_are_lmms_evals() -> None:
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    given = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert generation_options(given) == ({"max_new_tokens": 16, "num_beams": 1, **greedy}, [])
    assert generation_options({"until": ["\n\n"]}) == ({"max_new_tokens": MAX_NEW_TOKENS, **greedy}, [])
    assert generation_options({"until": ["###", "\n\n"], "do_sample": True})[1] == ["###"]
    assert generation_options({"until": "END"})[1] == ["END"]
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": None}
    assert generation_options({"temperature": 0.7, "top_p": 0.9, "max_gen_toks": 3}) == (
        {"max_new_tokens": 3, **sampled},
        [],
    )
    with pytest.warns(UserWarning, match="not used: image_aspect_ratio"):
        assert generation_options({"image_aspect_ratio": "pad"})[0] == {"max_new_tokens": MAX_NEW_TOKENS, **greedy}
    assert cut_at(" one ### two END", ["END", "###"]) == "one"


def answerer(folder: Path, family: str, **changes: Any) -> VideoAnswerer:
    given = {"pretrained": str(folder), "config": CONFIG, "num_frames": FRAMES, **changes}
    return VideoAnswerer(model_args(given), family, None)


def test_answers_without_lmms_eval(settings: dict[str, Setting], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as the command line's, with the frames of a video read once for its questions."""
    setting = settings[family]
    model = answerer(Path(setting.folder), family)
    read: list[str] = []
    monkeypatch.setattr("holimerge.video.read_video", lambda path, **how: read.append(path) or read_video(path, **how))
    for row, direct in zip(setting.rows, setting.reduced, strict=True):
        scores = model.score(row["question"], [row["video"]], row["options"])
        assert [score.log_likelihood for score in scores] == pytest.approx(direct.scores, abs=1e-5)
        assert [score.greedy for score in scores] == direct.greedy
        assert {score.entering for score in scores} == {direct.entering}
        kwargs = {"max_new_tokens": WORDS, "until": ["\n\n"]}
        assert model.generate(row["question"], [row["video"]], kwargs) == (direct.text, direct.entering, WORDS)
        stop = direct.text.split()[-1]
        before = direct.text[: direct.text.index(stop)].strip()
        assert model.generate(row["question"], row["video"], {**kwargs, "until": [stop]})[0] == before
        beams = model.generate(row["question"], [row["video"]], {**kwargs, "num_beams": 2})
        assert beams[1:] == (direct.entering, WORDS)
    assert read == [row["video"] for row in setting.rows[::2]]
    assert any(any(direct.greedy) and not all(direct.greedy) for direct in setting.reduced)


def test_a_question_without_video_and_what_is_refused(folders: dict[str, Path], clips: list[str]) -> None:
    family = "llava_onevision"
    model = answerer(folders[family], family)
    alone = ask(load(folders[family]), "what moves ?", [], ["word5"], CONFIG)
    for nothing in (None, []):
        (score,) = model.score("what moves ?", nothing, ["word5"])
        assert score == pytest.approx((alone.scores[0], alone.greedy[0], alone.entering))
    with pytest.raises(TypeError, match="shows a Tensor; holimerge's models take paths of videos"):
        model.score("what ?", [torch.zeros(3)], ["word5"])
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
        model.score("what ?", ["gone.mp4"], ["word5"])
    with pytest.raises(ValueError, match="option '' has no token"):
        model.score("what ?", [clips[0]], ["word5", ""])
    assert model.model.get_output_embeddings()._forward_hooks == {}
    with pytest.raises(ValueError, match="is a llava_onevision model, not qwen2_5_vl; use --model holimerge_llava"):
        answerer(folders[family], "qwen2_5_vl")
    with pytest.raises(holimerge.ConfigError, match="no preset 'holimerge-16'"):
        answerer(folders[family], family, config="holimerge-16")
