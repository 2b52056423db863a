"""An autograder for Gradescope, made from the same checks as `grading.py`:

python -m course_utils gradescope hw1 hw1_autograder.zip

There it runs `report`, which grades the one submitted notebook and writes what Gradescope reads.
"""

import json
import sys
import zipfile
from pathlib import Path

from course_utils.grading import HIDDEN, Limits, Result, grade
from course_utils.homework import load_checks

PACKAGE = Path(__file__).parent
MODULES = ("__init__", "homework", "probes", "answering", "grading", "gradescope")
SETUP = """#!/bin/sh
set -e
apt-get update && apt-get install -y bubblewrap python3-pip
python3 -m pip install --break-system-packages torch safetensors numpy tqdm
"""
RUN = """#!/bin/sh
cd /autograder/source && python3 -m course_utils.gradescope {homework}
"""


def archive(homework: str, path: Path) -> None:
    """Write the zip to upload as the autograder of a homework."""
    load_checks(HIDDEN / f"{homework}_hidden")  # says so where it is missing
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("setup.sh", SETUP)
        file.writestr("run_autograder", RUN.format(homework=homework))
        for module in MODULES:
            file.write(PACKAGE / f"{module}.py", f"course_utils/{module}.py")
        for end in ("json", "safetensors"):
            name = f"{homework}_hidden.{end}"
            file.write(HIDDEN / name, f"notebooks/homework/solutions/{name}")


def results(result: Result) -> dict:
    """A result in Gradescope's form: a test a question, and the notes for instructors in the output of the whole."""
    tests = [
        {"name": f"Question {place}", "score": score.points, "max_score": score.of, "output": score.text}
        for place, score in result.scores.items()
    ]
    return {"tests": tests, "output": "\n".join(result.notes)}


def report(homework: str, folder: Path = Path("/autograder")) -> None:
    """Grade the notebook in `folder`/submission and write `folder`/results/results.json."""
    found = sorted((folder / "submission").rglob("*.ipynb"))
    made = {"score": 0, "output": f"Hand in one notebook: {len(found)} files end in .ipynb."}
    if len(found) == 1:
        made = results(grade(found[0], HIDDEN / f"{homework}_hidden", Limits()))
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "results.json").write_text(json.dumps(made), encoding="utf-8")


if __name__ == "__main__":
    report(sys.argv[1])
