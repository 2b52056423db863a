"""A lesson as a live slide show in a real JupyterLab: the first slide, forward, a cell run live, a widget moved."""

import json
import re
from pathlib import Path

import pytest
from test_browser import CHROMIUM, LOADED, api, check_saved, opened, run_all

from course_utils.slides import slide_types

pytest.importorskip("jupyterlab_slideshow", reason="needs the slide show: pip install -e .[classroom]")

SHOWN, MARKED = re.compile("jp-deck-mod-visible"), re.compile("jp-mod-active")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize(
    ("lesson", "last"), [("01_gmm_em", "stepper("), ("02_vae_elbo", 'print(f"p(x) integrates')], ids=["01", "02"]
)
def test_a_lesson_is_a_live_slide_show(lesson: str, last: str, tmp_path: Path) -> None:
    with opened(lesson, last, tmp_path) as (page, copy):
        cells = json.loads(copy.read_text())["cells"]
        run_all(page)
        start_show(page, cells)
        walk_to_the_last_cell(page, cells)
        if page.locator(".widget-play").count():
            play(page)
        page.keyboard.press("Escape")
        api.expect(page.locator(".jp-Deck"), "Esc leaves the slide show").to_have_count(0)
        check_saved(page, copy)


def start_show(page: "api.Page", cells: list[dict]) -> None:
    """Mark the title, press the button with the cards, and see the title and nothing else."""
    first = page.locator(".jp-Notebook .jp-Cell").first
    first.scroll_into_view_if_needed()
    first.click(position={"x": 300, "y": 20})
    page.locator("[data-command='deck:toggle']").click()
    title = "".join(cells[0]["source"]).splitlines()[0].removeprefix("# ")
    api.expect(first.get_by_role("heading", name=title)).to_be_visible()
    api.expect(page.locator(".jp-deck-mod-visible")).to_have_count(1)


def walk_to_the_last_cell(page: "api.Page", cells: list[dict]) -> None:
    """Space goes through what is shown, in order; the first cell of code is run live on the way."""
    place = page.locator(".jp-Notebook .jp-Cell")
    shown = [number for number, kind in enumerate(slide_types(cells)) if kind != "skip"]
    code = [number for number, cell in enumerate(cells) if cell["cell_type"] == "code"]
    for number in shown[1:]:
        page.keyboard.press("Space")
        api.expect(place.nth(number), f"Space leads to cell {number}").to_have_class(MARKED)
        api.expect(place.nth(number)).to_have_class(SHOWN)
        if number == min(set(code) & set(shown)):
            api.expect(place.nth(code[0]), "set-up is hidden").not_to_be_visible()
            page.keyboard.press("Control+Enter")
            ran = place.nth(number).locator(".jp-InputPrompt").first  # after all that Run All Cells has asked for
            api.expect(ran, "a cell runs live").to_have_text(f"[{len(code) + 1}]:", timeout=300_000)


def play(page: "api.Page") -> None:
    """Press play: the slider moves, and the picture with it."""
    picture = page.locator("img.widget-image")
    page.wait_for_function(LOADED, arg=picture.element_handle())
    before = picture.get_attribute("src")
    button = page.locator(".widget-play button").first
    button.click()
    api.expect(picture, "the picture follows the slider").not_to_have_attribute("src", before, timeout=60_000)
    button.click()  # pause
