"""The embedded model: how it is trained, what is shipped, and that its published figures come out again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from holimerge.eval.load import load
from holimerge.eval.tiny import CHECKPOINT
from holimerge.eval.tiny.build import tiny_model, write_checkpoint
from holimerge.eval.tiny.language import INDEX
from holimerge.eval.tiny.meaning import Code, labels
from holimerge.eval.tiny.optimize import rate_at, restore, save
from holimerge.eval.tiny.questions import ask
from holimerge.eval.tiny.splits import LEARNED, questions_of, story_of
from holimerge.eval.tiny.train_language import (
    BEFORE,
    Phase,
    answer_states,
    begin_aligned,
    draw_batch,
    embed,
    fixed_length,
    misses,
    pack,
    some_objects,
    strays,
    train_language,
    watched,
)
from holimerge.eval.tiny.train_vision import Tower, frames_of, on_objects, pixels
from holimerge.eval.tiny.world import EASY, describe, draw_story, render, shorter

SHORT = shorter(EASY, (3, 5), (1, 2))


# --- training ---


def batch_of(code: Code):
    torch.manual_seed(0)
    model = tiny_model().eval()
    begin_aligned(model, code)
    phase = Phase(1, ((SHORT, 100),), tokens=400, real=False, each=2)
    return model, *draw_batch(phase, (1, 2), code, None)


@torch.no_grad()
def test_packed_questions_equal_one_forward_each() -> None:
    """Many questions behind one video see exactly what each would see alone, in the stock model."""
    model, tokens, asked, truth, _ = batch_of(Code())
    prefix = embed(model, tokens)
    watch = some_objects(truth, torch.Generator().manual_seed(0))
    out = answer_states(model.model.language_model, prefix, asked, watch)
    compared = 0
    for b in range(len(tokens)):
        for k in range(asked.ids.shape[1]):
            if asked.category[b, k] < 0:
                continue
            words = model.model.language_model.embed_tokens(asked.ids[b, k, : asked.last[b, k] + 1])
            alone = model.model.language_model(inputs_embeds=torch.cat([prefix[b], words])[None])
            torch.testing.assert_close(out.answers[b, k], alone.last_hidden_state[0, -1], rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared >= 10


@torch.no_grad()
def test_the_prefix_is_what_the_model_makes_of_a_video() -> None:
    """Tower, pooling and placement of the training are those of the stock model, from pixels on."""
    torch.manual_seed(1)
    model = tiny_model().eval()
    story = draw_story(SHORT, (4,))
    values = pixels(torch.from_numpy(render(story)))
    tokens = Tower(model)(values)
    stock = model.model.get_video_features(pixel_values_videos=values[None]).pooler_output
    stock = stock[0] if isinstance(stock, (tuple, list)) else stock
    torch.testing.assert_close(tokens.flatten(0, 1), stock.reshape(-1, stock.shape[-1])[: tokens[..., 0].numel()])
    question = ask(story)[0]
    asked = pack([[question]], [labels(describe(story))])
    prefix = embed(model, tokens[None])
    out = answer_states(model.model.language_model, prefix, asked, torch.full((1, 1), len(BEFORE)))
    ids = [*BEFORE, *[INDEX["<video>"]] * (prefix.shape[1] - len(BEFORE)), *asked.ids[0, 0, : asked.last[0, 0] + 1]]
    logits = model(input_ids=torch.tensor([ids]), pixel_values_videos=values[None]).logits[0, -1]
    torch.testing.assert_close(model.lm_head(out.answers)[0, 0], logits, rtol=1e-4, atol=1e-4)


def test_losses_of_attention_are_shares() -> None:
    _, tokens, asked, truth, _ = batch_of(Code())
    B, T, N, _ = tokens.shape
    P = len(BEFORE) + T * N + 1
    flat = torch.zeros(B, 2, asked.ids.shape[1], P)
    real = (asked.category >= 0) & asked.evidence.any(-1)
    wanted = -(asked.evidence.sum(-1)[real] / P).log().mean()
    torch.testing.assert_close(misses(flat, asked), wanted)
    sharp = torch.full_like(flat, -50.0)
    sharp[..., len(BEFORE) : -1] = torch.where(asked.evidence[:, None], 50.0, -50.0)
    assert misses(sharp, asked) < 1e-3
    watch = some_objects(truth, torch.Generator().manual_seed(1), count=20)
    own = truth.kind.flatten(1).gather(1, watch - len(BEFORE))
    objects = (truth.kind >= 0).flatten(1).sum(1).clamp_max(20)
    assert ((own >= 0).sum(1) == objects).all()  # objects first, whatever else fills up
    frame = (watch - len(BEFORE)) // N
    total, found = 0, []
    for b in range(B):
        for w in range(watch.shape[1]):
            same = [
                i for i, kind in enumerate(truth.kind[b].flatten()) if kind == own[b, w] >= 0 and i // N < frame[b, w]
            ]
            if same:
                total += 1
                found.append(-torch.tensor(len(same) / P).log())
    assert total
    torch.testing.assert_close(strays(torch.zeros(B, 2, 20, P), watch, truth), torch.stack(found).mean())


def test_hints_say_what_only_time_tells() -> None:
    story = draw_story(fixed_length(EASY, np.random.default_rng(0)), (11,))
    truth = watched([labels(describe(story))])
    at = 0
    for index, scene in enumerate(story.scenes):
        assert (truth.scene[0, at : at + scene.frames] == min(index, 5)).all()
        before = story.scenes[index - 1].place + 1 if index else 0
        assert (truth.before[0, at : at + scene.frames] == before).all()
        at += scene.frames
    moving = sum(t.direction is not None for s in story.scenes for t in s.things)
    assert bool((truth.direction > 0).any()) == bool(moving)


def test_meanings_are_orthonormal_and_add_up() -> None:
    code = Code()
    torch.testing.assert_close(code.table @ code.table.T, torch.eye(len(code.table)), atol=1e-5, rtol=0)
    truth = labels(describe(draw_story(EASY, (2,))))
    tokens = code.tokens(truth)
    there = truth.shape >= 0
    assert ((tokens @ code.kind("shape").T).argmax(-1) == truth.shape)[there].all()
    assert ((tokens @ code.kind("color").T).argmax(-1) == truth.color)[there].all()
    assert ((tokens @ code.kind("place").T).argmax(-1) == truth.place).all()
    assert ((tokens @ code.of("object")) > 0.5).equal(there)


def test_frames_and_patches_of_vision_training() -> None:
    frames, truth = frames_of(EASY, [(1,), (2,)])
    assert frames.shape == (4, 96, 96, 3)
    patches = on_objects(truth)
    assert patches.shape == (4, 144)
    assert int(patches.sum()) == 4 * int((truth.shape >= 0).sum())


def test_a_checkpoint_survives_and_a_run_goes_on(tmp_path: Path) -> None:
    assert restore(tmp_path) is None
    save(tmp_path, {"a": torch.arange(3.0)}, {"step": 7})
    weights, state = restore(tmp_path) or ({}, {})
    assert state == {"step": 7}
    assert weights["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]

    model = tiny_model()
    phases = [Phase(1, ((SHORT, 100),), tokens=150, real=False, each=1)] * 2
    train_language(model, tmp_path / "run", phases[:1], seed=3)
    assert restore(tmp_path / "run")[1]["at"] == [1, 0]
    again = tiny_model()
    train_language(again, tmp_path / "run", phases[:1], seed=3)  # nothing is left to do
    before, after = (m.model.language_model.state_dict() for m in (model, again))
    assert all(torch.equal(before[name], after[name]) for name in before)
    train_language(again, tmp_path / "run", phases, seed=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [(0, 1), (1, 1)]


def test_the_learning_rate_rises_stays_and_falls() -> None:
    assert rate_at(0.0) < 0.2
    assert rate_at(0.3) == 1.0
    assert rate_at(0.85) == pytest.approx(0.5)
    assert rate_at(1.0) == 0.02


def test_the_one_command_makes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    command = [sys.executable, "-m", "holimerge.eval.tiny.train", "--work", tmp_path / "work", "--output", target]
    done = subprocess.run([*command, "--scale", "0.0005"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((target / "training.json").read_text())
    assert record["command"] == "make train-tiny"
    assert record["conditions"]["versions"]["torch"] == torch.__version__
    assert set(record["minutes"]) == {"vision", "language"}
    loaded = load(target, dtype="float32")
    weights = restore(tmp_path / "work" / "language")[0]
    trained = weights["lm_head.weight"].to(torch.bfloat16).float()
    assert torch.equal(loaded.model.lm_head.weight, trained)


# --- what is shipped ---


def test_the_checkpoint_is_small_safe_and_bf16() -> None:
    from safetensors import safe_open

    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sum(files.values()) <= 8e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "evaluation.json"} <= set(files)
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    loaded = load(CHECKPOINT)
    assert loaded.model.dtype == torch.bfloat16
    assert type(loaded.model).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert loaded.settings.size == (96, 96)
    assert loaded.settings.mean == (0.5, 0.5, 0.5)


def test_the_untrained_files_are_those_of_the_code(tmp_path: Path) -> None:
    write_checkpoint(tiny_model(), tmp_path)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        ours, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path, CHECKPOINT))
        ours.pop("transformers_version", None)
        shipped.pop("transformers_version", None)
        assert ours == shipped, name


def test_the_card_and_the_gates_follow_from_the_evaluation() -> None:
    from holimerge.eval.tiny.card import card
    from holimerge.eval.tiny.gates import gates

    evaluation = json.loads((CHECKPOINT / "evaluation.json").read_text())
    assert evaluation["gates"] == gates(evaluation)
    assert card(CHECKPOINT) == (CHECKPOINT / "README.md").read_text()
    task = evaluation["tasks"]["synthetic"]
    assert len(set(task["samples"]["video_id"])) >= 500
    assert sorted(task["configs"]["unpatched"]["by_category"]) == sorted(LEARNED)


def test_gates_notice_what_they_are_for() -> None:
    from holimerge.eval.tiny.gates import gates

    evaluation = json.loads((CHECKPOINT / "evaluation.json").read_text())
    task = evaluation["tasks"]["synthetic"]

    def unmet() -> set[str]:
        return {gate["gate"].split(":")[0] for gate in gates(evaluation) if not gate["met"]}

    honest = unmet()
    whole = task["configs"]["unpatched"]
    evaluation["attention"]["ratio"] = 0.8
    assert unmet() - honest == {"received attention higher on objects than on background"}
    evaluation["attention"]["ratio"] = 2.0
    evaluation["baselines"]["where"]["blind"]["percent"] = whole["by_category"]["where"]["percent"] - 19
    assert "where" in unmet()
    some = next(name for name in task["configs"] if name != "unpatched")
    task["configs"][some]["correct"] = [1] * len(whole["correct"])
    assert f"all tokens not below {some}" in unmet()


def test_published_answers_come_out_again(tmp_path: Path) -> None:
    """A few test videos, from H.264 to the answer: as in the committed run, up to what another CPU's rounding flips."""
    from holimerge.eval.evaluate import evaluate

    published = json.loads((CHECKPOINT / "evaluation.json").read_text())["tasks"]["synthetic"]
    names = ["unpatched", "holimerge-10"]
    limit = sum(len(questions_of(story_of("test", index))) for index in range(5))
    found = evaluate(
        str(CHECKPOINT), names, ["synthetic"], tmp_path / "run", data=[f"synthetic={tmp_path}"], limit=limit,
        dtype="float32",
    )  # fmt: skip
    assert found is not None
    mine = found["tasks"]["synthetic"]
    assert mine["samples"]["id"] == published["samples"]["id"][:limit]
    for name in names:
        theirs = published["configs"][name]["correct"][:limit]
        flips = sum(a != b for a, b in zip(mine["configs"][name]["correct"], theirs, strict=True))
        assert flips <= (1 if name == "unpatched" else limit // 8), name
    assert sum(mine["configs"]["unpatched"]["correct"]) > 0.6 * limit
    assert mine["configs"]["holimerge-10"]["tokens"]["entering"]["median"] < 130
