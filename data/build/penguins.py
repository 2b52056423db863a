"""Build the penguins: four body measures of 342 penguins of three species.

    python data/build/penguins.py

Writes `data/penguins/penguins.csv`, byte for byte the same each time.
"""

import csv
from pathlib import Path

from packages import fetch
from reviews import write_csv

COLUMNS = ("species", "bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g")


def build(folder: Path) -> None:
    """Write `penguins.csv` into `folder`: COLUMNS of the rows with no missing value, in source order."""
    source = fetch("palmerpenguins") / "palmerpenguins" / "data" / "penguins.csv"
    with open(source, newline="", encoding="utf-8") as file:
        table = [{name: row[name] for name in COLUMNS} for row in csv.DictReader(file)]
    rows = [row for row in table if "NA" not in row.values()]
    write_csv(folder / "penguins.csv", rows)
    print(f"dropped {len(table) - len(rows)} with a missing value, kept {len(rows)}")


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent / "penguins")
