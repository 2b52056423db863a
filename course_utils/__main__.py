"""The course's command line: get ready for class, run a notebook, retrain what is shipped, make and grade homework.

python -m course_utils --help
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from course_utils import classroom
from course_utils.colab import write_setup_cell
from course_utils.gradescope import archive
from course_utils.grading import HIDDEN, Limits, grade_folder
from course_utils.runtime import HOMEWORK_MINUTES, MINUTES, PROFILES, ROOT, chosen_profile, retraining, say_ready
from course_utils.slides import with_slides

app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True, add_completion=False)
HOSTS = r"(github\.com|githubusercontent\.com|colab\.research\.google\.com/github|mybinder\.org/v2/gh)"
BUDGETS = MINUTES | HOMEWORK_MINUTES
Homework = Annotated[str, typer.Argument(help="hw1 to hw4")]
Lessons = Annotated[list[str] | None, typer.Argument(help="such as 01_gmm_em; without any, all")]


def notebook_path(name: str) -> Path:
    """A lesson, or of a homework the solution, else the starter. Raises typer.BadParameter where there is none."""
    for folder in ("", "homework/solutions", "homework"):
        path = ROOT / "notebooks" / folder / f"{name}.ipynb"
        if path.exists():
            return path
    raise typer.BadParameter(f"There is no notebook {name}: choose one of {', '.join(BUDGETS)}.")


def lesson_paths(names: list[str] | None) -> list[Path]:
    """The lessons of these names, or all. Raises typer.BadParameter for a name that is none."""
    paths = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
    for name in names or ():
        if name not in paths:
            raise typer.BadParameter(f"There is no lesson {name}: choose one of {', '.join(paths)}.")
    return [paths[name] for name in names or paths]


def execute(source: Path, to: Path) -> float:
    """Run a notebook from top to bottom in a fresh kernel, and return the seconds that it took.

    `to` is written only if every cell passed. Its metadata keep seconds, profile and cores, unless it retrains.
    """
    import nbformat
    from nbclient import NotebookClient

    start = time.perf_counter()
    notebook = nbformat.read(source, as_version=4)
    NotebookClient(
        notebook,
        timeout=9000,
        kernel_name="python3",
        resources={"metadata": {"path": source.parent}},
        coalesce_streams=True,
        store_widget_state=False,
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    seconds = time.perf_counter() - start
    if not retraining():
        notebook.metadata["took"] = {"seconds": round(seconds), "profile": chosen_profile(), "cores": os.cpu_count()}
    nbformat.write(notebook, to)
    if source.parent == ROOT / "notebooks":
        set_slides(to)  # what fits on a slide depends on the outputs
    return seconds


def set_slides(path: Path) -> None:
    """Write a lesson's slide types into its file."""
    path.write_text(with_slides(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


@app.command()
def ready(
    names: Lessons = None,
    quick: Annotated[bool, typer.Option("--quick", help="without the rehearsal, about a minute a lesson")] = False,
) -> None:
    """Before class: check this computer, fetch what the lessons need, and rehearse them at their smallest size."""
    lessons = lesson_paths(names)
    os.environ["COURSE_PROFILE"] = "smoke"
    os.environ.pop("COURSE_RETRAIN", None)  # a rehearsal publishes nothing
    if not say_ready(classroom.checks(lessons, None if quick else execute)):
        raise typer.Exit(1)


@app.command()
def slides(names: Lessons = None) -> None:
    """Set which cells of a lesson stand on which slide, by the rules of course_utils/slides.py."""
    for path in lesson_paths(names):
        set_slides(path)
        typer.echo(f"{path.stem}: slides set")


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(help="such as 01_gmm_em, or hw1 for its solution, or all of both")],
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "",
    out: Annotated[
        Path | None, typer.Option(help="folder for the results; without it they replace the notebook's")
    ] = None,
) -> None:
    """Run notebooks from top to bottom, keep outputs and minutes; one that takes longer than it may is a failure."""
    if profile not in ("", *PROFILES):
        raise typer.BadParameter(f'There is no profile "{profile}": choose one of {", ".join(PROFILES)}.')
    if profile:
        os.environ["COURSE_PROFILE"] = profile
    paths = [notebook_path(name) for name in (BUDGETS if names == ["all"] else names)]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    late = []
    for path in paths:
        minutes = execute(path, path if out is None else out / path.name) / 60
        budget = BUDGETS.get(path.stem, {}).get(chosen_profile(), float("inf"))
        typer.echo(f"{path.stem}: every cell passed, in {minutes:.1f} of {budget:g} minutes")
        if minutes > budget and not retraining():
            late.append(path.stem)
    if late:
        typer.echo(f"Over their time (MINUTES in course_utils/runtime.py): {', '.join(late)}.", err=True)
        raise typer.Exit(1)


