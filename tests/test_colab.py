"""The set-up cell of every notebook, in stand-ins for Google Colab.

The everyday tests run it in a Python that takes itself for Colab, with another pip, Drive and repository. COURSE_FULL=1
also installs Colab's versions (about 6 GB, once, in the cache folder) and runs two notebooks with them.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from training_job import SIZE, Points, small_model
from typer.testing import CliRunner

from course_utils import __main__ as cli
from course_utils import colab, runtime
from course_utils.training import fit

NOTEBOOKS = sorted(
    path for path in (runtime.ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
PROJECT = tomllib.loads((runtime.ROOT / "pyproject.toml").read_text())["project"]
COLAB = {
    "pip": "24.1",
    "torch": "2.11",
    "torchvision": "0.26",
    "diffusers": "0.39",
    "transformers": "5.15",
    "accelerate": "1.14",
    "numpy": "2.1",
    "matplotlib": "3.10",
    "ipywidgets": "7.7",
    "pandas": "2.2",
    "scikit-learn": "1.6",
    "ipython": "7.34",
    "ipykernel": "6.17",
}
MISSING = ("gguf", "torchmetrics", "efficientnet-lite-pytorch")  # what the course needs and Colab has not
DRIVE = """
import os, pathlib
def mount(folder):
    if os.environ.get("REFUSED"):
        raise ValueError("mount failed")
    print("Mounted at", folder)
"""
PIP = """
import os, sys
if os.environ.get("OFFLINE"):
    sys.exit("WARNING: no index\\nERROR: No matching distribution found for gguf>=0.10")
print(*sys.argv[1:], sep="\\n", file=open("pip.log", "w"))
"""
RUN = """
import os, sys, google.colab
exec(sys.stdin.read())
import course_utils
print(f"runs={os.environ.get('COURSE_RUNS')} course={course_utils.__path__[0]}")
"""


def first_cells(path: Path) -> tuple[str, str]:
    """The first cell of a notebook, and its first code cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = next(cell for cell in cells if cell["cell_type"] == "code")
    return "".join(cells[0]["source"]), "".join(code["source"])


def fakes(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the module `google.colab` is found."""
    (folder / "google" / "colab").mkdir(parents=True)
    (folder / "google" / "colab" / "__init__.py").touch()
    (folder / "google" / "colab" / "drive.py").write_text(DRIVE)
    return folder


def instead(origin: Path) -> dict[str, str]:
    """Environment in which git takes the repository from the folder `origin` in place of GitHub."""
    address = PROJECT["urls"]["Repository"]
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }


# ------------------------------------------------------------------------------------------ one source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_notebook_has_its_badge_and_the_set_up_cell(path: Path) -> None:
    title, code = first_cells(path)
    assert code == colab.setup_cell(), "run python -m course_utils setup-cells"
    where = path.relative_to(runtime.ROOT).as_posix().replace("/solutions/", "/")
    repository = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    assert f"](https://colab.research.google.com/github/{repository}/blob/main/{where})" in title


def test_cells_are_written_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    shutil.copytree(runtime.ROOT / "notebooks", tmp_path / "notebooks")
    path = tmp_path / "notebooks" / "00_start_here.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("    prepare(", "    prepare_anew("), encoding="utf-8")
    for changed in (1, 0):
        said = CliRunner().invoke(cli.app, ["setup-cells"]).output
        assert f"{len(NOTEBOOKS)} notebooks open with the set-up cell, {changed} of them were changed." in said
    for old in NOTEBOOKS:
        assert (tmp_path / old.relative_to(runtime.ROOT)).read_bytes() == old.read_bytes()


def test_a_notebook_without_a_set_up_cell_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.ipynb"
    path.write_text('{"cells": [{"cell_type": "code", "source": ["x = 1"]}]}')
    with pytest.raises(ValueError, match=r"mine\.ipynb is no set-up cell: copy that of another notebook"):
        colab.write_setup_cell(path)
    assert "x = 1" in path.read_text()


# ------------------------------------------------------------------------------------------ the cell


@pytest.fixture
def vm(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the cell as Colab would: `content` stands for /content, and `origin` for the repository on GitHub."""
    origin, content, modules = tmp_path / "origin", tmp_path / "content", fakes(tmp_path / "modules")
    (origin / "course_utils").mkdir(parents=True)
    for name in ("pyproject.toml", "course_utils/__init__.py", "course_utils/colab.py"):
        shutil.copy(runtime.ROOT / name, origin / name)
    for command in ("init", "add .", "-c user.name=a -c user.email=a@b.c commit -m course"):
        subprocess.run(["git", *command.split()], cwd=origin, check=True, capture_output=True)
    (modules / "pip").mkdir()
    (modules / "pip" / "__init__.py").touch()
    (modules / "pip" / "__main__.py").write_text(PIP)
    content.mkdir()

    def run(keep: bool = False, **environment: str) -> subprocess.CompletedProcess:
        cell = colab.setup_cell().replace("/content", str(content)).replace("DRIVE = False", f"DRIVE = {keep}")
        env = {name: value for name, value in os.environ.items() if not name.startswith("COURSE_")}
        env |= {"PYTHONPATH": str(modules)} | instead(origin) | environment
        command = [sys.executable, "-c", RUN]
        return subprocess.run(command, input=cell, env=env, cwd=content, capture_output=True, text=True)

    return run


def said(done: subprocess.CompletedProcess) -> str:
    """What a failed cell says last."""
    assert done.returncode
    return done.stderr.strip().splitlines()[-1]


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    before = list(sys.path)
    exec(colab.setup_cell(), {})
    assert sys.path == before


def test_it_fetches_the_course_and_lets_pip_exchange_nothing(vm, tmp_path: Path) -> None:
    done = vm()
    assert done.returncode == 0, done.stderr
    assert f"runs=None course={tmp_path / 'content' / 'course' / 'course_utils'}" in done.stdout
    assert [path.name for path in (tmp_path / "content").glob("course*")] == ["course"]
    asked = (tmp_path / "content" / "pip.log").read_text().split("\n")
    assert asked[:2] == ["install", "--quiet"] and set(PROJECT["dependencies"]) <= set(asked)
    for name in ("torch", "numpy", "ipywidgets"):
        assert f"{name}=={metadata.version(name)}" in asked


def test_without_network_it_says_so_and_can_be_run_again(vm, tmp_path: Path) -> None:
    away = (tmp_path / "origin").rename(tmp_path / "away")
    fetching = vm().stderr
    assert "RuntimeError: The course could not be fetched (fatal: " in fetching
    assert fetching.rstrip().endswith("): run this cell again.")
    assert not (tmp_path / "content" / "course").exists()
    (tmp_path / "content" / "course.part" / "course_utils").mkdir(parents=True)  # a clone that was cut off
    away.rename(tmp_path / "origin")
    assert said(vm(OFFLINE="1")) == (
        "RuntimeError: What the course needs could not be installed (No matching distribution found for gguf>=0.10): "
        "check the network and run this cell again."
    )
    (tmp_path / "origin").rename(tmp_path / "away")  # what was fetched is not fetched again
    assert "Ready" in vm().stdout and not (tmp_path / "content" / "course.part").exists()


def test_runs_are_kept_in_drive_when_asked_for(vm, tmp_path: Path) -> None:
    assert said(vm(keep=True, REFUSED="1")) == (
        "RuntimeError: Google Drive is not there (mount failed): "
        "run this cell again and allow it, or set KEEP_IN_DRIVE = False."
    )
    assert "runs=/content/drive/MyDrive/mixtures-to-multimodal/runs " in vm(keep=True).stdout
    assert "runs=None" in vm(COURSE_RUNS="/somewhere/old").stdout


def test_a_training_in_drive_goes_on_in_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(batch)
        if len(seen) == 35:
            raise KeyboardInterrupt
        return (model(batch["x"]) - batch["y"]).square().mean()

    def train_in(machine: str) -> dict:
        monkeypatch.setenv("COURSE_CACHE", str(tmp_path / machine))
        monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "drive" / "runs"))
        here = runtime.Runtime("lesson", "gpu", torch.device("cpu"), False)
        return fit(here, "tiny", small_model(), loss, Points(augment=False), save_seconds=0, **SIZE)[1]

    with pytest.raises(KeyboardInterrupt):
        train_in("first")
    assert train_in("second")["steps"] == SIZE["steps"] and len(seen) == 35 + SIZE["steps"] - 30
    assert not (tmp_path / "second" / "runs").exists()


