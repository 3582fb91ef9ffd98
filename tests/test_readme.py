"""What the README says was run, and its figures come from result files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import holimerge
from holimerge.eval.flops import flops_report
from holimerge.eval.readme import ratios_block, results_block, rewritten

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_what_the_result_files_say():
    assert rewritten(TEXT, results_block(ROOT / "results")) == TEXT
    benchmarks = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert rewritten(benchmarks, ratios_block(ROOT / "results")) == benchmarks
    with pytest.raises(ValueError, match="needs the two lines"):
        rewritten("no markers", "")


def test_every_result_names_its_conditions():
    files = list((ROOT / "results").glob("*.json"))
    assert files
    for file in files:
        conditions = json.loads(file.read_text(encoding="utf-8"))["conditions"]
        assert {"device", "dtype", "seed", "versions", "commit", "repeats"} <= set(conditions), file.name


def test_the_flops_table_is_what_the_command_prints():
    rows = re.findall(r"\| 40\.8 \|([^\n]*)\|\n\|[^|]*\| \|([^\n]*)\|", TEXT)
    outer, inner = ([float(x) for x in row.split("|")] for row in rows[0])
    for i, share in enumerate((25, 20, 15, 10)):
        for figures, cfg in ((outer, {"base": f"holitom-{share}", "inner": None}), (inner, f"holitom-{share}")):
            report = flops_report(
                "llava-onevision-7b", frames=32, config=holimerge.load_config(cfg), convention="paper"
            )
            assert round(report["total"]["reduced"] / 1e12, 1) == figures[i]
    full = flops_report("llava-onevision-7b", frames=32, config="holitom-10", convention="paper")
    assert round(full["total"]["unreduced"] / 1e12, 1) == 40.8


@pytest.mark.parametrize(
    ("shape", "full", "left"), [("llava-onevision-7b", 119.7, 28.1), ("llava-onevision-0.5b", 28.6, 21.0)]
)
def test_the_exact_figures_are_what_the_command_prints(shape, full, left):
    total = flops_report(shape, frames=32, config="holimerge-10", convention="exact")["total"]
    assert round(total["unreduced"] / 1e12, 1) == full
    assert round(total["reduced"] / 1e12, 1) == left
    assert f"{full}" in TEXT
    assert f"{left}" in TEXT


@pytest.mark.parametrize(
    ("shape", "written"), [("llava-onevision-7b", "0.97"), ("qwen2.5-vl-7b", "1.09"), ("qwen3-vl-8b", "1.16")]
)
def test_four_times_the_frames_cost_about_the_flops_of_one(shape, written):
    many, few = (flops_report(shape, frames=frames, config="more-frames-4-fast") for frames in (128, 32))
    ratio = f"{many['total']['reduced'] / few['total']['unreduced']:.2f}"
    said = re.findall(r"([\w.-]+) (\d\.\d\d)", (ROOT / "configs/more-frames-4-fast.yaml").read_text(encoding="utf-8"))
    assert (shape, ratio) in [(name.lower(), number) for name, number in said]
    assert ratio == written
    if shape != "qwen2.5-vl-7b":  # the README names the least and the most
        assert f"{ratio} (" in TEXT


def test_the_yaml_of_the_readme_loads():
    blocks = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        holimerge.load_config(yaml.safe_load(block))


def test_presets_methods_and_commands_named_in_the_readme_exist():
    shown = subprocess.run(
        [sys.executable, "-m", "holimerge.eval.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = [
        c for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for c in re.findall(r"^holimerge (\w+)", block, re.M)
    ]
    assert len(commands) >= 5
    for command in commands:
        assert command in shown
    for preset in re.findall(r"`(holimerge-\d+|holitom-\d+|keep-all)`", TEXT):
        assert preset in holimerge.list_presets()
    for name in re.findall(r"holimerge\.(\w+)\(", TEXT):
        assert hasattr(holimerge, name)
