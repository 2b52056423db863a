"""The slides of a lesson are what the rules make of its cells, and nothing but them is written."""

import json
from pathlib import Path

import pytest

from course_utils import runtime
from course_utils.slides import SCREEN, height_of, slide_types, with_slides

LESSONS = sorted((runtime.ROOT / "notebooks").glob("[0-9]*.ipynb"))
PICTURE = json.loads((runtime.ROOT / "notebooks" / "01_gmm_em.ipynb").read_text(encoding="utf-8"))["cells"][5]


def text(*paragraphs: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": ["\n\n".join(paragraphs)]}


def code(source: str, *printed: str) -> dict:
    outputs = [{"output_type": "stream", "text": [line + "\n"]} for line in printed]
    return {"cell_type": "code", "metadata": {}, "source": [source], "outputs": outputs}


def helper(lines: int, first: str = "def f():") -> dict:
    return code("\n".join([first] + ["    x = 1"] * (lines - 1)))


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_a_lesson_has_the_slides_of_the_rules(lesson: Path) -> None:
    stored = lesson.read_text(encoding="utf-8")
    assert with_slides(stored) == stored, f"run: python -m course_utils slides {lesson.stem}"


def test_nothing_but_slides_is_written(lesson: Path) -> None:
    def without(stored: str) -> dict:
        notebook = json.loads(stored)
        notebook["metadata"].pop("@deathbeds/jupyterlab-fonts", None)
        for cell in notebook["cells"]:
            cell["metadata"].pop("slideshow", None)
        return notebook

    bare = json.dumps(without(lesson.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"
    assert without(with_slides(bare)) == json.loads(bare) and with_slides(with_slides(bare)) == with_slides(bare)


def test_a_lesson_can_be_shown(lesson: Path) -> None:
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    types = slide_types(cells)
    slides, sections = [], 0
    for cell, kind in zip(cells, types, strict=True):
        source = "".join(cell["source"])
        sections += source.startswith("## ") or "\n## " in source
        if kind in ("slide", "subslide"):
            slides.append(0)
        if kind != "skip":
            slides[-1] += height_of(cell)
        assert kind != "skip" or cell["cell_type"] == "code", "text is never hidden"
        assert kind == "skip" or "google.colab" not in source
    assert types[0] == "slide" and types.count("slide") == 1 + sections
    assert sum(height <= 1.1 * SCREEN for height in slides) >= 0.85 * len(slides), "too many slides must be scrolled"


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (text("## 2 · A title"), "slide"),
        (text("The end of a section.", "## 2 · A title"), "slide"),
        (text("### A part"), "fragment"),
        (code("x = 1"), "-"),
        (code('import torch\n\nhere = setup("01_gmm_em")', "a banner"), "skip"),
        (code("#| default_exp gmm\n#| export\nimport torch"), "skip"),
        (code('if "google.colab" in sys.modules:\n    pass'), "skip"),
        (code("if here.retrain:\n    evaluation.publish(1)"), "skip"),
        (code("if here.retrain:\n    evaluation.publish(1)\nevaluation.scoreboard()", "a table"), "-"),
        (code("slider = widgets.IntSlider()"), "skip"),
        (helper(12), "-"),
        (helper(13), "skip"),
        (helper(13, "#| export"), "-"),
        (helper(13, "class Net(nn.Module):"), "-"),
        (helper(3, "def check_images(images):"), "skip"),
    ],
)
def test_rules(cell: dict, kind: str) -> None:
    assert slide_types([text("# 01 · A lesson"), code("1", "2"), cell]) == ["slide", "-", kind]


def test_what_does_not_fit_goes_on_below() -> None:
    cells = [text("# 01 · A lesson"), PICTURE, text("What it shows."), code("1"), text("Next."), PICTURE, PICTURE]
    assert slide_types(cells) == ["slide", "-", "subslide", "-", "fragment", "-", "subslide"]


def test_after_the_references_nothing_is_shown() -> None:
    cells = [text("# 01 · A lesson"), text("## Summary", "## References"), code("save_picture()", "saved")]
    assert slide_types(cells) == ["slide", "slide", "skip"]


def test_tags_stay_and_keys_are_in_order() -> None:
    cells = [text("# 01 · A lesson"), code("1", "2"), text("## 1 · A section")]
    cells[2]["metadata"] = {"tags": ["nbval-check-output"], "editable": True}
    found = json.loads(with_slides(json.dumps({"cells": cells, "metadata": {}})))["cells"]
    assert found[1]["metadata"] == {}
    assert list(found[2]["metadata"].items()) == [
        ("editable", True),
        ("slideshow", {"slide_type": "slide"}),
        ("tags", ["nbval-check-output"]),
    ]
