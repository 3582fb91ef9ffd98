"""Every notebook runs on the embedded model, and what is stored in it can be read as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

import nbformat

from holimerge.eval.notebooks import FIRST, MOST_BYTES, executed, problems
from holimerge.tokens import Target, VideoTokens

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]


def shape(notebook):
    """What every run has in common: cells, and the kinds of their outputs."""
    return [
        [(output.output_type, output.get("name"), sorted(output.get("data", {}))) for output in cell.get("outputs", [])]
        for cell in notebook.cells
    ]


def test_there_are_three():
    assert IDS == ["1_quickstart", "2_budgets_and_speed", "3_write_a_method"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    before = path.read_bytes()
    notebook, seconds = executed(path, tmp_path)
    print(f"{path.name}: {seconds:.0f} s")
    assert problems(notebook) == []
    assert path.read_bytes() == before
    # the stored outputs are of this notebook, not of an older one
    assert shape(notebook) == shape(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_what_is_stored_can_be_read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert path.stat().st_size < MOST_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it as a whole: make notebooks"
    pictures = sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert pictures >= 2
    assert FIRST in code[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_numbers_say_what_they_are(path):
    notebook = nbformat.read(path, as_version=4)
    words = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    words = re.sub(r"[\s>*]+", " ", words)
    for said in ("videos are synthetic", "model is tiny", "nothing about the accuracy or the speed of real models"):
        assert said in words


def test_a_cell_that_fails_is_told(tmp_path):
    from nbclient.exceptions import CellExecutionError

    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell("CHECKPOINT = 1\nMODEL = CHECKPOINT\n1 / 0")]
    nbformat.write(book, tmp_path / "bad.ipynb")
    with pytest.raises(CellExecutionError, match="division by zero"):
        executed(tmp_path / "bad.ipynb", tmp_path)
    book.cells[0].source = "print(1)"
    nbformat.write(book, tmp_path / "bad.ipynb")
    with pytest.raises(ValueError, match="MODEL = CHECKPOINT"):
        executed(tmp_path / "bad.ipynb", tmp_path)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (nbformat.v4.new_output("error", ename="KeyError", evalue="x", traceback=[]), "KeyError: x"),
        (nbformat.v4.new_output("stream", name="stderr", text="Loading: 3 %"), "on stderr"),
        (nbformat.v4.new_output("stream", name="stdout", text="<object at 0x7f3a2b1c>"), "0x7f3a2b1c"),
        (nbformat.v4.new_output("execute_result", data={"text/plain": "'/tmp/abc/clip.mp4'"}), "/tmp/abc"),  # noqa: S108
    ],
)
def test_what_must_not_be_stored_is_found(output, told):
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell("x", outputs=[output])]
    (found,) = problems(book)
    assert told in found


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("keep", [1, 7, 24])
def test_the_method_of_the_third_does_what_it_says(per_frame, keep):
    cells = nbformat.read(NOTEBOOKS[2], as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.source.startswith("%%writefile attention_topk.py\n")]
    module: dict[str, Any] = {"__name__": "attention_topk"}
    exec(source.split("\n", 1)[1], module)  # noqa: S102
    method = module["METHOD"]
    scores = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(keep)).float()  # with ties
    record = method.reduce(
        VideoTokens(torch.zeros(4, 6, 2), scores), Target(keep, keep / 24), method.options(per_frame=per_frame)
    )
    cells = [(t, n) for t in range(4) for n in range(6)]
    rank = {(t, n): sorted(range(6), key=lambda m: (-scores[t, m], m)).index(n) for t, n in cells}
    best = sorted(cells, key=lambda c: (rank[c] if per_frame else -scores[c], c))[:keep]
    anchor = sorted(t * 6 + n for t, n in best)
    assert record.anchor.tolist() == anchor
    assert record.assignment.tolist() == [anchor.index(i) if i in anchor else -1 for i in range(24)]
    x = torch.rand(24, 3)
    assert torch.equal(record.merge(x), x[anchor])
