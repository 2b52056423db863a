"""The command line: what it runs, writes and refuses."""

import json
import subprocess
import tarfile
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from course_utils import __main__ as cli
from course_utils import classroom, pretrained, runtime

CALL = CliRunner()


def said(*words: object) -> str:
    """What a command prints, without the frame around an error."""
    result = CALL.invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "400"})
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of one notebook that says its profile."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell("import os\nprint(os.environ['COURSE_PROFILE'])")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "99_test.ipynb")
    return tmp_path


def outputs(path: Path) -> str:
    return json.dumps(json.loads(path.read_text())["cells"][0]["outputs"])


def test_help_names_every_command() -> None:
    text = said("--help")
    commands = "ready run slides scoreboard retrain starters release grade gradescope setup-cells address"
    for command in commands.split():
        assert f" {command} " in text


def test_a_notebook_runs_at_the_chosen_profile_into_another_folder(course: Path) -> None:
    source = course / "notebooks" / "99_test.ipynb"
    text = said("run", "99_test", "--profile", "smoke", "--out", course / "o")
    assert "99_test: every cell passed" in text
    assert "smoke" in outputs(course / "o" / "99_test.ipynb") and outputs(source) == "[]"


@pytest.mark.parametrize(("minutes", "exit_code"), [(100, 0), (0, 1)])
def test_a_lesson_over_its_time_fails(
    course: Path, monkeypatch: pytest.MonkeyPatch, minutes: int, exit_code: int
) -> None:
    monkeypatch.setattr(cli, "BUDGETS", {"99_test": {"smoke": minutes}})
    result = CALL.invoke(cli.app, ["run", "99_test", "--profile", "smoke"])
    assert result.exit_code == exit_code and f"of {minutes} minutes" in result.output
    took = json.loads((course / "notebooks" / "99_test.ipynb").read_text())["metadata"]["took"]
    assert took["profile"] == "smoke" and took["seconds"] >= 0 and took["cores"] > 0


def test_a_notebook_that_fails_is_left_as_it_was(course: Path) -> None:
    path = course / "notebooks" / "99_test.ipynb"
    before = path.read_text().replace("COURSE_PROFILE", "NOT_THERE")
    path.write_text(before)
    assert CALL.invoke(cli.app, ["run", "99_test"]).exit_code != 0
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ready", "hw1"), "There is no lesson hw1: choose one of 99_test."),
        (("slides", "1_gmm"), "There is no lesson 1_gmm: choose one of 99_test."),
        (("run", "7_diffusion"), "There is no notebook 7_diffusion: choose one of 00_start_here"),
        (("run", "99_test", "--profile", "huge"), 'There is no profile "huge": choose one of smoke, laptop, gpu.'),
        (("grade", "hw1", "nowhere", "out"), "There is no folder nowhere"),
        (("grade", "hw9", "nowhere", "out"), "There are no checks at"),
        (("gradescope", "hw9", "hw9.zip"), "There are no checks at"),
        (("release", "course.rar"), "course.rar must end in .zip or .tar."),
        (("address", "gitlab.com/me/course"), "is not the address of a repository on GitHub"),
        (("starters",), "holds no solutions"),
    ],
)
def test_what_it_refuses(words: tuple[str, ...], message: str, course: Path) -> None:
    assert message in said(*words)


