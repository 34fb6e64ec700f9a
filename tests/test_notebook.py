"""The notebook runs from its first cell to its last."""

import shutil

from tests.extras import needs
from tests.running import ROOT, environment


@needs("nbclient", "ipykernel")
def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    for name in ("densenet_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "main.py", tmp_path)
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(ROOT / "examples" / "digits.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "examples")}}
    )
    client.execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 5