@app.command()
def retrain(names: Annotated[list[str], typer.Argument(help="lessons, such as 05_visual_tokens, or all")]) -> None:
    """Train a lesson's checkpoints anew, rewrite their cards and the scoreboard, and run the lesson."""
    os.environ["COURSE_RETRAIN"] = "1"
    run(list(MINUTES) if names == ["all"] else names)
    scoreboard()


@app.command()
def scoreboard() -> None:
    """Write the scoreboard, as the cards of the checkpoints have it, into the README."""
    from course_utils.evaluation import with_scoreboard  # which takes a while to load

    readme = ROOT / "README.md"
    readme.write_text(with_scoreboard(readme.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    typer.echo("README.md shows the scoreboard of the cards.")


@app.command()
def starters(names: Annotated[list[str] | None, typer.Argument(help="hw1 to hw4; without any, all")] = None) -> None:
    """Make the homework's starters, public and hidden checks from the solved notebooks."""
    script = ROOT / "tests" / "homework" / "homework_source.py"
    if not script.exists():
        raise typer.BadParameter("This copy of the course holds no solutions: starters are made where they are.")
    raise typer.Exit(subprocess.run([sys.executable, script, *(names or HOMEWORK_MINUTES)]).returncode)


@app.command()
def release(to: Annotated[Path, typer.Argument(help="course.zip")]) -> None:
    """Write what students get: the last commit without solutions and hidden checks."""
    if to.suffix not in (".zip", ".tar"):
        raise typer.BadParameter(f"{to} must end in .zip or .tar.")
    command = ["git", "archive", f"--output={to.absolute()}", "--prefix=course/", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise typer.BadParameter(f"git could not write {to}: {done.stderr.strip()}")
    typer.echo(f"{to}: {to.stat().st_size / 1e6:.0f} MB")


@app.command()
def grade(
    homework: Homework,
    folder: Annotated[Path, typer.Argument(help="the submitted notebooks, one a student, or a folder a student")],
    out: Annotated[Path, typer.Argument(help="where scores.csv, summary.md and feedback/ go")],
    seconds: Annotated[float, typer.Option(help="for each question")] = Limits.seconds,
    megabytes: Annotated[int, typer.Option(help="for each question")] = Limits.megabytes,
    workers: Annotated[int, typer.Option(help="submissions at a time")] = 2,
) -> None:
    """Grade a folder of submitted notebooks; started again, it goes on where it stopped."""
    try:
        results = grade_folder(folder, out, HIDDEN / f"{homework}_hidden", Limits(seconds, megabytes), workers=workers)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"{len(results)} submissions graded: read {out / 'summary.md'}")


@app.command()
def gradescope(homework: Homework, to: Annotated[Path, typer.Argument(help="hw1_autograder.zip")]) -> None:
    """Write the archive that Gradescope takes as the autograder of a homework."""
    try:
        archive(homework, to)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def setup_cells() -> None:
    """Write the set-up cell of course_utils/colab.py into every notebook."""
    paths = [path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    try:
        changed = [path.stem for path in paths if write_setup_cell(path)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"{len(paths)} notebooks open with the set-up cell, {len(changed)} of them were changed.")


@app.command()
def address(new: Annotated[str, typer.Argument(help="https://github.com/you/course")]) -> None:
    """Move every badge, set-up cell and link of the course to your fork."""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", new)
    if not match:
        raise typer.BadParameter(f"{new} is not the address of a repository on GitHub: https://github.com/you/course.")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    old = re.search(r'Repository = "https://github\.com/([^"]+)"', project)[1]
    paths = [ROOT / "pyproject.toml", ROOT / "README.md", *(ROOT / "notebooks").rglob("*.ipynb")]
    changed = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        moved = re.sub(rf"{HOSTS}/{re.escape(old)}\b", rf"\1/{match[1]}", text)
        if moved != text:
            path.write_text(moved, encoding="utf-8")
            changed += 1
    typer.echo(f"{changed} files now say github.com/{match[1]}: review with `git diff`, then commit.")


if __name__ == "__main__":
    app()
