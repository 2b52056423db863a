"""Build the glosses: what WordNet says of the concepts whose name is one of its nouns.

    python data/build/glosses.py

Writes `data/glosses/glosses.csv`, byte for byte the same each time, and prints what was dropped and why.
"""

import re
from collections import Counter
from pathlib import Path

from reviews import OFFENSIVE, substitute, write_csv
from sentences import read_lines

from course_utils.data import concepts

MOST_WORDS = 12
# WordNet's files of nouns, by number
FILES = {"04": "act", "05": "animal", "06": "artifact", "08": "body", "11": "event", "13": "food", "17": "object"}
FILES |= {"18": "person", "19": "phenomenon", "20": "plant"}
# What a drawing of a category shows, the likeliest first: of an animal called "skunk", not a person or a drug.
# Symbols and flags mean more than any noun says ("Taurus").
LIKELY = {
    "animals-nature": ("animal", "plant", "object", "phenomenon", "artifact"),
    "food-drink": ("food", "plant", "artifact"),
    "objects": ("artifact", "object"),
    "people-body": ("body", "person"),
    "smileys-emotion": ("animal", "artifact", "body", "person"),
    "travel-places": ("artifact", "object", "phenomenon"),
    "activities": ("artifact", "act", "event"),
}
# All glosses were read; of these the sense is another than what is drawn.
OTHERS = "alien, bank, black cat, cityscape, construction, crown, fire, ghost, headstone, hook, hut, ice, notebook, "
OTHERS += "peacock, person, pick, purple heart, toilet, wood"
FIXES = [
    (r"\s*\([^()]*\)", ""),  # "a small tree (or shrub)", "(Christianity)"
    (r"`", "'"),
    (r"\s*--\s*", " - "),
    (r"\s+", " "),
    (r"^[\s.,;:-]+|[\s.,;:-]+$", ""),
]
PLAIN = re.compile(r"[A-Za-z0-9 ,'-]+")


def senses() -> dict[str, list[str]]:
    """For each noun in lower case the places of its senses in `data.noun`, the most frequent first."""
    found = {}
    for line in read_lines("index.noun"):
        fields = line.split()
        found[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]
    return found


def meanings() -> dict[str, tuple[str, str]]:
    """For each place in `data.noun` the number of its file and the gloss."""
    found = {}
    for line in read_lines("data.noun"):
        head, gloss = line.split(" | ", 1)
        place, file = head.split()[:2]
        found[place] = (file, gloss)
    return found


def fault(gloss: str) -> str:
    """Why a gloss cannot be used, or "" if it can."""
    words = len(gloss.split())
    faults = {
        "under 2 words": words < 2,
        f"over {MOST_WORDS} words": words > MOST_WORDS,
        "odd characters": not PLAIN.fullmatch(gloss),
        "offensive": OFFENSIVE.search(gloss),
    }
    return next((name for name, found in faults.items() if found), "")


def build(folder: Path) -> None:
    """Write `glosses.csv` into `folder`: name, sense (1 is the most frequent), gloss; in the order of the concepts."""
    rows, dropped, places, meaning = [], Counter(), senses(), meanings()
    for concept in concepts().itertuples():
        here = places.get(concept.name.lower(), [])
        if not here:
            dropped["no noun of WordNet"] += 1
            continue
        if concept.name in OTHERS.split(", "):
            dropped["another sense, by hand"] += 1
            continue
        told = [(i, *meaning[place]) for i, place in enumerate(here, 1)]
        fit = [t for kind in LIKELY.get(concept.category, ()) for t in told if FILES.get(t[1]) == kind]
        if not fit:
            dropped["no such sense"] += 1
            continue
        sense, _, gloss = fit[0]
        gloss = substitute(re.split(r'[;"]', gloss)[0], FIXES)  # examples and further definitions go
        problem = fault(gloss)
        if problem:
            dropped[problem] += 1
            continue
        rows.append({"name": concept.name, "sense": str(sense), "gloss": gloss})
    write_csv(folder / "glosses.csv", rows)
    for problem, count in sorted(dropped.items()):
        print(f"dropped {count:5,}: {problem}")
    print(f"kept    {len(rows):5,}, of which {sum(row['sense'] == '1' for row in rows):,} by their first sense")


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent / "glosses")
