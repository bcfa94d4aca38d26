"""Every notebook is committed with its outputs and runs from top to bottom.

What it prints of causes is what is committed.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
HEADLINE = re.compile(r"most likely (\w+)|no trouble in \d+ steps")


def printed(notebook):
    """The text of all outputs, whatever their form."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            yield output.get("text") or output.get("data", {}).get("text/plain", "")


def headlines(notebook):
    return [match.group(0) for text in printed(notebook) for match in HEADLINE.finditer(text)]


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_is_committed(path, tmp_path):
    committed = nbformat.read(path, as_version=4)
    assert all(
        cell.get("outputs") is not None and cell.execution_count for cell in committed.cells if cell.cell_type == "code"
    )
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert headlines(fresh) == headlines(committed) != []
