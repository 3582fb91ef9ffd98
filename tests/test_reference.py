"""A patched forward against one built by hand: stock modules called one by one, choices made by the slow oracle.

Nothing here uses holimerge's hooks, packing, attention scores or merging; only stock layers and `oracle`. Features and
the attention they receive come from a family's toy, which reads them off the stock model.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from patching import handle_of, needs, patch
from toys import FAMILIES, TOYS, Toy, build, cases, make_model, make_video

import holimerge

BY_HAND = [name for name in FAMILIES if not TOYS[name].not_by_hand]
RULES = ["authors", "exact", "exact-segment-original"]
EVERY = [(merge, rule, 0) for merge in ("mean", "pairwise", "drop", None) for rule in RULES]
# each rule once, and each merge
FEW = [(merge, rule, 0) for merge, rule in zip(("pairwise", "mean", "drop", None), (*RULES, "exact"), strict=True)]
AGAIN = [(merge, rule, 1) for merge, rule, _ in EVERY]
CASES = [case for case in cases(EVERY, FEW) if case[0] in BY_HAND]
# other numbers for two; the other families differ from them by what one seed shows
CASES += [(name, *case) for name in ("llava_onevision", "qwen2_5_vl") for case in AGAIN]


def reduce_by_hand(toy: Toy, model: Any, x: dict[str, torch.Tensor], **rules: Any) -> tuple[Any, list[torch.Tensor]]:
    """The oracle's choices, and by them the merged features of every level, [K, D] each."""
    levels = toy.features(model, x)
    scores = toy.received(model, x)
    result = oracle.reduce_video(levels[0].view(*scores.shape, -1).double().numpy(), scores, **rules)
    return result, [torch.tensor(result.merge(y.double().numpy()), dtype=y.dtype) for y in levels]


def language_by_hand(
    lm: Any,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    video: torch.Tensor,
    sizes: torch.Tensor,
    inner: Any,
    deepstack: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states of the entries that are left, and which they are; attention weights from eager layers.

    deepstack: what is added to the video's entries after layers 0, 1, ...
    """
    assert inner is None or inner["layer"] >= len(deepstack)
    hidden, rows, weights = embeds[None], torch.arange(len(embeds)), torch.empty(0)
    for index, layer in enumerate(lm.layers):
        if inner is not None and index == inner["layer"]:
            to_video = weights[0].mean(0)[-1]
            kept, merged = oracle.inner_merge(
                hidden[0].double().numpy(),
                video[rows].numpy(),
                to_video.double().numpy(),
                sizes[rows].double().numpy(),
                inner["retain"],
                inner["merge"],
            )
            hidden, rows = torch.tensor(merged, dtype=hidden.dtype)[None], rows[torch.as_tensor(kept)]
        n = len(rows)
        mask = torch.full((n, n), -math.inf).triu(1)[None, None]
        table = lm.rotary_emb(hidden, positions[..., rows])
        if not hasattr(layer, "self_attn"):  # linear attention is causal by itself
            hidden = layer(hidden, attention_mask=None, position_embeddings=table)
            continue
        got = {}
        hook = layer.self_attn.register_forward_hook(lambda _m, _a, out, got=got: got.update(w=out[1]))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=table)
        hook.remove()
        weights = got["w"]
        if index < len(deepstack):
            hidden = hidden.index_add(1, video.nonzero().flatten(), deepstack[index][None])
    return lm.norm(hidden)[0], rows


@pytest.mark.parametrize(("family", "merge", "rule", "seed"), CASES)
def test_a_patched_forward_equals_one_built_by_hand(family, merge, rule, seed):
    exact = rule != "authors"
    order = "raster" if rule == "exact" else "segment"
    positions = {"authors": "contiguous", "exact": "auto", "exact-segment-original": "original"}[rule]
    needs(family, inner=merge is not None, positions=positions, order=order)
    toy = TOYS[family]
    model = make_model(family, attn="eager", seed=seed)
    x = build(family, [[5, 6, make_video(family, frames=8, seed=seed), 7, 8, 9]])
    cfg: dict[str, Any] = {
        "method": "holitom",
        "budget": {"retain": 0.3, "exact": exact},
        "outer": {"at": "projector_output", "similarity": 0.7, "order": order, "positions": positions},
    }
    inner = None
    if merge is not None:
        layer = 2 if 2 in toy.inner_layers else toy.inner_layers[0]
        inner = cfg["inner"] = {"layer": layer, "retain": 0.5, "merge": merge}

    with torch.no_grad():
        rules = {"exact": exact, "tau": 0.7, "order": order, "retain": 0.3}
        result, (kept, *deepstack) = reduce_by_hand(toy, model, x, **rules)
        ids = x["input_ids"][0]
        placeholder = ids == toy.placeholder
        where = placeholder.nonzero().flatten()
        # in sequence order the kept tokens take the placeholders of their anchors, and the separators the last ones
        anchors = torch.tensor([token.anchor for token in result.kept])
        taken, separators = where[anchors.sort().values], toy.separators(model)
        assert len(where) == result.total + len(separators)
        embeds, size, origin = model.get_input_embeddings()(ids), torch.ones(len(ids)), torch.arange(len(ids))
        is_video = torch.zeros(len(ids), dtype=torch.bool)
        embeds[taken], is_video[taken], origin[taken] = kept, True, where[anchors]
        embeds[where[result.total :]] = separators
        size[taken] = torch.tensor([float(len(token.members)) for token in result.kept])
        placeholder[taken] = placeholder[where[result.total :]] = False
        columns = (~placeholder).nonzero().flatten()
        place = toy.original_positions(model, x)[..., origin[columns]]
        if positions == "contiguous" or (positions == "auto" and not toy.mrope):
            place = torch.arange(len(columns)).expand_as(place)
        lm = toy.language_model(model)
        hidden, rows = language_by_hand(lm, embeds[columns], place, is_video[columns], size[columns], inner, deepstack)
        expected = model.get_output_embeddings()(hidden)

        patch(model, cfg)
        logits = model(**x).logits[0]
    assert handle_of(model).selection.outer[0].anchor.tolist() == anchors.tolist()
    torch.testing.assert_close(logits[columns[rows]], expected, atol=1e-4, rtol=0)
    report = holimerge.last_report(model).videos[0]
    assert report.entering == len(result.kept)
    if inner is not None:
        assert report.after_inner == max(1, round(len(result.kept) * 0.5))
        assert report.after_inner == int(is_video[columns][rows].sum())
