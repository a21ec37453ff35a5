"""Run the notebooks and keep what they print and draw: python examples/run.py [NOTEBOOK ...]

VAEOPS_DATA is taken out of their environment, so that what is kept was made of the embedded and the drawn
images alone: CelebA's faces must not be published.
"""

import argparse
import ast
import base64
import io
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    return sorted(HERE.glob("*.ipynb"))


def parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell that holds the settings: the one tagged "parameters"."""
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def settings(notebook: nbformat.NotebookNode) -> list[str]:
    """The names that the parameters cell sets."""
    lines = ast.parse(parameters(notebook).source).body
    return [line.targets[0].id for line in lines if isinstance(line, ast.Assign)]


def execute(path: Path, values: dict[str, Any] | None = None, *,
            timeout: float = 3600) -> nbformat.NotebookNode:  # fmt: skip
    """The notebook with the outputs of a run in its folder, its settings replaced by `values` if given.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message holds it and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    if values is not None:
        parameters(notebook).source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=timeout, record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(path.parent)}}).execute()  # fmt: skip
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave out which Python ran it, and all but 256 colours of each picture: a third of the bytes."""
    notebook.metadata = nbformat.from_dict(METADATA)
    shown = [o.data for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    for data in shown:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB").quantize(256)
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", type=Path, default=notebooks(), help="default: all of them")
    os.environ.pop("VAEOPS_DATA", None)
    for path in parser.parse_args().notebook:
        print(path.name, flush=True)
        notebook = execute(path.resolve())
        tidy(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
