"""The notebook runs from top to bottom."""

import os
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs/notebook.py"
# Words that make its commands tiny
TINY = {
    "--count 500": "--count 20 --size 32",
    "experiment=smoke": "model.width=4 model.image_size=32 total_images=8 batch_size=4 grid_every=0 save_every=0",
    "n=200": "n=8 sets=1",
}


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    notebook = jupytext.read(SCRIPT)
    for cell in notebook.cells:
        for long, short in TINY.items():
            cell.source = cell.source.replace(long, short)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert shown.count("image/png") == 1 and shown.count("image/gif") == 1
    assert (tmp_path / "runs/first/fd_random.json").is_file()
