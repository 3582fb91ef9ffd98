"""What the wheel holds, that it works alone, that importing it changes nothing, and what the README promises."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import toys

from holimerge import list_families

ROOT = Path(__file__).parents[1]
PLACES = {"holimerge": "holimerge", "patches": "holimerge/patches", "configs": "holimerge/configs"}
PLACES["eval"] = "holimerge/eval"
JUNK = ("__pycache__", ".pyc", ".egg-info")


def run(*command, cwd=None, **environment):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def python(code, *paths, cwd, **environment):
    """Run code in a fresh interpreter that sees `paths` and the installed packages, and read the JSON it prints."""
    out = run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=os.pathsep.join(map(str, paths)), **environment)
    return json.loads(out.splitlines()[-1])


def tracked():
    """The files git tracks, relative to the root; without git (an unpacked sdist) those that lie there."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = run("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", cwd=ROOT).split("\0")
    else:
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    return sorted(n for n in names if n and (ROOT / n).is_file() and not any(j in n for j in JUNK))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist): the sdist from a copy of the tracked files, the wheel from the sdist, nothing fetched."""
    for needed in ("build", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip(f"setuptools {metadata.version('setuptools')} is older than pyproject.toml's build requirement")
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with the wheel's contents as pip lays them out."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    run(*pip, "--target", target, built[0], cwd=target)
    return target


def test_the_wheel_puts_only_holimerge_into_site_packages(built, installed):
    with zipfile.ZipFile(built[0]) as wheel:
        tops = {name.split("/")[0] for name in wheel.namelist()}
    (info,) = tops - {"holimerge"}
    assert re.fullmatch(r"holimerge-[\w.]+\.dist-info", info)
    # pip --target adds bin/ for the command line
    assert {p.name for p in installed.iterdir()} - {"bin"} == {"holimerge", info}


def test_the_wheel_holds_exactly_the_tracked_files(built):
    expected = {
        f"{place}/{name.partition('/')[2]}"
        for name in tracked()
        for folder, place in PLACES.items()
        if name.startswith(f"{folder}/")
    }
    assert {"holimerge/py.typed", "holimerge/patches/base.py", "holimerge/configs/keep-all.yaml"} <= expected
    with zipfile.ZipFile(built[0]) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("holimerge/")}
        assert held == expected
        for name in held:
            folder, place = next((f, p) for f, p in reversed(PLACES.items()) if name.startswith(f"{p}/"))
            assert wheel.read(name) == (ROOT / folder / name.removeprefix(f"{place}/")).read_bytes(), name


def test_the_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built[1]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {n for n in tracked() if n.split("/")[0] in PLACES} | {"pyproject.toml", "README.md", "LICENSE"}
    assert needed <= held
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in held)


def test_the_metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        info = next(n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n)
        text = wheel.read(f"{info}/METADATA").decode()
        assert "holimerge = holimerge.eval.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
        assert any(name.startswith(f"{info}/") and name.endswith("LICENSE") for name in wheel.namelist())
    version = re.search(r'__version__ = "(.+)"', (ROOT / "holimerge/__init__.py").read_text()).group(1)
    assert f"\nVersion: {version}\n" in text
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", text, re.M))
    assert extras >= {"test", "viz", "eval", "lmms-eval", "flash-attn", "decord"}


USE = """
import importlib, json, pkgutil, sys
import holimerge, holimerge.patches, holimerge.configs, holimerge.eval, holimerge.methods
found = {"where": [holimerge.__file__, holimerge.patches.__file__, holimerge.configs.__file__, holimerge.eval.__file__]}
found["presets"] = holimerge.list_presets()
found["loaded"] = [holimerge.load_config(name).method for name in found["presets"]]
found["methods"], found["families"] = holimerge.list_methods(), holimerge.list_families()
for family in found["families"]:
    importlib.import_module("holimerge.patches." + family).FAMILY
found["bare"] = []
for name in ("patches", "configs", "eval", "tests", "toys"):
    try:
        importlib.import_module(name)
        found["bare"].append(name)
    except ModuleNotFoundError:
        pass
