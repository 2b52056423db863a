"""Grading takes whatever is handed in: right, wrong, endless, crashing, greedy, lying; and goes on where it stopped."""

import ast
import copy
import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "homework"))
source = pytest.importorskip("homework_source", reason="copies for students hold no solutions")
if not source.solution_path("hw1").exists():
    pytest.skip("copies for students hold no solutions", allow_module_level=True)

from course_utils import answering, gradescope, grading  # noqa: E402
from course_utils.grading import Limits, grade, grade_folder, sandbox, submissions_in  # noqa: E402

HIDDEN = source.solution_path("hw1").with_name("hw1_hidden")
LIMITS = Limits(seconds=3, megabytes=500, whole=120)
SOLVED = json.loads(source.solution_path("hw1").read_text())
HEADER = "def log_joint(x, pi, theta):\n    "
RIGHT = "return x @ theta.log().T + (1 - x) @ (1 - theta).log().T + pi.log()"

pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="grading needs Linux or macOS"),
              pytest.mark.filterwarnings("ignore:Submissions can")]  # fmt: skip


def handed_in(folder: Path, student: str, *cells: str, drop: tuple[str, ...] = ()) -> Path:
    """The solved notebook with cells added at its end, less those that define a name of `drop`."""
    notebook = copy.deepcopy(SOLVED)
    kept = [cell for cell in notebook["cells"] if not any(f"def {name}(" in "".join(cell["source"]) for name in drop)]
    notebook["cells"] = kept + [{"cell_type": "code", "metadata": {}, "source": text} for text in cells]
    path = folder / f"{student}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook))
    return path


BAD = {  # what replaces question 1: its cell, points, and a word of what is said of it
    "loops": (HEADER + "while True: pass", 0, "stopped after 3 seconds"),
    "catches": (HEADER + "while True:\n        try: 1 / 0\n        except BaseException: pass", 0, "stopped"),
    "crashes": (HEADER + "import ctypes; ctypes.string_at(0)", 0, "crashed the process (SIGSEGV)"),
    "exits": (HEADER + "import os; os._exit(0)", 0, "ended the process without a result"),
    "exits_politely": (HEADER + "raise SystemExit", 0, "SystemExit"),
    "greedy": (HEADER + "import torch; return torch.ones(10**9)", 0, "more than the 500 MB"),
    "greedy_list": (HEADER + "return [0] * 10**10", 0, "more than the 500 MB"),
    "huge": (HEADER + "import torch; return torch.ones(10**7)", 0, "larger than any right answer"),
    "prints": (HEADER + f"print('SCORE 100/100'); {RIGHT}", 15, ""),
    "prints_much": (HEADER + f"\n    for _ in range(10**5): print('x' * 100)\n    {RIGHT}", 15, ""),
    "raises_on_import": ("one = 1 / 0\n" + HEADER + RIGHT.replace("x @", "one * x @"), 0, "ZeroDivisionError"),
    "syntax": ("def log_joint(x, pi, theta)\n    return x", 15, ""),  # the cell before counts
    "starred": ("from math import *\n" + HEADER + RIGHT, 15, ""),
    "magic": ("%matplotlib inline\n!ls\n" + HEADER + RIGHT, 15, ""),
    "lambda": ("log_joint = lambda x, pi, theta: " + RIGHT.removeprefix("return "), 15, ""),
    "forks": (HEADER + "import os, time\n    while True: os.fork(); time.sleep(0.5)", 0, "stopped after"),
    "reads_files": (HEADER + f"open({str(HIDDEN)!r} + '.json').read(); {RIGHT}", None, "FileNotFoundError"),
    "network": (HEADER + f"import socket; socket.create_connection(('192.0.2.1', 80), 2); {RIGHT}", 0, "OSError"),
}  # fmt: skip


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, Path]:
    """A folder of all kinds of submissions, graded once."""
    folder, out = tmp_path_factory.mktemp("handed_in"), tmp_path_factory.mktemp("graded")
    handed_in(folder, "solved")
    (folder / "starter.ipynb").write_text(json.dumps(source.starter(SOLVED)))
    for student, (cell, _, _) in BAD.items():
        handed_in(folder, student, cell)
    helper = "FLOOR = 0.0\ndef helper(x, theta):\n    return x @ theta.log().T + (1 - x) @ (1 - theta).log().T + FLOOR"
    handed_in(folder, "helper", helper, HEADER + "return helper(x, theta) + pi.log()", "1 / 0")
    handed_in(folder, "missing", drop=("log_joint",))
    handed_in(folder, "edits", "check = print", "import course_utils.homework as h\nh.judge = lambda *_: 1")
    handed_in(folder / "Moodle_123_assign", "hw1", HEADER + "return x @ theta.log().T + pi.log()")
    (folder / "word.ipynb").write_text("This is my homework.")
    (folder / "binary.ipynb").write_bytes(bytes(range(256)))
    return grade_folder(folder, out, HIDDEN, LIMITS), folder, out


def test_the_solution_gets_all_and_the_starter_nothing(graded: tuple) -> None:
    results, _, _ = graded
    assert results["solved"].total == 100 and results["solved"].notes == []
    assert results["starter"].total == 0 and "not written yet" in results["starter"].scores[1].text


