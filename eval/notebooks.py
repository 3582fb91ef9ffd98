"""Run the notebooks of a checkout and save them with their outputs: `make notebooks`.

`python -m holimerge.eval.notebooks [--model FOLDER] [NOTEBOOK ...]`; another model's outputs are for looking at, not
for committing. Needs nbclient and ipykernel (`pip install holimerge[test]`).
"""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIRST = "MODEL = CHECKPOINT"  # stands in a notebook's first code cell
MOST_BYTES = 300_000  # of a saved notebook, outputs included
SECONDS = 300  # a cell that takes longer has hung
# no progress bars in what is stored, nor advice on how to get nicer ones
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}


def executed(path: Path, folder: Path, *, model: Path | None = None) -> tuple[Any, float]:
    """Run a notebook in a kernel of its own.

    Args:
        path: the notebook; it is not changed.
        folder: the kernel's working folder.
        model: replaces the embedded checkpoint.

    Returns:
        the notebook with its outputs, tidied (`tidied`), and the seconds it took, kernel start included.

    Raises:
        ValueError: the notebook does not say where its model comes from.
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    said = first.source
    if FIRST not in said:
        raise ValueError(f"{path}: the first code cell needs the line {FIRST!r}")
    if model is not None:
        first.source = said.replace(FIRST, f"MODEL = type(CHECKPOINT)({str(model.resolve())!r})")
    begin = time.perf_counter()
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS, coalesce_streams=True, resources=where)
    client.execute(env={**os.environ, **QUIET})
    seconds = time.perf_counter() - begin
    first.source = said
    return tidied(notebook), seconds


def tidied(notebook: Any) -> Any:
    """Without what differs from run to run and says nothing: clocks, memory addresses, the kernel's version."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                output["metadata"] = {}
                if "image/png" in output.data:  # without the text that stands for it
                    output.data = {"image/png": smaller(output.data["image/png"])}
    return notebook


def smaller(png: str) -> str:
    """A picture in 256 colours, a quarter of the bytes; base64 in and out."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    saved = io.BytesIO()
    picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(saved, "png", optimize=True)
    return base64.b64encode(saved.getvalue()).decode("ascii")


def problems(notebook: Any) -> list[str]:
    """What a notebook to be read must not hold: errors, warnings, progress bars, addresses, paths of this machine."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(f"cell {number}: {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"cell {number}: on stderr: {output.text[:200]}")
            data: Mapping[str, str] = output.get("data", {})
            text = output.get("text", "") + data.get("text/plain", "")
            if match := re.search(r"0x[0-9a-f]{6,}|/(tmp|home|root|Users)/\S*", text):
                found.append(f"cell {number}: shows {match[0]}, which another run has not")
    return found


def main() -> None:
    """Run the notebooks of the checkout this runs from, and save them."""
    import argparse
    import tempfile

    import nbformat

    from .conditions import source_tree

    parser = argparse.ArgumentParser(description="Run notebooks and save them with their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of the checkout, if none is named")
    parser.add_argument("--model", type=Path, help="a folder instead of the embedded checkpoint")
    parser.add_argument("--output", type=Path, help="save there and leave the originals")
    given = parser.parse_args()
    root = source_tree()
    paths = given.notebooks or ([] if root is None else sorted((root / "notebooks").glob("*.ipynb")))
    if not paths:
        raise SystemExit("there is no checkout to take the notebooks of: name them")
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            notebook, seconds = executed(path, Path(folder), model=given.model)
        if found := problems(notebook):
            raise SystemExit(f"{path}:\n" + "\n".join(found))
        target = path if given.output is None else given.output / path.name
        nbformat.write(notebook, target)
        print(f"{target}: {seconds:.0f} s, {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
