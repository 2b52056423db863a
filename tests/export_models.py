"""Write `course_utils/models/` from the cells of the lessons that say `#| export`.

python tests/export_models.py course_utils/models
"""

import sys
from pathlib import Path

from nbdev.export import nb_export

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def lessons() -> list[Path]:
    """The notebooks that export a module."""
    return [path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if "#| default_exp" in path.read_text()]


def export(folder: Path) -> None:
    """Write one module a lesson into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in lessons():
        nb_export(path, lib_path=folder)


if __name__ == "__main__":
    export(Path(sys.argv[1]).resolve())