print(json.dumps(found))
"""


def test_the_wheel_works_alone(installed, tmp_path):
    found = python(USE, installed, cwd=tmp_path)
    assert all(Path(where).is_relative_to(installed) for where in found["where"])
    presets = sorted(Path(n).stem for n in tracked() if n.startswith("configs/") and n.endswith(".yaml"))
    assert found["presets"] == presets
    assert len(found["loaded"]) == len(presets) >= 8
    assert found["methods"] == ["holitom", "keep_all"]
    assert found["families"] == list_families()
    assert len(found["families"]) == 16
    assert found["bare"] == []


QUIET = """
import json, logging, os, signal, sys, warnings
for name in HIDDEN:
    sys.modules[name] = None  # cannot be imported
import torch, transformers, pydantic, yaml
import torch.nn.modules.module as m
from transformers import LlavaOnevisionForConditionalGeneration as L, Qwen2_5_VLForConditionalGeneration as Q
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A

def classes():
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] in ("torch", "transformers") and module is not None:
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    found[name, key] = {k: id(v) for k, v in vars(value).items() if not k.startswith("_abc_")}
    return found

def looks():
    return {
        "hooks": [len(v) for k, v in sorted(vars(m).items()) if k.startswith("_global_") and hasattr(v, "__len__")],
        "filters": list(map(str, warnings.filters)),
        "logging": [list(map(str, logging.getLogger(n).handlers)) + [logging.getLogger(n).level]
                    for n in (None, "torch", "transformers")],
        "torch": [torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.get_num_threads(),
                  torch.initial_seed(), torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled()],
        "attention": sorted(A.keys()),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "python": [str(sys.excepthook), str(sys.displayhook), sys.getrecursionlimit(), list(sys.path)],
    }

defined = classes()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    before = looks()
    import holimerge
    after = looks()
now = classes()
print(json.dumps({
    "changed": [k for k in before if before[k] != after[k]],
    "classes": [".".join(k) for k, v in defined.items() if now[k] != v],
    "warned": [str(w.message) for w in seen],
    "compared": len(defined),
    "presets": len(holimerge.list_presets()),
}))
"""


@pytest.mark.parametrize(
    "hidden", [["av", "typer", "rich", "PIL", "accelerate", "matplotlib"], []], ids=["bare", "full"]
)
def test_import_needs_little_and_changes_nothing(hidden, tmp_path):
    """`bare`: without what the command line and the video reader need. Both: nobody else's state is touched."""
    told = python(QUIET.replace("HIDDEN", repr(hidden)), cwd=tmp_path)
    assert told["changed"] == []
    assert told["classes"] == []
    assert told["warned"] == []
    assert told["compared"] > 100
    assert told["presets"] >= 8


def test_a_family_file_is_short_and_repeats_no_other():
    """What families share lives once: no file of 200 lines, no six lines that stand in two files."""
    seen: dict[tuple[str, ...], str] = {}
    for path in sorted((ROOT / "patches").glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 200, path.name
        code = [x.strip() for x in lines if x.strip() and not x.startswith(("from ", "import ", '"""'))]
        for start in range(len(code) - 5):
            window = tuple(code[start : start + 6])
            other = seen.setdefault(window, path.name)
            assert other == path.name, f"{path.name} and {other} both have:\n" + "\n".join(window)
    assert len(seen) > 300


def test_every_family_has_a_toy_that_the_laws_run_on():
    assert sorted(toys.TOYS) == list_families()


def test_the_readme_is_short_and_starts_with_something_to_run():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    blocks = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", "\n".join(lines), re.M | re.S)
    runnable = [text for language, text in blocks if language in ("bash", "sh", "shell", "console", "python", "py")]
    assert runnable, "README.md shows no shell or Python code"
    first = [line for line in runnable[0].splitlines() if line.strip() and not line.strip().startswith("#")]
    assert 1 <= len(first) <= 6, f"the first result takes {len(first)} lines"
