"""Build the reviews: sentences about films and products with the mean of 15 to 29 human sentiment ratings.

    python data/build/reviews.py

Writes `data/reviews/reviews.csv` and, from the same package, `data/reviews/lexicon.csv`: words with their mean human
rating, and `data/reviews/faces.csv`: the drawn faces that such words describe. All are byte for byte the same
each time. Prints what was dropped and why.
"""

import codecs
import csv
import hashlib
import html
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from packages import fetch

from course_utils.data import concepts

SOURCES = {"film": "movieReviewSnippets_GroundTruth.txt", "product": "amazonReviewSnippets_GroundTruth.txt"}
MAX_WORDS = 60
FACE = re.compile(r"face-(?!costume)|cat-face")
LECTURE = "face with rolling eyes"  # no word of its description is rated, but of its keywords "ugh" is

# Slurs, obscenities and sexual violence, in rot13: nobody needs to read them here.
_WORDS = codecs.decode(
    "ovgpu ovgpurf ohyyfuvg pbba pevccyrf phag snt snttbg shpx shpxrq shpxvat tlccrq znfgheongrq"
    " zbyrfgngvba zbyrfgrq zbyrfgre zbatbybvq arteb artebrf artebvq crqbcuvyr chffl encr encrq"
    " encrf encvfg ergneq ergneqrq fuvg fuvgyrff fyhg fcvp gvgf juber juberq",
    "rot13",
)
OFFENSIVE = re.compile(rf"\b(?:{_WORDS.replace(' ', '|')})\b", re.IGNORECASE)

PREFIXES = (
    "anti|co|ex|hyper|inter|multi|neo|non|post|pre|pseudo|quasi|self|semi|sub|ultra"
    "|hip(?= hop)|sci(?= fi)|slo(?= mo)|K(?= 19)|Spider(?= Man)"
)
FILM_FIXES = [
    (r'(?<=\d)"', "-inch"),
    (r"''", '"'),
    (r"[`’]", "'"),
    (r"(?<=[a-z])\?(?=(?:s|t|re|ve|ll|d)\b)", "'"),  # an apostrophe that an encoding lost
    (r"\s*–\s*|\s{3,}", " - "),  # hyphens were blanked out: three spaces or more were a dash
    (rf"\b({PREFIXES}) (?!and |or |to |have |suggests )(?=\w)", r"\1-"),
    (r" (?=(?:ish|esque|ized)\b)", "-"),
    (r"(?<!\w)\((\w)\)(?=\w)", r"\1"),  # (T)he
    (r"^([\s.']*)\(([^().!?]+)\)\s*(?=\w)", r"\1\2 "),  # (It) has
    (r"\)(?=\w)", ") "),
    (r"(?<=[a-z]{2}[.!?,])(?=[A-Z][a-z])|(?<=\w\w:)(?=[A-Z])", " "),
]
PRODUCT_FIXES = [
    (r"\bat ?& ?t\b", "at&t"),
    (r"\bdvd ([+-]) (?=rw?\b)", r"dvd\1"),
    (r"''", '"'),
    (r'\b(\d\d|\d\.\d|\dx\d+) "', r"\1-inch"),
    (r'\s*"\s*([^"]*?)\s*"\s*', r' "\1" '),
    (r" ' (?=\d\d\b)", " '"),
    (r" ' ([^']+) ' ", r" '\1' "),
    (r" ' ", "' "),
    (r"\$ (?=[\dx$])", "$"),
    (r"\b(\d+) \$(?![\d$])", r"$\1"),
    (r"# (?=\d)", "#"),
    (r"\* ([\w ]+?) \*", r"*\1*"),
    (r"\s*-{2,}\s*", " - "),
    (r"(?<![\w.&/-])i(?![\w./-])", "I"),
    (r"^\s*(?:\d{1,2}[.)]|[a-f]\))\s*(?=[a-z])", ""),
]
COMMON_FIXES = [
    (r"\s*\.{2,}\s*", "... "),
    (r"\s+", " "),
    (r"^[\s.,:;)*>+-]+|[\s(-]+$", ""),
    (r' (?=[.,;:!?)](?:\W|$))|(?<=\.\.\.) (?=[)!?,;]|["\'](?:\W|$))|(?<=\() |(?<=") (?=\'s\b)', ""),
]
NO_QUOTE = r"(?:[^']|(?<=\w)'(?=\w))*"


