"""A patched forward against one built by hand: stock modules called one by one, choices made by the slow oracle.

Nothing here uses holimerge's hooks, packing, attention scores or merging; only stock layers and `oracle`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from toys import VIDEO, build, make_model, make_video

import holimerge


def received_by_hand(model: Any, family: str, x: dict[str, torch.Tensor]) -> np.ndarray:
    """[T, N]: attention received in the last vision layer, from eager weights, pooled as the features are."""
    maps = []
    core = model.model
    if family == "llava_onevision":
        layer = core.vision_tower.encoder.layers[-1].self_attn
        hook = layer.register_forward_hook(lambda _m, _a, out: maps.append(out[1]))
        core.get_video_features(x["pixel_values_videos"])
        hook.remove()
        received = maps[0].mean((1, 2))  # [T, P]
        return core.apply_pooling(received[..., None])[..., 0].numpy()
    # Qwen returns no weights: from the block's own projections, in the tower's windowed order
    visual, seen = core.visual, {}
    block = visual.blocks[-1].attn
    hook = block.register_forward_pre_hook(lambda _m, a, k: seen.update(h=a[0], **k), with_kwargs=True)
    marker: dict[str, torch.Tensor] = {}
    merger = visual.merger.register_forward_hook(lambda _m, a, out: marker.update(n=out))
    features = core.get_video_features(x["pixel_values_videos"], x["video_grid_thw"]).pooler_output[0]
    hook.remove()
    merger.remove()
    hidden = seen["h"]
    q, k, _ = block.qkv(hidden).view(len(hidden), 3, block.num_heads, -1).permute(1, 2, 0, 3)
    cos, sin = seen["position_embeddings"]

    def rotated(t: torch.Tensor) -> torch.Tensor:
        half = t.shape[-1] // 2
        return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

    q, k = rotated(q), rotated(k)
    frames, rows, columns = x["video_grid_thw"][0].tolist()
    span = rows * columns
    received = [
        oracle.received_attention(
            q[:, t * span : (t + 1) * span].double().numpy(),
            k[:, t * span : (t + 1) * span].double().numpy(),
            block.scaling,
        )
        for t in range(frames)
    ]
    grouped = np.concatenate(received).reshape(-1, 4).mean(1)
    # find the raster order by matching feature rows
    order = [int((marker["n"] - f).abs().sum(-1).argmin()) for f in features]
    assert sorted(order) == list(range(len(order)))
    return grouped[order].reshape(frames, -1)


def reduce_by_hand(model: Any, family: str, x: dict[str, torch.Tensor], **rules: Any) -> tuple[Any, torch.Tensor]:
    core = model.model
    if family == "llava_onevision":
        frames = x["pixel_values_videos"].shape[1]
        # without the newline, which older versions of transformers append later
        features = core.get_video_features(x["pixel_values_videos"]).pooler_output[0, : frames * 16]
    else:
        features = core.get_video_features(x["pixel_values_videos"], x["video_grid_thw"]).pooler_output[0]
        frames = int(x["video_grid_thw"][0, 0])
    scores = received_by_hand(model, family, x)
    grid = features.view(frames, -1, features.shape[-1]).double().numpy()
    result = oracle.reduce_video(grid, scores, **rules)
    return result, torch.tensor(result.merge(features.double().numpy()), dtype=features.dtype)


def language_by_hand(
    model: Any, embeds: torch.Tensor, positions: torch.Tensor, video: torch.Tensor, sizes: torch.Tensor, inner: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states of the entries that are left, and which they are; attention weights from eager layers."""
    lm = model.model.language_model
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
        got = {}
        hook = layer.self_attn.register_forward_hook(lambda _m, _a, out, got=got: got.update(w=out[1]))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=table)
        hook.remove()
        weights = got["w"]
    return lm.norm(hidden)[0], rows


@pytest.mark.parametrize("merge", ["mean", "pairwise", "drop", None])
@pytest.mark.parametrize("rule", ["authors", "exact", "exact-segment-original"])
@pytest.mark.parametrize("seed", range(4))
def test_a_patched_forward_equals_one_built_by_hand(family, merge, rule, seed):
    model = make_model(family, attn="eager", seed=seed)
    video = make_video(family, frames=8, seed=seed)
    x = build(family, [[5, 6, video, 7, 8, 9]])
    exact = rule != "authors"
    order = "raster" if rule == "exact" else "segment"
    positions = {"authors": "contiguous", "exact": "auto", "exact-segment-original": "original"}[rule]
    cfg: dict[str, Any] = {
        "method": "holitom",
        "budget": {"retain": 0.3, "exact": exact},
        "outer": {"at": "projector_output", "similarity": 0.7, "order": order, "positions": positions},
    }
    inner = None
    if merge is not None:
        inner = cfg["inner"] = {"layer": 2, "retain": 0.5, "merge": merge}

    with torch.no_grad():
        rules = {"exact": exact, "tau": 0.7, "order": order, "retain": 0.3}
        result, kept = reduce_by_hand(model, family, x, **rules)
        ids = x["input_ids"][0]
        where = (ids == VIDEO).nonzero().flatten()
        newline = family == "llava_onevision"
        embeds, slots, is_video, size = [], [], [], []
        text = model.get_input_embeddings()(ids)
        anchors = [int(where[k.anchor]) for k in result.kept]
        for j, token in enumerate(ids.tolist()):
            if token != VIDEO:
                embeds.append(text[j]), slots.append(j), is_video.append(False), size.append(1)
            elif j == where[0]:  # the whole video, in sequence order
                embeds += list(kept)
                slots += anchors
                is_video += [True] * len(kept)
                size += [len(k.members) for k in result.kept]
            if newline and j == where[-1]:
                embeds.append(model.model.image_newline), slots.append(j), is_video.append(False), size.append(1)
        original = torch.tensor(slots)
        if positions == "contiguous" or (positions == "auto" and family == "llava_onevision"):
            place = torch.arange(len(slots))[None]
            place = place if family == "llava_onevision" else place.expand(3, 1, -1)
        elif family == "llava_onevision":
            place = original[None]
        else:
            full, _ = model.model.get_rope_index(
                x["input_ids"], x["mm_token_type_ids"], video_grid_thw=x["video_grid_thw"],
                second_per_grid_ts=x["second_per_grid_ts"], attention_mask=x["attention_mask"],
            )  # fmt: skip
            place = full[:, :, original]
        hidden, rows = language_by_hand(
            model, torch.stack(embeds), place, torch.tensor(is_video), torch.tensor(size), inner
        )
        expected = model.lm_head(hidden)

        holimerge.patch_model(model, cfg)
        logits = model(**x).logits[0]
    record = model.__dict__["_holimerge_handle"].selection.outer[0]
    assert record.anchor.tolist() == [k.anchor for k in result.kept]
    slots_taken = sorted(original.tolist()) if order == "segment" else original.tolist()
    columns = torch.tensor(slots_taken)[rows]
    torch.testing.assert_close(logits[columns], expected, atol=1e-4, rtol=0)
    report = holimerge.last_report(model).videos[0]
    assert report.entering == len(result.kept)
    if inner is not None:
        assert report.after_inner == max(1, round(len(result.kept) * 0.5))
        assert report.after_inner == int(torch.tensor(is_video)[rows].sum())
