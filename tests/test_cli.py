"""The command line: a real process on saved checkpoints and a real video, clear errors, clean JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import holimerge
from holimerge.eval.cli import app
from holimerge.eval.doctor import UNTESTED, examine
from holimerge.eval.load import load, to_model
from holimerge.eval.run import run_once
from holimerge.inputs import DEFAULT_TEMPLATES, FAMILIES, build_inputs
from holimerge.preprocess import LLAVA
from holimerge.video import read_video, synthetic_clip, write_video

pytest.importorskip("av")
QUESTION = "what moves here ?"


def holi(*arguments: str) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(app, list(arguments))


def fails(*arguments: str) -> str:
    """The one line a mistake gets: on stderr, in red, status 2, nothing on stdout."""
    result = CliRunner().invoke(app, list(arguments), color=True)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "\x1b[31m" in lines[0]
    assert "Traceback" not in result.stderr
    return lines[0]


def word_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words as tokens, with the special tokens where `toys` expects them."""
    names = {
        0: "<pad>",
        1: "<unk>",
        2: "<|im_start|>",
        3: "<|im_end|>",
        toys.VIDEO: "<video>" if family in LLAVA else "<|video_pad|>",
        toys.IMAGE: "<image>" if family in LLAVA else "<|image_pad|>",
        toys.VISION_START: "<|vision_start|>",
        toys.VISION_END: "<|vision_end|>",
    }
    words = ["user", "assistant", "system", *QUESTION.split()]
    free = [i for i in range(toys.TEXT["vocab_size"]) if i not in names]
    words += [f"word{i}" for i in range(len(free) - len(words))]
    vocabulary = {name: i for i, name in names.items()} | dict(zip(words, free, strict=True))
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
    extra = [name for name in names.values() if name not in special.values()]
    return PreTrainedTokenizerFast(tokenizer_object=raw, extra_special_tokens=extra, **special)


