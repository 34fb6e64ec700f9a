"""The notebooks run from their first cell to their last."""

import pytest

from tests.extras import needs
from tests.main_processes import make_environment
from tests.small_checkout import copy_checkout


@needs("nbclient", "ipykernel")
@pytest.mark.parametrize(("name", "count"), [("digits", 5), ("many_labels", 1)])
def test_notebook_runs(name, count, tmp_path, monkeypatch, user):
    import nbclient
    import nbformat

    for variable, value in make_environment(**user).items():
        monkeypatch.setenv(variable, value)
    examples = copy_checkout(tmp_path / "checkout") / "examples"
    notebook = nbformat.read(examples / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(examples)}}
    )
    client.execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == count