def key(text: str) -> str:
    """The text without case and punctuation: two texts with one key are the same sentence."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def split_of(group: str) -> str:
    """Part of the fixed split for rows that belong together: 80% train, 10% validation, 10% test."""
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def substitute(text: str, fixes: list[tuple[str, str]]) -> str:
    for pattern, replacement in fixes:
        text = re.sub(pattern, replacement, text)
    return text


def unquote(text: str) -> str:
    """Without a lone double quote, and without quotes around the whole."""
    if text.count('"') % 2:
        text = text.replace('"', "")
    for whole in (r'"([^"]*)"', rf"'({NO_QUOTE})'", rf"'({NO_QUOTE})"):
        if match := re.fullmatch(whole, text):
            text = match[1]
    return text


def tidy(text: str, source: str) -> str:
    """Natural text: entities, quotes, dashes and spaces repaired, the first letter a capital."""
    text = html.unescape(html.unescape(text))
    text = substitute(text, FILM_FIXES if source == "film" else PRODUCT_FIXES)
    text = unquote(substitute(text, COMMON_FIXES))
    text = substitute(text, COMMON_FIXES)
    return re.sub(r"^\W*[a-z]", lambda start: start[0].upper(), text)


def fault(raw: str, text: str, source: str) -> str:
    """Why a text cannot be used, or "" if it can."""
    balanced = text.count("(") == text.count(")") and text.count("[") == text.count("]")
    faults = {
        "no words": not re.search(r"[A-Za-z]{2}", text),
        "punctuation lost": source == "film" and re.search(r"\S  \S", raw),
        "list": re.search(r"(?<!\$)\s(?:\d{1,2}|[a-f])\)\s|[:;-]\s+\d\.\s|\s{2}(?:[-*]|\d\.)\s", raw),
        f"over {MAX_WORDS} words": len(text.split()) > MAX_WORDS,
        "cut in two": not balanced or re.search(r"\b(?:i\.e|e\.g|prev|univ|mo)\.\W*$|\bi\. ", text),
        "address": re.search(r"https?:|www\.|\w@\w|@ \w+\.", text),
        "offensive": OFFENSIVE.search(text),
    }
    return next((name for name, found in faults.items() if found), "")


def snippets() -> Iterator[tuple[str, str, str, str]]:
    """(source, id, mean rating, raw text) of each of the 14,313 snippets in the package."""
    path = fetch("vaderSentiment") / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(path) as archive:
        for source, name in SOURCES.items():
            lines = archive.extractfile(f"hutto_ICWSM_2014/{name}").read().decode("utf-8").split("\r\n")
            yield from ((source, *line.split("\t")) for line in lines if line)


def rated_words() -> list[dict[str, str]]:
    """VADER's lexicon without emoticons, digits and what is offensive; of a word given twice, the last counts."""
    path = fetch("vaderSentiment") / "vaderSentiment" / "vader_lexicon.txt"
    ratings = dict(line.split("\t")[:2] for line in path.read_text("utf-8").splitlines())
    plain = {word: rating for word, rating in ratings.items() if re.fullmatch(r"[a-z]{2,}(?:['-][a-z]+)*", word)}
    return [{"word": word, "rating": rating} for word, rating in plain.items() if not OFFENSIVE.search(word)]


def rated_faces(lexicon: list[dict[str, str]]) -> list[dict[str, str]]:
    """Our faces with the sum of the lexicon's ratings in VADER's description of the emoji, where that is beyond +-1.

    "hand" is rated like a helping hand, but where a face covers its mouth it is only a hand. Of each sign every fourth
    face is for the test, every eighth for validation. The lecture's own face is rated by its keywords, and to learn
    from.
    """
    source = fetch("vaderSentiment") / "vaderSentiment" / "emoji_utf8_lexicon.txt"
    lines = [line.split("\t")[:2] for line in source.read_text("utf-8").splitlines()]
    described = {emoji.removesuffix("\ufe0f"): description for emoji, description in lines}
    ratings = {row["word"]: float(row["rating"]) for row in lexicon if row["word"] != "hand"}
    rows, counts = [], Counter()
    for concept in concepts().itertuples():
        description = described.get(concept.emoji.removesuffix("\ufe0f"), "")
        words = re.findall(r"[a-z'-]+", (concept.keywords if concept.name == LECTURE else description).lower())
        valence = sum(ratings.get(word, 0) for word in words)
        if FACE.match(concept.subcategory) and abs(valence) > 1:
            split = "train"
            if concept.name != LECTURE:
                split = {1: "test", 5: "test", 3: "validation"}.get(counts[valence > 0] % 8, "train")
                counts[valence > 0] += 1
            rows.append({"name": concept.name, "valence": f"{valence:.1f}", "split": split})
    return rows


def build(folder: Path) -> None:
    """Write `reviews.csv`, `lexicon.csv` and `faces.csv` into `folder`; ratings are in [-4, 4], a face's is a sum."""
    rows, seen, dropped = [], set(), Counter()
    for source, identifier, rating, raw in snippets():
        text = tidy(raw, source)
        problem = fault(raw, text, source) or ("duplicate" if key(text) in seen else "")
        if problem:
            dropped[source, problem] += 1
            continue
        seen.add(key(text))
        group = key(text) if source == "film" else f"product review {identifier.split('_')[0]}"
        mean = round(float(rating), 4) + 0.0
        rows.append({"text": text, "rating": str(mean), "source": source, "split": split_of(group)})
    write_csv(folder / "reviews.csv", rows)
    lexicon = rated_words()
    write_csv(folder / "lexicon.csv", lexicon)
    write_csv(folder / "faces.csv", rated_faces(lexicon))
    for (source, problem), count in sorted(dropped.items()):
        print(f"dropped {count:5,} {source}: {problem}")
    for (source, split), count in sorted(Counter((row["source"], row["split"]) for row in rows).items()):
        print(f"kept    {count:5,} {source}: {split}")


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent / "reviews")
