"""The decoding bench on a model of a moment."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from holimerge.eval import bench
from holimerge.eval.bench_decode import bench_decode, cache_bytes, decode_cases, decode_table
from holimerge.eval.toy import toy_config


def test_bytes_of_a_cache() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4), 0)
    assert cache_bytes(cache) == 2 * (2 * 3 * 5 * 4) * 4


def test_every_case_writes_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "toy_config", lambda: toy_config(quick=True))
    result = bench_decode(frames=8, lengths=(2, 5), batches=(1, 2), repeats=1, warmup=0, device="cpu")
    assert json.loads(json.dumps(result)) == result
    assert list(decode_cases()) == list(result["batches"][0]["cases"])
    full, both, compact, outer = (case["cache_bytes"] for case in result["batches"][0]["cases"].values())
    assert full > outer > both > compact > 0
    for one, two in zip(*(entry["cases"].values() for entry in result["batches"]), strict=True):
        assert two["cache_bytes"] == 2 * one["cache_bytes"]
        assert {n: speed["n"] for n, speed in one["tokens_per_second"].items()} == {"2": 1, "5": 1}
    assert result["ratios"]["holimerge-10, batch 1, cache"] == pytest.approx(full / both, abs=1e-3)
    speeds = [
        result["batches"][1]["cases"][n]["tokens_per_second"]["5"]["median"] for n in ("unpatched", "holimerge-10")
    ]
    assert result["ratios"]["holimerge-10, batch 2, tokens a second"] == pytest.approx(speeds[1] / speeds[0], abs=1e-2)
    assert len(decode_table(result).rows) == 8
