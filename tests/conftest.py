from __future__ import annotations

import os
import warnings
from typing import Any

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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many drawn cases ran, summed over workers."""
    reports = [report for stat in terminalreporter.stats.values() for report in stat if hasattr(report, "when")]
    ran = [n for report in reports if report.when == "call" for name, n in report.user_properties if name == "cases"]
    if ran:
        terminalreporter.write_line(f"{sum(ran)} hostile cases ran")
