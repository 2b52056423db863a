"""Each stored notebook is executed, free of errors, small, readable, and checks something."""

import json
import re
import statistics
from pathlib import Path

import pytest
from export_models import export, lessons

from course_utils import runtime
from course_utils.__main__ import BUDGETS

NOTEBOOKS = sorted((runtime.ROOT / "notebooks").glob("[0-9]*.ipynb"))
SOLVED = sorted((runtime.ROOT / "notebooks" / "homework" / "solutions").glob("hw*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text())


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(runtime.MINUTES)


def test_executed_from_top_to_bottom_without_error(notebook: dict) -> None:
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "restart the kernel, run all cells and save"
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLVED], ids=lambda path: path.stem)
def test_stored_outputs_took_no_longer_than_a_laptop_may(path: Path) -> None:
    took = json.loads(path.read_text())["metadata"]["took"]
    assert took["profile"] == "laptop" and took["seconds"] <= 60 * BUDGETS[path.stem]["laptop"]


def test_the_checked_outputs_compare_something(notebook: dict) -> None:
    checked = [cell for cell in code_cells(notebook) if "nbval-check-output" in cell["metadata"].get("tags", [])]
    assert checked, "tag a cell with a sure output nbval-check-output"
    for cell in checked:
        text = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert text.strip(), f"this cell is compared, and has no text output: {source(cell)[:80]}"


def test_asserts_and_pictures(notebook: dict) -> None:
    cells = code_cells(notebook)
    assert sum("assert " in source(cell) for cell in cells) >= 5
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) >= 5
    silent = [
        source(cell)[:60]
        for cell in cells
        if not cell["outputs"] and not any(word in source(cell) for word in ("assert", "def ", "class ", "import "))
    ]
    assert len(silent) <= 6, f"cells with nothing to see: {silent}"


def test_cells_fit_a_screen(notebook: dict) -> None:
    lengths = [len(source(cell).splitlines()) for cell in code_cells(notebook)]
    assert statistics.median(lengths) <= 10 and max(lengths) <= 40


def test_the_file_is_small_and_shows_on_github(notebook: dict) -> None:
    assert len(json.dumps(notebook)) < 3e6
    assert "widgets" not in notebook["metadata"], "metadata.widgets breaks the page on GitHub"


def test_pictures_that_the_text_shows_are_there(notebook: dict) -> None:
    for cell in notebook["cells"]:
        for piece in source(cell).split("](pictures/")[1:]:
            assert (runtime.ROOT / "notebooks" / "pictures" / piece.split(")")[0]).exists()


def test_models_are_what_the_lessons_export(tmp_path: Path) -> None:
    export(tmp_path)
    assert lessons()
    for path in lessons():
        name = re.search(r"#\| default_exp (\w+)", path.read_text())[1]
        ours = (runtime.ROOT / "course_utils" / "models" / f"{name}.py").read_text()
        assert code(ours) == code((tmp_path / f"{name}.py").read_text()), (
            f"{name}.py is not {path.name}: run make models"
        )


def code(text: str) -> list[str]:
    """The lines of a module without nbdev's comments, which hold paths."""
    return [line for line in text.splitlines() if not line.startswith("#")]