def save_checkpoint(family: str, folder: Path) -> Path:
    """A toy model with the files a published checkpoint has."""
    toys.make_model(family).save_pretrained(folder)
    word_tokenizer(family).save_pretrained(folder)
    if family in LLAVA:
        values: dict[str, Any] = {"size": {"height": 28, "width": 28}, "resample": 3}
        values |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": DEFAULT_TEMPLATES[family]}))
    else:
        values = {"min_pixels": 16 * 16, "max_pixels": 24 * 32, "patch_size": 4}
        values |= {"temporal_patch_size": 2, "merge_size": 2}
        (folder / "chat_template.jinja").write_text(DEFAULT_TEMPLATES[family])
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: str(save_checkpoint(family, folder / family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", synthetic_clip(24, 48, 64), fps=8)


def expected_answer(folder: str, clip: str, config: str | None, **loading: Any) -> str:
    """The same question through the Python interface."""
    model, tokenizer, settings, template = load(folder, **loading)
    video = read_video(clip, frames=6)
    inputs = build_inputs(
        QUESTION, video, config=model.config, tokenizer=tokenizer, settings=settings, chat_template=template
    )
    inputs = to_model(inputs, model)
    if config is not None:
        holimerge.patch_model(model, config)
    out = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# --- ask -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl"])  # starting takes seconds; both answer below, in this process
def test_ask_as_a_process(checkpoints: dict[str, str], clip: str, family: str) -> None:
    command = [sys.executable, "-m", "holimerge.eval.cli", "ask", clip, QUESTION, "--model", checkpoints[family]]
    command += ["--config", "holimerge-25", "--frames", "6", "--max-new-tokens", "7", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # stdout is the JSON and nothing else
    assert found["answers"] == {"holimerge-25": expected_answer(checkpoints[family], clip, "holimerge-25")}
    tokens = found["cases"]["holimerge-25"]["tokens"]
    made = {"llava_onevision": 6 * 16, "qwen2_5_vl": 3 * 3 * 4}[family]
    assert (tokens["features"], tokens["entering"]) == (made, made // 4)
    assert found["video"]["frames"] == 6
    assert found["conditions"]["versions"]["torch"]


def test_ask_compares_with_the_unpatched_model(checkpoints: dict[str, str], clip: str, family: str) -> None:
    asked = (
        "ask",
        clip,
        QUESTION,
        "--model",
        checkpoints[family],
        "--frames",
        "6",
        "--max-new-tokens",
        "7",
        "--compare",
    )
    result = holi(*asked, "--config", "holitom-10", "--dtype", "bfloat16", "--attn-implementation", "eager", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    loading = {"dtype": "bfloat16", "attn_implementation": "eager"}
    assert found["answers"] == {
        "unpatched": expected_answer(checkpoints[family], clip, None, **loading),
        "holitom-10": expected_answer(checkpoints[family], clip, "holitom-10", **loading),
    }
    assert (found["conditions"]["dtype"], found["conditions"]["attn"]) == ("bfloat16", "eager")
    full, less = found["cases"]["unpatched"], found["cases"]["holitom-10"]
    assert full["tokens"]["entering"] == full["tokens"]["features"] > less["tokens"]["entering"]
    assert {"vision", "prefill"} == set(full["ms"]["stages"]) < set(less["ms"]["stages"])

    result = holi(*asked, "--device-map", "cpu", "--sampling", "fps", "--fps", "1")
    assert result.exit_code == 0, result.output
    assert "unpatched: " in result.stdout
    assert "speed-up to first token" in result.stdout


def test_ask_prints_the_answer_first(checkpoints: dict[str, str], clip: str) -> None:
    folder = checkpoints["llava_onevision"]
    result = holi("ask", clip, QUESTION, "--model", folder, "--frames", "6", "--max-new-tokens", "7")
    assert result.exit_code == 0, result.output
    answer, summary = result.stdout.splitlines()
    assert answer == expected_answer(folder, clip, "holimerge-15")
    assert "96 video tokens, 14 entered the LLM, 7 after layer 3" in summary


def test_mistakes_are_one_line(checkpoints: dict[str, str], clip: str, tmp_path: Path) -> None:
    folder = checkpoints["llava_onevision"]
    asked = ("ask", clip, QUESTION, "--model", folder)
    assert "no preset 'holimerge-11'; did you mean 'holimerge-1" in fails(*asked, "--config", "holimerge-11")
    assert "gone.mp4: no such video" in fails("ask", str(tmp_path / "gone.mp4"), QUESTION, "--model", folder)
    assert "no such folder with a model" in fails("ask", clip, QUESTION, "--model", str(tmp_path / "gone"))
    assert "no config.json" in fails("ask", clip, QUESTION, "--model", str(tmp_path))
    (tmp_path / "text.mp4").write_text("not a video")
    assert "text.mp4" in fails("ask", str(tmp_path / "text.mp4"), QUESTION, "--model", folder)
    assert "frames must be" in fails(*asked, "--frames", "0")
    assert "fps is only used with" in fails(*asked, "--fps", "2")
    assert "stands for pictures" in fails("ask", clip, "what is <video> ?", "--model", folder)
    BertConfig().save_pretrained(tmp_path / "bert")
    message = fails("ask", clip, QUESTION, "--model", str(tmp_path / "bert"))
    assert "'bert'" in message
    assert "supported families: glm46v, glm4v" in message
    # a model_type that transformers itself does not know, as in the lmms-lab checkpoints
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "llava_llama_holi"}))
    assert "supported families:" in fails("ask", clip, QUESTION, "--model", str(tmp_path / "bert"))


def test_the_family_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(TypeError, match="supported families"):
        load(tmp_path)
    with pytest.raises(ValueError, match="dtype: 'int8'; valid: auto"):
        load(tmp_path, dtype="int8")


def test_debug_shows_the_traceback() -> None:
    result = holi("flops", "--shape", "nothing", "--debug")
    assert isinstance(result.exception, ValueError)
    assert result.exit_code == 1


def test_wrong_usage_is_status_2(clip: str) -> None:
    for arguments in (
        ["ask", clip],
        ["nothing"],
        ["bench", "--dtype", "int3"],
        ["flops", "--shape", "toy", "--frames", "x"],
    ):
        assert holi(*arguments).exit_code == 2


# --- loading ---------------------------------------------------------------------------------------------------------


def test_loading_keeps_weights_and_settings(checkpoints: dict[str, str], family: str) -> None:
    loaded = load(checkpoints[family], device_map="cpu", dtype="bfloat16", attn_implementation="eager")
    model = toys.make_model(family).to(torch.bfloat16)
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert loaded.model.config._attn_implementation == "eager"
    assert not loaded.model.training
    assert loaded.settings.source.endswith("preprocessor_config.json")
    assert loaded.chat_template == DEFAULT_TEMPLATES[family]
    assert len(loaded.tokenizer) == len(AutoTokenizer.from_pretrained(checkpoints[family]))


# --- flops, list, doctor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "entering", "after", "outer", "both"),
    [("holitom-10", 640, 320, "3.4", "2.8"), ("holitom-25", 1568, 784, "8.7", "7.1")],
)
def test_flops_are_the_papers(preset: str, entering: int, after: int, outer: str, both: str, tmp_path: Path) -> None:
    asked = ("flops", "--shape", "llava-onevision-7b", "--frames", "32", "--convention", "paper", "--json")
    found = json.loads(holi(*asked, "--config", preset).stdout)
    assert (found["tokens"]["entering"], found["tokens"]["after_inner"]) == (entering, after)
    assert f"{found['total']['unreduced'] / 1e12:.1f}" == "40.8"
    assert f"{found['total']['reduced'] / 1e12:.1f}" == both
    without = tmp_path / "outer.yaml"
    without.write_text(f"base: {preset}\ninner: null\n")
    found = json.loads(holi(*asked, "--config", str(without)).stdout)
    assert f"{found['total']['reduced'] / 1e12:.1f}" == outer


def test_flops_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    result = holi("flops", "--shape", "qwen2.5-vl-7b")
    assert result.exit_code == 0
    assert "received attention" in result.stdout
    assert "multiply-adds times two" in result.stdout
    assert "nearest: llava-onevision-7b" in fails("flops", "--shape", "llava-onevison-7b")
    assert "frames: 0" in fails("flops", "--shape", "llava-onevision-7b", "--frames", "0")


def test_list_names_everything() -> None:
    found = json.loads(holi("list", "--json").stdout)
    assert found["methods"] == holimerge.list_methods()
    assert found["families"] == holimerge.list_families()
    assert list(found["presets"]) == holimerge.list_presets()
    assert all(found["presets"].values())
    shown = holi("list").stdout
    assert all(name in shown for group in found.values() for name in group)


def test_doctor_says_what_is_untested() -> None:
    result = holi("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["versions"]["torch"]["value"] == torch.__version__
    assert found["video"]["pyav"]["status"] == "ok"

    def untested(results: list[dict[str, Any]]) -> set[str]:
        return {line.name for line in examine(results) if line.note == UNTESTED}

    never = {"flash_attention_2", "decord", "torchcodec", "several GPUs"}
    never |= {"recorded decoding steps", "frames preprocessed on a GPU"}
    gpus = {f"cuda:{i}" for i in range(torch.cuda.device_count())} or {"cuda"}
    assert untested([]) >= never | gpus
    on_gpu = {"file": "gpu.json", "device_type": "cuda", "attn": "sdpa", "dtype": "bfloat16"}
    assert untested([on_gpu]) >= never
    assert not untested([on_gpu]) & gpus
    assert "flash_attention_2" not in untested([{**on_gpu, "attn": "flash_attention_2"}])
    assert "recorded decoding steps" not in untested([{**on_gpu, "cuda_graphs": True}])
    assert "frames preprocessed on a GPU" not in untested([{**on_gpu, "file": "reading-short-gop-cuda.json"}])
    assert "torchcodec" not in untested([{**on_gpu, "video_backend": "torchcodec"}])
    assert holi("doctor").exit_code == 0


# --- demo, bench -----------------------------------------------------------------------------------------------------


def test_demo_from_file_to_table(tmp_path: Path) -> None:
    output = tmp_path / "new" / "demo.json"
    result = holi("demo", "--videos", "2", "--config", "unpatched", "--config", "holimerge-10", "--output", str(output))
    assert result.exit_code == 0, result.output
    text = result.stdout
    for label in ("2 generated videos", "H.264", "nothing about the accuracy of real models", "video tokens", "FLOPs"):
        assert label in text
    found = json.loads(output.read_text())
    task = found["results"]["tasks"]["synthetic"]
    assert list(task["configs"]) == ["unpatched", "holimerge-10"]
    assert len(set(task["samples"]["video_id"])) == 2
    full, reduced = task["configs"].values()
    assert full["accuracy"]["percent"] > 50
    assert f"{full['accuracy']['percent']:.1f} [" in text
    assert reduced["tokens"]["entering"]["median"] < 0.12 * full["tokens"]["features"]["median"]
    committed = found["full"]["tasks"]["synthetic"]["configs"]["holimerge-10"]["accuracy"]
    assert f"{committed['percent']:.1f} [{committed['low']:.1f}" in text
    for question in found["questions"]:
        assert question["question"] in text
        assert question["answer"] in question["options"]
        assert set(question["answers"].values()) <= set(question["options"])
    assert "no preset 'holimerge-11'" in fails("demo", "--videos", "1", "--config", "holimerge-11")


def test_bench_writes_json(checkpoints: dict[str, str], tmp_path: Path, family: str) -> None:
    output = tmp_path / "bench.json"
    sizes = ("--frames", "4", "--warmup", "0", "--repeats", "1", "--new-tokens", "1", "--text-tokens", "9")
    asked = ("bench", "--model", checkpoints[family], "--config", "holimerge-25", "--config", "keep-all", *sizes)
    result = holi(*asked, "--device", "cpu", "--output", str(output), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(output.read_text())
    assert list(found["cases"]) == ["unpatched", "holimerge-25", "keep-all"]
    assert found["weights"] == "checkpoint"
    assert set(found["gains"]["holimerge-25"]) >= {"ttft_ratio", "ideal_ratio", "share_of_ideal", "reduce_ms"}
    assert holi(*asked, "--device", "cpu").exit_code == 0
    assert "device: 'tpu9'" in fails(*asked, "--device", "tpu9")


def test_the_answer_needs_no_second_run(checkpoints: dict[str, str], clip: str) -> None:
    """One generate gives the first token's time and the whole answer."""
    model, tokenizer, settings, template = load(checkpoints["qwen2_5_vl"])
    inputs = build_inputs(
        QUESTION,
        read_video(clip, frames=4),
        config=model.config,
        tokenizer=tokenizer,
        settings=settings,
        chat_template=template,
    )
    run = run_once(model, inputs, max_new_tokens=5)
    assert run.answer is not None
    assert run.answer.shape == (1, 5)
    assert len(run.per_token) == 4
    assert run.ttft > 0