# ------------------------------------------------------------------------------------------ Colab's versions


def test_the_course_asks_for_nothing_newer_than_colab_has() -> None:
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.13")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(COLAB.get(requirement.name, "999")), f"{requirement} is too new"


def python_313() -> str:
    """Python 3.13, which Colab runs; where it is not installed, this one."""
    found = shutil.which("python3.13")
    works = found and not subprocess.run([found, "-c", ""], capture_output=True).returncode
    return found if works else sys.executable


@pytest.fixture(scope="module")
def colabs_python() -> Path:
    """A Python with Colab's versions of what Colab has, and without what it has not."""
    folder = runtime.cache_dir("colab")
    python = folder / "venv" / "bin" / "python"
    wanted = [f"{name}=={version}.*" for name, version in COLAB.items()]
    ready = folder / "ready"
    if not ready.exists() or ready.read_text() != " ".join(wanted):
        subprocess.run([python_313(), "-m", "venv", "--clear", folder / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        ready.write_text(" ".join(wanted))
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *MISSING], check=True)
    return python


@pytest.mark.skipif(os.environ.get("COURSE_FULL") != "1", reason="COURSE_FULL=1 installs Colab's versions, about 6 GB")
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("name", ["00_start_here", "07_diffusion"])
def test_a_notebook_runs_in_colab(
    name: str, colabs_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, kernels = tmp_path / "content", tmp_path / "jupyter" / "kernels" / "colab"
    content.mkdir()
    kernels.mkdir(parents=True)
    start = "import google.colab, ipykernel.kernelapp; ipykernel.kernelapp.launch_new_instance()"
    command = [str(colabs_python), "-c", start, "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "Colab", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(kernel))
    for key, value in instead(runtime.ROOT).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(fakes(tmp_path / "modules")))
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    text = (runtime.ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text.replace("/content", str(content)), as_version=4)
    before = versions(colabs_python)
    NotebookClient(notebook, kernel_name="colab", timeout=900, resources={"metadata": {"path": content}}).execute()
    after = versions(colabs_python)
    assert before.items() <= after.items() and set(MISSING) <= set(after)  # pip has added, and exchanged nothing
    said = "".join(output.get("text", "") for cell in notebook.cells[1:4] for output in cell.get("outputs", []))
    assert "Ready." in said and "profile smoke" in said


def versions(python: Path) -> dict[str, str]:
    """What is installed for a Python, by name."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    return {one["name"].lower(): one["version"] for one in json.loads(listed.stdout)}
