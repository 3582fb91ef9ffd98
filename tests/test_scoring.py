from __future__ import annotations

import pytest
import torch
from toys import build, make_model, make_video, prompt

import holimerge

CFG = {"base": "holimerge-25", "inner": {"layer": 2}}
OPTIONS = [[20], [21, 22], [23, 24, 25], [20, 60]]


@pytest.mark.parametrize("cfg", [None, CFG, {**CFG, "base": "holitom-25"}], ids=["stock", "holimerge", "holitom"])
def test_scores_equal_the_likelihood_of_the_whole_text(family, cfg):
    model = make_model(family)
    if cfg is not None:
        holimerge.patch_model(model, cfg)
    x = prompt(family)
    scores = holimerge.score_options(model, x, OPTIONS)
    for option, score in zip(OPTIONS, scores, strict=True):
        y = build(family, [[5, 6, 7, make_video(family), 11, 12, 13, *option]])
        labels = torch.full_like(y["input_ids"], -100)
        labels[:, -len(option) :] = y["input_ids"][:, -len(option) :]
        with torch.no_grad():
            logits = model(**y, labels=labels).logits[0, -len(option) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(option)[:, None]).sum()
        assert score == pytest.approx(float(expected), abs=5e-4)


def test_the_options_do_not_change_each_other_and_are_scored_by_one_prefill(family):
    model = make_model(family)
    holimerge.patch_model(model, CFG)
    x, calls = prompt(family), []
    tower = model.model.vision_tower if family == "llava_onevision" else model.model.visual
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    together = holimerge.score_options(model, x, OPTIONS)
    assert len(calls) == 1
    hook.remove()
    handle = model.__dict__["_holimerge_handle"]
    chosen = handle.selection
    for option, score in zip(OPTIONS, together, strict=True):
        assert holimerge.score_options(model, x, [option])[0] == pytest.approx(score, abs=1e-6)
        assert torch.equal(handle.selection.inner[0], chosen.inner[0])
        assert torch.equal(handle.selection.outer[0].assignment, chosen.outer[0].assignment)


def test_generated_and_scored_answers_agree(family):
    model = make_model(family)
    holimerge.patch_model(model, CFG)
    x = prompt(family)
    with torch.no_grad():
        out = model.generate(**x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    answer = out.sequences[0, x["input_ids"].shape[1] :].tolist()
    expected = sum(float(step[0].log_softmax(-1)[token]) for step, token in zip(out.logits, answer, strict=True))
    assert holimerge.score_options(model, x, [answer])[0] == pytest.approx(expected, abs=5e-4)


def test_wrong_options_are_refused(family):
    model, x = make_model(family), prompt(family)
    with pytest.raises(ValueError, match="at least one token"):
        holimerge.score_options(model, x, [[1], []])
    with pytest.raises(ValueError, match="at least one token"):
        holimerge.score_options(model, x, [])
    with pytest.raises(ValueError, match="batch of 2"):
        holimerge.score_options(model, build(family, [[5, 6], [7, 8]]), [[1]])
