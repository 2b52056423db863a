"""Build a fifth drawing style that nothing is trained on: EmojiTwo's drawings of the course's concepts.

    python data/build/emojitwo.py

Writes `data/emojitwo/drawings.png`, an atlas as those in `data/emoji`, and `concepts.csv`, what its tiles show.
"""

import json
from pathlib import Path

from emoji import atlas, write_csv
from packages import fetch

from course_utils.data import concepts


def build(folder: Path) -> None:
    """Write the atlas and the list of its concepts, those of the course that the style draws, into `folder`."""
    style = json.loads((fetch("@iconify-json/emojione") / "icons.json").read_text())
    rows = [row for row in concepts().to_dict("records") if row["icon"] in style["icons"]]
    atlas(rows, style).save(folder / "drawings.png", optimize=True)
    write_csv(folder / "concepts.csv", [{"name": row["name"]} for row in rows])


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent / "emojitwo")
