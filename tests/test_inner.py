"""The inner merge's maths against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import holimerge.attention
from holimerge.attention import query_attention, received_attention
from holimerge.config import Inner
from holimerge.inner import choose_owners, merge_owned


@pytest.mark.parametrize("merge", ["mean", "pairwise", "drop"])
@pytest.mark.parametrize("seed", range(60))
def test_inner_merge_agrees_with_the_oracle(merge, seed):
    rng = np.random.default_rng(seed)
    rows, width, depth = int(rng.integers(1, 5)), int(rng.integers(1, 20)), int(rng.integers(2, 6))
    ties = seed % 3 == 0  # exactly representable, few values: ties everywhere
    hidden = rng.integers(-1, 2, (rows, width, depth)).astype(float) if ties else rng.normal(size=(rows, width, depth))
    scores = rng.integers(0, 3, (rows, width)).astype(float) if ties else rng.random((rows, width))
    sizes = rng.integers(1, 9, (rows, width)).astype(float)
    counts = rng.integers(0, width + 1, rows) if seed % 4 else np.full(rows, width)
    if not counts.any():
        counts[0] = 1  # a batch without a video merges nothing
    options = Inner(layer=2, retain=float(rng.choice([0.05, 0.3, 0.5, 0.9, 1.0])), merge=merge)
    keep = [options.keep(int(n)) for n in counts]
    owner = choose_owners(torch.tensor(hidden), torch.tensor(scores), counts.tolist(), keep)
    merged = merge_owned(torch.tensor(hidden), torch.tensor(sizes), owner, merge)
    for row in range(rows):
        n = int(counts[row])
        is_video = np.arange(width) < n
        kept, expected = oracle.inner_merge(hidden[row], is_video, scores[row], sizes[row], options.retain, merge)
        ours = [i for i in range(width) if i >= n or owner[row, i] == i]
        assert ours == list(kept)
        np.testing.assert_allclose(merged[row, ours].numpy(), expected, atol=1e-9)


def test_mean_does_not_depend_on_the_order_of_tokens_and_pairwise_does():
    torch.manual_seed(0)
    hidden, sizes = torch.randn(1, 6, 4, dtype=torch.float64), torch.arange(1.0, 7)[None]
    owner = torch.tensor([[0, 0, 0, 0, 0, 5]])
    swap = torch.tensor([0, 3, 2, 1, 4, 5])
    for mode, same in (("mean", True), ("pairwise", False)):
        a = merge_owned(hidden, sizes, owner, mode)[0, 0]
        b = merge_owned(hidden[:, swap], sizes[:, swap], owner, mode)[0, 0]
        assert torch.allclose(a, b) == same


def test_query_attention_is_the_last_row_of_full_attention():
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 5), torch.randn(2, 3, 7, 5)
    allowed = torch.ones(2, 7, dtype=torch.bool)
    allowed[0, :2] = allowed[1, 6] = False
    logits = torch.einsum("bhd,bhld->bhl", q, k.repeat_interleave(2, 1)) * 0.3
    expected = logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(query_attention(q, k, allowed, 0.3), expected)


def test_received_attention_agrees_with_the_oracle_and_with_its_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(5, 2, 9, 4)), rng.normal(size=(5, 2, 9, 4))
    expected = np.stack([oracle.received_attention(a, b, 0.5) for a, b in zip(q, k, strict=True)])
    whole = received_attention(torch.tensor(q), torch.tensor(k), 0.5)
    np.testing.assert_allclose(whole.numpy(), expected, atol=1e-6)
    monkeypatch.setitem(holimerge.attention._CHUNK_BYTES, "cpu", 1)
    torch.testing.assert_close(received_attention(torch.tensor(q), torch.tensor(k), 0.5), whole)
