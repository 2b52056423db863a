"""Execute lessons and keep their outputs, with progress bars reduced to their last line.

python tests/run_lessons.py 00_start_here 01_gmm_em
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def run(name: str) -> None:
    """Run one lesson from top to bottom in a fresh kernel; the file is written only if every cell passed."""
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=9000,
        kernel_name="python3",
        resources={"metadata": {"path": NOTEBOOKS}},
        coalesce_streams=True,
        store_widget_state=False,
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for lesson in sys.argv[1:]:
        run(lesson)
