"""The decoding bench on a model of a moment."""

from __future__ import annotations

import json

import pytest
import torch
from recording import record_cpu
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


def test_recorded_steps_are_cases_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "toy_config", lambda: toy_config(quick=True))
    only = [name for name in decode_cases(graphs=True) if name.endswith(", graphed")]
    assert only == ["unpatched, graphed", "holimerge-10, graphed", "holimerge-10, outer only, graphed"]
    result = bench_decode(
        frames=8, lengths=(2, 5), batches=(2,), repeats=1, warmup=1, device="cpu", only=only, record=record_cpu
    )
    assert json.loads(json.dumps(result)) == result
    cases = result["batches"][0]["cases"]
    assert list(cases) == ["unpatched", *only]
    assert [case["recording_ms"] and case["recording_ms"]["n"] for case in cases.values()] == [None, 2, 2, 2]
    full, graphed, both, outer = (case["cache_bytes"] for case in cases.values())
    assert full == graphed > outer > both > 0  # a static cache, too, holds what was left
    assert "holimerge-10, graphed, batch 2, tokens a second over unpatched, graphed" in result["ratios"]
    assert len(decode_table(result).rows) == 4
    with pytest.raises(ValueError, match="only: no case 'none'; valid: unpatched, holimerge-10, "):
        bench_decode(frames=8, lengths=(2,), batches=(1,), device="cpu", only=["none"])