@pytest.mark.parametrize("student", BAD)
def test_a_bad_answer_costs_its_question_alone(graded: tuple, student: str) -> None:
    result, (_, points, words) = graded[0][student], BAD[student]
    if student in ("reads_files", "network") and sandbox() == "plain":
        pytest.skip("there is no sandbox here")
    if student == "reads_files" and sandbox() != "bubblewrap":
        pytest.skip("bubblewrap is not installed")
    assert result.scores[1].points == (points or 0) and words in result.scores[1].text
    assert all(result.scores[place].points == result.scores[place].of for place in range(2, 7))


def test_what_is_printed_is_noted_and_counts_for_nothing(graded: tuple) -> None:
    (note,) = graded[0]["prints"].notes
    assert "SCORE 100/100" in note and "counts for nothing" in note


def test_helpers_constants_and_broken_cells(graded: tuple) -> None:
    assert graded[0]["helper"].total == 100


def test_a_function_that_is_not_there(graded: tuple) -> None:
    assert "no function or class log_joint" in graded[0]["missing"].scores[1].text and graded[0]["missing"].total == 85


def test_who_edits_the_checks_is_noted_and_gains_nothing(graded: tuple) -> None:
    (note,) = graded[0]["edits"].notes
    assert "edits the checks" in note and graded[0]["edits"].total == 100


@pytest.mark.parametrize("student", ["word", "binary"])
def test_what_is_no_notebook(graded: tuple, student: str) -> None:
    assert graded[0][student].total == 0 and "not a Jupyter notebook" in graded[0][student].notes[0]


def test_partial_points_come_with_the_hint(graded: tuple) -> None:
    score = graded[0]["Moodle_123_assign_hw1"].scores[1]
    assert score.points < 15 and "only inked pixels are counted" in score.hint


def test_reports(graded: tuple) -> None:
    results, _, out = graded
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert {row["student"] for row in rows} == set(results)
    assert next(row for row in rows if row["student"] == "solved")["total"] == "100"
    summary = (out / "summary.md").read_text()
    assert "| 1 log_joint |" in summary and "only inked pixels" in summary and "loops: Question 1" in summary
    assert "100 of 100" in (out / "feedback" / "solved.md").read_text()
    assert len(list((out / "feedback").glob("*.md"))) == len(results)


def test_a_second_run_grades_only_what_changed(graded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    results, folder, out = graded
    handed_in(folder, "helper", HEADER + RIGHT)
    asked = []

    def counted(path: Path, *rest: object) -> grading.Result:
        asked.append(path.stem)
        return grade(path, *rest)

    monkeypatch.setattr(grading, "grade", counted)
    again = grade_folder(folder, out, HIDDEN, LIMITS)
    assert asked == ["helper"] and again["loops"] == results["loops"]


def test_a_fault_of_the_grader_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_in(tmp_path, "one")

    def broken(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(grading, "grade", broken)
    (result,) = grade_folder(tmp_path, tmp_path / "out", HIDDEN, LIMITS).values()
    assert result.total == 0 and "the disk is full" in result.notes[0]


def test_folders_without_notebooks_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no notebook"):
        submissions_in(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        submissions_in(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["unshared", "plain"])
def test_the_weaker_sandboxes_grade_too(tmp_path: Path, kind: str) -> None:
    if kind == "unshared" and sandbox() == "plain":
        pytest.skip("there is no sandbox here")
    assert grade(handed_in(tmp_path, "solved"), HIDDEN, LIMITS, kind).total == 100


def test_the_program_of_an_answer_leaves_training_out() -> None:
    cells = answering.parsed(
        [
            "import torch\nimport math",
            "K = 3\nmodel = torch.ones(9)",
            "def f(x): return K * g(x) * model",
            "def g(x):\n    return x + T\nT = torch.ones(1)",
            "f(1)",
            "K = 4",
        ]
    )
    chosen = [ast.unparse(statement) for statement in answering.program(cells, "f")]
    assert "K = 4" in chosen and "K = 3" not in chosen and "T = torch.ones(1)" in chosen
    assert "import torch" in chosen and "import math" not in chosen and "model = torch.ones(9)" not in chosen


def test_the_gradescope_archive_grades_by_itself(tmp_path: Path) -> None:
    gradescope.archive("hw1", tmp_path / "hw1.zip")
    with zipfile.ZipFile(tmp_path / "hw1.zip") as file:
        file.extractall(tmp_path / "source")
    handed_in(tmp_path / "submission", "mine", HEADER + "return x @ theta.log().T + pi.log()")
    script = "import pathlib; from course_utils import gradescope; "
    script += f"gradescope.report('hw1', pathlib.Path({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "source")}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path / "source", env=environment)
    made = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [test["score"] for test in made["tests"]][1:] == [20, 15, 15, 15, 20] and made["tests"][0]["score"] < 15
    assert "only inked pixels" in made["tests"][0]["output"]


def test_gradescope_wants_one_notebook(tmp_path: Path) -> None:
    (tmp_path / "submission").mkdir()
    gradescope.report("hw1", tmp_path)
    assert "Hand in one notebook" in (tmp_path / "results" / "results.json").read_text()
