"""Will the lessons run in class? What `python -m course_utils ready` looks at."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from course_utils import pretrained, runtime
from course_utils.runtime import Check

LOADERS = {  # frozen model: what loads it in `pretrained`, and what else a lesson calls that needs it
    "efficientnet-lite0": ("load_lite0", "kid_lite0"),
    "minilm": ("load_minilm",),
    "smollm2": ("load_llm", "load_text_judge"),
}


def frozen_models(lesson: Path) -> list[str]:
    """The frozen models that a lesson's code calls for."""
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return [name for name, calls in LOADERS.items() if any(f"{call}(" in source for call in calls)]


def check_jupyter() -> Check:
    """JupyterLab and its slide show."""
    missing = [name for name in ("jupyterlab", "jupyterlab_slideshow", "nbclient") if find_spec(name) is None]
    cure = f"{', '.join(missing)} not installed; run pip install -e .[lab,classroom]"
    return not missing, "JupyterLab with its slide show", cure


def check_checkpoints() -> Check:
    """Every shipped checkpoint is the one of its card."""
    names = sorted(card.parent.name for card in pretrained.CHECKPOINTS.glob("*/card.json"))
    try:
        for name in names:
            pretrained.load_checkpoint(name, folder=pretrained.CHECKPOINTS)
    except RuntimeError as error:
        return False, "shipped checkpoints", str(error)
    return True, f"{len(names)} shipped checkpoints", ""


def check_model(name: str) -> Check:
    """A frozen model loads; it is fetched and converted where it is not in the cache."""
    try:
        getattr(pretrained, LOADERS[name][0])()
    except RuntimeError as error:
        return False, f"frozen model {name}", str(error)
    return True, f"frozen model {name}", ""


def check_rehearsal(lesson: Path, execute: Callable[[Path, Path], None]) -> Check:
    """Every cell of a lesson runs, into a folder that is thrown away; the caches that it fills stay."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            execute(lesson, Path(folder) / lesson.name)
        except Exception as error:  # whatever stops a lesson: a cell, its kernel, a missing package
            said = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or type(error).__name__  # without colours
            return False, f"rehearsal of {lesson.stem}", f"{said.splitlines()[-1]} (run the lesson to see where)"
    return True, f"rehearsal of {lesson.stem}", ""


def checks(lessons: list[Path], execute: Callable[[Path, Path], None] | None) -> Iterator[Check]:
    """What a class needs, one check after another; with `execute`, which runs a notebook, each lesson is rehearsed."""
    yield from runtime.environment_checks()
    yield check_jupyter()
    yield check_checkpoints()
    wanted = {name for lesson in lessons for name in frozen_models(lesson)}
    for name in sorted(wanted):
        yield check_model(name)
    for lesson in lessons if execute else ():
        yield check_rehearsal(lesson, execute)
