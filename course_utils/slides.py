"""Which cells of a lesson stand on which slide of its live slide show: metadata, made by rules from the cells.

A `##` heading opens a slide, and what no longer fits on the screen goes on below it, on a subslide. Set-up, what
publishes a checkpoint and long helpers are not shown. Text below a result is a fragment: it comes on the next key, so
that the class says first what it sees.
"""

import base64
import json
import math
import re

SCREEN = 700  # of the 720 pixels of a common projector; heights are those of JupyterLab's own fonts
LITTLE = 160  # a slide with no more than this takes the next cell as well, even if it must be scrolled
LONG = 12  # lines of a helper that is shown
# In a slide show the prompts are gone, but not the bar over them, which would take the clicks on the left of a widget.
NO_BAR = {"body[data-jp-deck-mode='presenting'] & .jp-OutputArea-promptOverlay": {"display": "none"}}
STYLE = {"@deathbeds/jupyterlab-fonts": {"styles": {"": NO_BAR}}}


def source_of(cell: dict) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def height_of_block(block: str) -> int:
    """Pixels that a paragraph, list, table, formula, heading or picture in markdown takes."""
    if block.startswith("#"):
        return 50
    if block.startswith("!["):
        return 360
    if block.startswith("$$"):
        return 75
    if block.startswith("|"):
        return 20 + 27 * (block.count("\n") + 1)
    read = re.sub(r"\\[a-zA-Z]+|\]\(\S+\)|[{}$*`]", "", block)  # less what is markup
    return 14 + 23 * sum(math.ceil(len(line) / 150) for line in re.split(r"\n(?=[-*] |\d+\. )", read))


def height_of_output(output: dict) -> int:
    """Pixels that an output takes; a picture's own height stands in its file."""
    found = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in found:
        return 400
    if "image/png" in found:
        return int.from_bytes(base64.b64decode(found["image/png"][:32])[20:24], "big")
    if "text/html" in found:
        return 20 + 24 * "".join(found["text/html"]).count("<tr")
    return 17 * len("".join(output.get("text", found.get("text/plain", ""))).splitlines())


def height_of(cell: dict) -> int:
    """Pixels that a cell takes."""
    source = source_of(cell)
    if cell["cell_type"] == "markdown":
        return sum(height_of_block(block) for block in re.split(r"\n\s*\n", source.strip()))
    return 10 + 18 * len(source.splitlines()) + sum(8 + height_of_output(output) for output in cell["outputs"])


def is_hidden(cell: dict) -> bool:
    """Set-up, a check of arguments, the inside of a widget, what publishes a checkpoint, and a long helper."""
    source = source_of(cell)
    if cell["cell_type"] != "code":
        return False
    if re.search(r'google\.colab|= setup\("|#\| default_exp', source):
        return True
    if cell["outputs"]:
        return False
    first = re.search(r"^(?:def|class) (\w+)", source, flags=re.MULTILINE)
    if re.search(r"here\.retrain:|\bpublish\(|widgets\.", source) or (first and first[1].startswith("check")):
        return True
    is_lesson = re.search(r"^#\| export|^class \w+\(nn\.Module\)", source, flags=re.MULTILINE)
    return not is_lesson and len(source.splitlines()) > LONG


def slide_types(cells: list[dict]) -> list[str]:
    """The slide type of each cell: slide, subslide, fragment, "-" (below the cell before it) or skip."""
    types, used, below, over = [], 0, "", False
    for index, cell in enumerate(cells):
        if over or is_hidden(cell):
            types.append("skip")
            continue
        is_text, height = cell["cell_type"] == "markdown", height_of(cell)
        shown_next = next((other for other in cells[index + 1 :] if not is_hidden(other)), cell)
        needed = height + (height_of(shown_next) if is_text and shown_next["cell_type"] == "code" else 0)
        if not types or (is_text and re.search("^## ", source_of(cell), flags=re.MULTILINE)):
            types.append("slide")
        elif used > LITTLE and used + needed > SCREEN:  # text stands with the code that it speaks of
            types.append("subslide")
        else:
            types.append("fragment" if is_text and below == "code" else "-")
        used = height if types[-1] in ("slide", "subslide") else used + height
        below, over = cell["cell_type"], "## References" in source_of(cell)
    return types


def with_slides(text: str) -> str:
    """The text of a notebook's file with the slide types of its cells and their style; all else stays as it is."""
    notebook = json.loads(text)
    notebook["metadata"] = dict(sorted((notebook["metadata"] | STYLE).items()))
    for cell, slide_type in zip(notebook["cells"], slide_types(notebook["cells"]), strict=True):
        cell["metadata"].pop("slideshow", None)
        if slide_type != "-":  # which is said by saying nothing: not every slide show knows it
            cell["metadata"] = dict(sorted((cell["metadata"] | {"slideshow": {"slide_type": slide_type}}).items()))
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
