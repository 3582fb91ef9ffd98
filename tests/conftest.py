from __future__ import annotations

import os
import warnings

import pytest
import torch
from toys import FAMILIES, HERE, MISSING

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
warnings.filterwarnings("ignore", message=".*token_id.*")


def pytest_report_header() -> list[str]:
    return [f"transformers {HERE}; families: {', '.join(FAMILIES)}", *(f"left out: {why}" for why in MISSING.values())]


@pytest.fixture(params=["llava_onevision", "qwen2_5_vl"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["sdpa", "eager"])
def attn(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
