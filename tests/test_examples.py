"""The notebooks of examples/: they run from the first cell to the last, and what is committed is clean."""

import os
import re
import sys
from pathlib import Path

import pytest

for package in ("ipykernel", "matplotlib", "nbclient", "PIL", "safetensors", "sklearn", "torchmetrics"):
    pytest.importorskip(package)
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("VAEOPS_DATA", "data")).resolve()
sys.path.insert(0, str(ROOT / "examples"))
import faces  # noqa: E402
import run  # noqa: E402

NOTEBOOKS = pytest.mark.parametrize("path", run.notebooks(), ids=lambda path: path.stem)
MOST_BYTES = 600_000
# What takes the place of the cell of settings; all of its names.
SMALL = {
    "1-autoencoder-and-vae": {"data": "digits", "steps": 20, "batch": 32, "hidden": 32, "beta": 0.3,
                              "wide": 4, "betas": (10.0,), "side": 5},
    "2-faces": {"data": "drawn", "n": 120, "side": 16, "width": 8, "dims": 8, "steps": 4, "batch": 8,
                "beta": 2.0, "gamma": 0.1, "vgg": None},
    "3-vq-vae": {"data": "digits", "steps": 20, "batch": 32, "hidden": 32, "dim": 8},
    "4-code-prior": {"data": "drawn", "n": 120, "side": 16, "codes": 16, "hidden": 16, "steps": 4,
                     "width": 16, "prior_steps": 60, "batch": 8},
    "5-diffusion": {"data": "digits", "diffusion_steps": 12, "width": 8, "steps": 20, "batch": 16},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    """Of the notebooks' processes: this checkout, no data sets, nobody's IPython settings; one thread, since
    in models so small two wait for each other.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("VAEOPS_DATA", raising=False)


def kinds(notebook) -> dict[str, list[str]]:
    """What each cell shows."""
    return {c.id: [o.output_type for o in c.outputs] for c in notebook.cells if c.cell_type == "code"}


def test_there_are_five():
    assert [path.stem for path in run.notebooks()] == list(SMALL)


@NOTEBOOKS
def test_it_runs(path):
    done = run.execute(path, SMALL[path.stem], timeout=300)
    assert kinds(done) == kinds(nbformat.read(path, as_version=4))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "mnist").exists() or not (DATA / "celeba_64.tar").exists(),
                    reason=f"no mnist/ and celeba_64.tar in {DATA}: set VAEOPS_DATA")  # fmt: skip
@NOTEBOOKS
def test_it_runs_on_real_data(path, tmp_path, monkeypatch):
    (tmp_path / "mnist").symlink_to(DATA / "mnist")
    (tmp_path / "celeba.tar").symlink_to(DATA / "celeba_64.tar")
    monkeypatch.setenv("VAEOPS_DATA", str(tmp_path))
    small = SMALL[path.stem]
    run.execute(path, small | {"data": {"digits": "mnist", "drawn": "celeba"}[small["data"]]}, timeout=1800)


@NOTEBOOKS
def test_what_is_committed_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    assert notebook.metadata == run.METADATA
    assert run.settings(notebook) == list(SMALL[path.stem])
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert any("image/png" in o.get("data", {}) for c in code for o in c.outputs)
    for cell in code:
        assert set(cell.metadata) <= {"tags"}
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.id
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    # Nobody's folders (which name their owners), no addresses.
    assert not re.search(r"(?<![\w.:/)}])/(home|root|Users|tmp|usr|work|opt|var|mnt)\b", text)
    assert not re.search(r"\b[A-Z]:\\\\|[\w.]+@[\w.]+\.\w+", text)


def test_drawn_faces_show_their_attributes():
    few = faces.load("drawn", "train", side=32, n=300)
    again = faces.load("drawn", "train", side=32, n=300)
    other = faces.load("drawn", "test", side=32, n=300)
    assert few.x.shape == (300, 3, 32, 32) and (few.x == again.x).all() and (few.x != other.x).any()
    for name, rows in (("Smiling", slice(20, 26)), ("Eyeglasses", slice(12, 18)), ("Young", slice(2, 8))):
        has = few.attribute(name)
        pixels = few.x[:, :, rows].astype(float)
        gap = pixels[has].mean(0) - pixels[~has].mean(0)
        chance = pixels.std(0) / 300**0.5
        assert 0.2 < has.mean() < 0.8 and (abs(gap) > 5 * chance).any(), name
    with pytest.raises(ValueError, match="'celeba' or 'drawn', got 'drwan'"):
        faces.load("drwan", "train", side=32, n=3)
