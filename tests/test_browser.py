"""A student's first minutes: lesson 01 in a real JupyterLab, its stepper moved by keys and by the play button."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from course_utils import runtime

pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install -e .[lab]")
api = pytest.importorskip("playwright.sync_api", reason="needs Playwright for Python: pip install -e .[test]")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
OPTIONS = [f"--disable-{name}" for name in QUIET] + ["--no-sandbox", "--no-first-run", "--no-proxy-server"]
OPTIONS.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # the browser reaches nothing else
NOTICES = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
LOADED = "img => img.complete && img.naturalWidth > 300"
BYTES = "async img => Array.from(new Uint8Array(await (await fetch(img.src)).arrayBuffer()))"


@contextmanager
def jupyterlab(folder: Path, log: list[str]) -> Iterator[Callable[[str], str]]:
    """JupyterLab on a free port, with `folder`/notebooks as its root and no settings but its own.

    Gives a function from a notebook's name to its address; `log` grows while the server runs.
    """
    token, said_where = secrets.token_hex(16), threading.Event()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0"]
    command += [f"--ServerApp.root_dir={folder / 'notebooks'}", f"--IdentityProvider.token={token}"]
    command += ["--LabApp.extension_manager=readonly"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    settings = folder / "CONFIG" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(NOTICES))
    places = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | places | {"IPYTHONDIR": str(folder / "ipython"), "COURSE_PROFILE": "smoke"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(command, env=environment, **pipes)

    def listen() -> None:
        for line in server.stdout:
            log.append(line.replace(token, "..."))
            if re.search(r"http://127\.0\.0\.1:\d+/lab", line):
                said_where.set()
        said_where.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        said_where.wait(180)
        address = re.search(r"http://127\.0\.0\.1:\d+/lab", "".join(log))
        assert address, f"JupyterLab did not start:\n{''.join(log[-30:])}"
        yield lambda name: f"{address[0]}/tree/{name}?token={token}"
    finally:
        server.terminate()  # it shuts its kernels down
        with suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()


def first_cells(source: Path, target: Path, last: str) -> None:
    """Copy a notebook up to the cell that starts a line with `last`."""
    notebook = json.loads(source.read_text())
    (end,) = [i for i, cell in enumerate(notebook["cells"]) if f"\n{last}" in "".join(cell["source"])]
    target.write_text(json.dumps(notebook | {"cells": notebook["cells"][: end + 1]}))


@contextmanager
def opened(lesson: str, last: str, folder: Path) -> Iterator[tuple["api.Page", Path]]:
    """A page with the first cells of a lesson in JupyterLab, and the file; a failure leaves a screenshot."""
    shutil.copytree(runtime.ROOT / "notebooks", folder / "notebooks")
    copy = folder / "notebooks" / f"{lesson}.ipynb"
    first_cells(runtime.ROOT / "notebooks" / copy.name, copy, last)
    log: list[str] = []
    with (
        jupyterlab(folder, log) as address,
        api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS) as browser,
    ):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        try:
            page.goto(address(copy.name))
            yield page, copy
        except (AssertionError, api.Error) as problem:
            seen, tail = folder / "failed.png", "".join(log[-30:])
            page.screenshot(path=seen)
            raise AssertionError(f"{problem}\nscreenshot: {seen}\nserver:\n{tail}") from problem


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_stepper_of_lesson_01_moves(tmp_path: Path) -> None:
    with opened("01_gmm_em", "stepper(", tmp_path) as (page, copy):
        run_all(page)
        step(page)
        check_saved(page, copy)


def run_all(page: "api.Page") -> None:
    """Choose Run, Run All Cells."""
    page.get_by_text(" | Idle").wait_for()  # in the status bar; cells that are run before are lost
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def step(page: "api.Page") -> None:
    """Move the stepper: a key forwards, a key back, the play button."""
    stepper = page.locator(".jp-OutputArea-output:has(.widget-play)")
    picture, readout = stepper.locator("img.widget-image"), stepper.locator(".widget-readout")
    handle = stepper.locator(".noUi-handle, .ui-slider-handle")  # of ipywidgets 8, of ipywidgets 7
    play = stepper.locator(".widget-play button").first
    picture.scroll_into_view_if_needed()
    page.wait_for_function(LOADED, arg=picture.element_handle())

    def picture_after(move: Callable[[], None], step: str) -> list[int]:
        before = picture.get_attribute("src")
        move()
        api.expect(readout, "the readout shows the step").to_have_text(re.compile(step), timeout=60_000)
        api.expect(picture, "the picture follows the slider").not_to_have_attribute("src", before, timeout=60_000)
        page.wait_for_function(LOADED, arg=picture.element_handle())
        return picture.evaluate(BYTES)

    start = picture.evaluate(BYTES)
    assert picture_after(lambda: handle.press("ArrowRight"), "^1$") != start, "step 1 looks like step 0"
    assert picture_after(lambda: handle.press("ArrowLeft"), "^0$") == start, "step 0 is not what it was"
    assert picture_after(play.click, "^[1-9]") != start, "play moves the slider and not the picture"
    play.click()  # pause
    page.get_by_text(" | Idle").wait_for()


def check_saved(page: "api.Page", notebook: Path) -> None:
    """No cell failed, neither on the page nor in the file that JupyterLab saves; no widget is missing."""
    for text in ("Error displaying widget", "Loading widget"):
        api.expect(page.get_by_text(text)).to_have_count(0)
    with page.expect_response(lambda answer: answer.request.method == "PUT" and notebook.name in answer.url):
        page.keyboard.press("Control+s")
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "a cell did not run"
    errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, f"a cell failed: {errors}"
