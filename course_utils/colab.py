"""Google Colab: the cell that every notebook opens with, and what that cell calls.

It runs before anything is installed, so nothing is imported here that Python itself does not bring.
"""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("torch", "torchvision", "numpy", "ipywidgets")  # Colab's own builds: exchanged, they break its GPU or its page
SETUP_CELL = """\
import os
import subprocess
import sys

KEEP_IN_DRIVE = False  # @param {type:"boolean"}
# True: long trainings are saved in your Google Drive, and go on from there after a disconnect

if "google.colab" in sys.modules:  # elsewhere this cell does nothing
    if not os.path.exists("/content/course"):
        address = "REPOSITORY"
        clone = f"rm -rf course.part && git clone -q --depth=1 {address} course.part && mv course.part course"
        git = subprocess.run(clone, shell=True, cwd="/content", capture_output=True, text=True)
        if git.returncode:
            raise RuntimeError(f"The course could not be fetched ({git.stderr.strip()}): run this cell again.")
    sys.path.insert(0, "/content/course")
    from course_utils.colab import prepare

    prepare(KEEP_IN_DRIVE)  # installs what is missing"""


def setup_cell() -> str:
    """The source of the cell, with the address of the repository that stands in pyproject.toml."""
    return SETUP_CELL.replace("REPOSITORY", project()["urls"]["Repository"])


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def write_setup_cell(path: Path) -> bool:
    """Make the cell the first code cell of a notebook in place of an older one, and say whether that changed it.

    Raises ValueError where the first code cell is no set-up cell.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = next((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), {"source": []})
    if "google.colab" not in "".join(first["source"]):
        raise ValueError(f"The first code cell of {path} is no set-up cell: copy that of another notebook before it.")
    cell = setup_cell()
    changed = "".join(first["source"]) != cell
    if changed:
        first["source"] = cell.splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return changed


def prepare(keep_in_drive: bool = False) -> None:
    """Install what is missing; with `keep_in_drive`, save long trainings in the user's Drive and resume them there.

    Raises RuntimeError where pip fails or Drive is refused; then it can be called again.
    """
    install_missing()
    os.environ.pop("COURSE_RUNS", None)
    if keep_in_drive:
        os.environ["COURSE_RUNS"] = f"{mounted_drive()}/MyDrive/mixtures-to-multimodal/runs"
        print("Ready. Long trainings are saved in your Drive, in mixtures-to-multimodal/runs, and go on from there.")
    else:
        print("Ready. Long trainings go on after a disconnect if this cell runs with KEEP_IN_DRIVE = True.")


def install_missing() -> None:
    """Let pip install the requirements of pyproject.toml that are not there, and exchange nothing of KEPT."""
    kept = []
    for name in KEPT:
        with suppress(metadata.PackageNotFoundError):
            kept.append(f"{name}=={metadata.version(name)}")
    print("Installing what the course needs and is not here ...", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", *project()["dependencies"], *kept]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        reason = [line for line in pip.stderr.splitlines() if line.startswith("ERROR: ")] or ["pip failed"]
        raise RuntimeError(
            f"What the course needs could not be installed ({reason[-1].removeprefix('ERROR: ')}): "
            "check the network and run this cell again."
        )
    importlib.invalidate_caches()  # what is new is found by this running Python


def mounted_drive() -> str:
    """The folder under which Colab shows the user's Drive, after asking for leave."""
    from google.colab import drive

    try:
        drive.mount("/content/drive")
    except Exception as error:  # its kinds differ by what went wrong
        raise RuntimeError(
            f"Google Drive is not there ({error}): run this cell again and allow it, or set KEEP_IN_DRIVE = False."
        ) from None
    return "/content/drive"
