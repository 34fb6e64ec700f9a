"""The notebooks run from their first cell to their last."""

import shutil

import pytest

from tests.extras import needs
from tests.running import ROOT, environment


@needs("nbclient", "ipykernel")
@pytest.mark.parametrize(("name", "count"), [("digits", 5), ("many_labels", 1)])
def test_notebook_runs(name, count, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    for folder in ("densenet_jax", "configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "main.py", tmp_path)
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "examples")}}
    )
    client.execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == count