@pytest.fixture
def computer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which all is well, and on which no frozen model is fetched."""
    monkeypatch.setattr(runtime, "environment_checks", lambda: [(True, "Python", "")])
    monkeypatch.setattr(classroom, "check_jupyter", lambda: (True, "JupyterLab", ""))
    for calls in classroom.LOADERS.values():
        monkeypatch.setattr(pretrained, calls[0], lambda: None)


def add_cell(course: Path, source: str) -> None:
    path = course / "notebooks" / "99_test.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(notebook, path)


def test_ready_rehearses_a_lesson_at_its_smallest_size(course: Path, computer: None) -> None:
    add_cell(course, "assert os.environ['COURSE_PROFILE'] == 'smoke' and 'COURSE_RETRAIN' not in os.environ")
    before = (course / "notebooks" / "99_test.ipynb").read_text()
    result = CALL.invoke(cli.app, ["ready", "99_test"], env={"COURSE_RETRAIN": "1"})
    assert result.exit_code == 0 and "ok  rehearsal of 99_test" in result.output
    assert result.output.rstrip().endswith("Ready.")
    assert (course / "notebooks" / "99_test.ipynb").read_text() == before


def test_ready_says_which_lesson_fails(course: Path, computer: None) -> None:
    add_cell(course, "1 / 0")
    result = CALL.invoke(cli.app, ["ready"])
    assert result.exit_code == 1 and "Not ready: see the lines with an arrow." in result.output
    assert "->  rehearsal of 99_test: ZeroDivisionError: division by zero" in result.output


def test_ready_fetches_what_the_lesson_calls_for_and_goes_on(
    course: Path, computer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network() -> None:
        raise RuntimeError("The frozen model 'minilm' cannot be fetched: connect to the network once.")

    add_cell(course, "pretrained.load_minilm()\nevaluation.kid_lite0(real, made)")
    monkeypatch.setattr(pretrained, "load_minilm", no_network)
    result = CALL.invoke(cli.app, ["ready", "--quick"])
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "ok frozen model efficientnet-lite0" in lines and not [line for line in lines if "smollm2" in line]
    assert "-> frozen model minilm: The frozen model 'minilm' cannot be fetched: connect to the network once." in lines
    assert result.exit_code == 1 and lines[-1] == "Not ready: see the lines with an arrow."


def test_ready_looks_at_the_shipped_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert classroom.check_checkpoints()[0]
    (tmp_path / "gmm").mkdir()
    (tmp_path / "gmm" / "card.json").write_text((pretrained.CHECKPOINTS / "gmm" / "card.json").read_text())
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path)
    good, what, cure = classroom.check_checkpoints()
    assert not good and what == "shipped checkpoints" and "is missing: restore it" in cure


def test_frozen_models_that_lessons_call_for() -> None:
    found = {
        name: classroom.frozen_models(runtime.ROOT / "notebooks" / f"{name}.ipynb")
        for name in ("01_gmm_em", "03_text_vae_and_style", "04_multimodal_representations", "05_visual_tokens")
    }
    assert list(found.values()) == [["efficientnet-lite0"], ["minilm", "smollm2"], ["minilm", "smollm2"], []]


def test_slides_are_written_into_a_lesson(course: Path) -> None:
    path = course / "notebooks" / "99_test.ipynb"
    assert said("slides") == "99_test: slides set"
    assert json.loads(path.read_text())["cells"][0]["metadata"] == {"slideshow": {"slide_type": "slide"}}


def test_a_release_holds_no_solutions(tmp_path: Path) -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=runtime.ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    said("release", tmp_path / "course.tar")
    with tarfile.open(tmp_path / "course.tar") as archive:
        names = archive.getnames()
    assert "course/notebooks/homework/hw1.ipynb" in names and "course/notebooks/homework/checks/hw1.json" in names
    assert not [name for name in names if "solutions" in name or "hidden" in name or "tests/homework" in name]


def test_a_fork_gets_badges_of_its_own(course: Path) -> None:
    old = "https://github.com/someone/else"
    (course / "pyproject.toml").write_text(f'Repository = "{old}"\n')
    badge = "https://colab.research.google.com/github/someone/else/blob/main/notebooks/99_test.ipynb"
    readme = course / "README.md"
    readme.write_text(f"[badge]({badge}), https://mybinder.org/v2/gh/someone/else/main and someone/elsewhere")
    path = course / "notebooks" / "99_test.ipynb"
    path.write_text(path.read_text().replace("import os", f"import os  # {old}"))
    assert "3 files now say github.com/me/my.course" in said("address", "https://github.com/me/my.course.git")
    moved, binder = badge.replace("someone/else", "me/my.course"), "https://mybinder.org/v2/gh/me/my.course/main"
    assert readme.read_text() == f"[badge]({moved}), {binder} and someone/elsewhere"
    assert "github.com/me/my.course" in path.read_text() and json.loads(path.read_text())
