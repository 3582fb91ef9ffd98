"""transformers' versions: those outside the tested range are told about, and no family is left out silently."""

from __future__ import annotations

import importlib
import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import toys
from packaging.requirements import Requirement
from packaging.version import Version
from patching import logits, patch
from toys import FAMILIES, HERE, MISSING, make_model, prompt

import holimerge
from holimerge import list_families
from holimerge.registry import family_module

ROOT = Path(__file__).parent.parent
LOW, HIGH = holimerge.api.TESTED_TRANSFORMERS


@pytest.fixture
def a_new_process() -> Iterator[None]:
    holimerge.api._check_version.cache_clear()
    yield
    holimerge.api._check_version.cache_clear()


def runs(family: str) -> None:
    model = make_model(family)
    assert logits(patch(model, "holimerge-25"), prompt(family)).isfinite().all()
    assert holimerge.last_report(model).videos


def pinned(file: str) -> str:
    """major.minor of the transformers that an environment of the Makefile gets."""
    found = re.search(r"^transformers==(\d+\.\d+)", (ROOT / file).read_text(), re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize("family", list_families())
def test_every_family_runs_here_or_says_what_it_needs(family):
    if family in MISSING:
        pytest.skip(MISSING[family])
    runs(family)


@pytest.mark.parametrize("family", MISSING)
def test_what_is_refused_here_would_not_work_here(family, monkeypatch):
    monkeypatch.setattr(family_module(family).FAMILY, "since", LOW, raising=False)
    try:
        monkeypatch.setitem(toys.TOYS, family, importlib.import_module(f"toys.{family}").TOY)
        runs(family)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        return
    pytest.fail(f"{family} runs on transformers {HERE} too")


@pytest.mark.skipif(Version(HIGH) > HERE, reason=f"transformers {HERE} is not the newest tested one")
def test_the_newest_tested_transformers_has_every_family():
    assert not MISSING


def test_the_range_is_what_is_installed_and_what_the_package_asks_for():
    assert pinned("constraints-oldest.txt") == LOW
    assert pinned("constraints.txt") == HIGH
    asked = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert str(next(r.specifier for r in asked if r.name == "transformers")) == f"<6,>={LOW}"
    assert f"transformers {LOW} to {HIGH} tested" in (ROOT / "README.md").read_text()


def test_the_table_of_families_tells_the_oldest_transformers_of_each():
    rows = [row for row in (ROOT / "FAMILIES.md").read_text().splitlines() if row.startswith("| `")][1:]
    told = {name: row.split("|")[-2].strip() for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == {name: family_module(name).FAMILY.since for name in list_families()}


@pytest.mark.usefixtures("a_new_process")
@pytest.mark.parametrize("version", ["5.24.0", "5.24.0.dev0", "6.0.0"])
def test_an_untested_transformers_version_warns_once_in_a_process(version, monkeypatch):
    # not the test's own `transformers`: importing peft puts another module object of that name into sys.modules
    monkeypatch.setattr(holimerge.api.transformers, "__version__", version)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for model in (make_model(FAMILIES[0]), make_model(FAMILIES[0])):
            patch(model, "holimerge-25")
            patch(model, "keep-all")
    ours = [w for w in seen if "tested with transformers" in str(w.message)]
    assert len(ours) == 1
    assert f"{LOW} to {HIGH}; this is {version}" in str(ours[0].message)


@pytest.mark.usefixtures("a_new_process")
def test_the_warning_points_at_the_caller(monkeypatch):
    monkeypatch.setattr(holimerge.api.transformers, "__version__", "6.0.0")
    with pytest.warns(UserWarning, match="tested with transformers") as seen:
        holimerge.patch_model(make_model("llava_onevision"), "keep-all")
    assert [w.filename for w in seen if "tested with transformers" in str(w.message)] == [__file__]


@pytest.mark.usefixtures("a_new_process")
@pytest.mark.parametrize("version", ["5.16.0", "5.17.3", "5.23.9", "5.23.0.dev0"])
def test_a_tested_transformers_version_does_not_warn(version, monkeypatch):
    monkeypatch.setattr(holimerge.api.transformers, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(make_model("llava_onevision"), "keep-all")


@pytest.mark.usefixtures("a_new_process")
@pytest.mark.parametrize("version", ["4.57.6", "5.15.1"])
def test_an_older_transformers_than_a_family_needs_is_refused_by_name(version, monkeypatch):
    model = make_model("llava_onevision")
    before = dict(vars(model))
    monkeypatch.setattr(holimerge.api.transformers, "__version__", version)
    refusal = pytest.raises(TypeError, match=rf"llava_onevision needs transformers {LOW} or newer; this is {version}")
    with pytest.warns(UserWarning, match=f"{LOW} to {HIGH}; this is {version}"), refusal:
        patch(model, "keep-all")
    assert vars(model).keys() == before.keys()
