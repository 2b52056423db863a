"""The course's data sets as tensors: sizes, split, captions, augmentation, errors that say what to do."""

import csv
import io
import shutil
import zlib
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from course_utils import data
from course_utils.data import STYLES, Texts, all_drawings, augment, concepts, drawings, emoji

SIZES = {"train": 5452, "fit": 5252, "validation": 200, "pairs": 400, "concepts": 400}
CATEGORIES = {
    "smileys-emotion": 167,
    "people-body": 319,
    "animals-nature": 156,
    "food-drink": 130,
    "travel-places": 218,
    "activities": 84,
    "objects": 262,
    "symbols": 219,
    "flags": 8,
}
CACHED = (data.concepts, data.categories, data.all_drawings, data.split_of, data.lexicon, data.faces, data.fifth_style)
CACHED += (data.glosses,)


def rows(split: str) -> list[int]:
    """Where the drawings of a split stand in `all_drawings()`."""
    part = drawings(split)
    return (4 * part.concept + part.style).tolist()


def test_drawings_are_64_pixel_pictures_on_white() -> None:
    every = all_drawings()
    assert len(every) == 6252
    assert every.images.shape == (6252, 3, 64, 64)
    assert every.images.dtype == torch.uint8
    assert every.images.is_contiguous()
    ink = (every.images < 255).any(1)
    assert 0.4 < 1 - ink.float().mean() < 0.6
    assert ink.flatten(1).any(1).all()
    for labels, count in ((every.concept, 1563), (every.style, 4), (every.category, 9)):
        assert labels.shape == (6252,)
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(count))
    assert torch.equal(4 * every.concept + every.style, torch.arange(6252))


@pytest.mark.parametrize("style", STYLES)
def test_each_drawing_is_its_tile_of_the_atlas(style: str) -> None:
    sheet = Image.open(data.DATA / "emoji" / f"{style}.png")
    assert sheet.size == (2560, 2560)
    for concept in (0, 39, 40, 801, 1562):
        line, column = divmod(concept, 40)
        tile = np.array(sheet.crop((64 * column, 64 * line, 64 * column + 64, 64 * line + 64)))
        drawing = all_drawings().images[4 * concept + STYLES.index(style)]
        assert np.array_equal(drawing.permute(1, 2, 0).numpy(), tile), concepts()["name"][concept]


def test_emoji_is_the_drawing_of_a_name_in_a_style() -> None:
    beaver = concepts()["name"].tolist().index("beaver")
    for style in STYLES:
        expected = all_drawings().images[4 * beaver + STYLES.index(style)].float() / 255
        assert torch.equal(emoji("beaver", style=style), expected)
    assert torch.equal(emoji("beaver"), emoji("beaver", style="3d"))


def test_categories_are_unicodes_with_their_counts() -> None:
    names = data.categories()
    assert list(names) == list(CATEGORIES)
    assert dict(zip(names, (all_drawings().category.bincount() // 4).tolist(), strict=True)) == CATEGORIES
    labels = [names[index] for index in all_drawings().category[::4].tolist()]
    assert labels == concepts()["category"].tolist()


def test_concepts_are_unique_and_complete() -> None:
    table = concepts()
    columns = ["name", "phrase", "category", "subcategory", "keywords", "emoji", "icon"]
    assert list(table.columns) == columns
    assert len(table) == 1563
    for column in columns:
        assert table[column].map(lambda cell: isinstance(cell, str)).all()
        assert column == "keywords" or table[column].ne("").all()
    for column in ("name", "phrase", "emoji", "icon"):
        assert table[column].is_unique


@pytest.mark.parametrize("split", SIZES)
def test_split_has_its_size_and_as_many_of_each_style(split: str) -> None:
    part = drawings(split)
    assert len(part) == len(part.images) == len(part.captions) == SIZES[split]
    assert part.style.bincount().tolist() == [SIZES[split] // 4] * 4
    assert rows(split) == sorted(set(rows(split)))
    assert torch.equal(part.images, all_drawings().images[rows(split)])


def test_splits_are_disjoint_and_cover_everything() -> None:
    assert sorted(rows("fit") + rows("validation")) == rows("train")
    assert sorted(rows("train") + rows("pairs") + rows("concepts")) == list(range(6252))
    for one, other in combinations(("fit", "validation", "pairs", "concepts"), 2):
        assert set(rows(one)).isdisjoint(rows(other))


def test_default_split_is_train() -> None:
    assert torch.equal(drawings().images, drawings("train").images)


def test_held_out_concepts_have_no_drawing_anywhere_else() -> None:
    held_out = drawings("concepts").concept
    assert held_out.bincount().unique().tolist() == [0, 4]
    assert set(held_out.tolist()).isdisjoint(drawings("train").concept.tolist())
    assert set(held_out.tolist()).isdisjoint(drawings("pairs").concept.tolist())


@pytest.mark.parametrize(("split", "others"), [("pairs", "train"), ("validation", "fit")])
def test_a_pairs_other_three_drawings_may_be_learnt_from(split: str, others: str) -> None:
    known = set(rows(others))
    held_out = rows(split)
    assert len({row // 4 for row in held_out}) == len(held_out)
    for row in held_out:
        siblings = set(range(row // 4 * 4, row // 4 * 4 + 4)) - {row}
        assert siblings <= known


def test_no_test_drawing_is_also_in_training() -> None:
    images = all_drawings().images
    learnt = {images[row].numpy().tobytes() for row in rows("train")}
    for row in rows("pairs") + rows("concepts"):
        assert images[row].numpy().tobytes() not in learnt, (concepts()["name"][row // 4], STYLES[row % 4])


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("beaver", "a beaver"),
        ("face holding back tears", "a face holding back tears"),
        ("globe showing Americas", "a globe showing Americas"),
        ("man lifting weights", "a man lifting weights"),
        ("otter", "an otter"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("ewe", "a ewe"),
        ("hourglass done", "an hourglass done"),
        ("x-ray", "an x-ray"),
        ("NG button", "an NG button"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("cactus", "a cactus"),
        ("compass", "a compass"),
        ("rhinoceros", "a rhinoceros"),
        ("chopsticks", "chopsticks"),
        ("skis", "skis"),
        ("busts in silhouette", "busts in silhouette"),
        ("cherries", "cherries"),
        ("bacon", "bacon"),
        ("tennis", "tennis"),
        ("twelve o'clock", "twelve o'clock"),
        ("no smoking", "no smoking"),
        ("Statue of Liberty", "the Statue of Liberty"),
        ("Santa Claus", "Santa Claus"),
        ("man with red hair", "a man with red hair"),
        ("person with a beard", "a person with a beard"),
        ("bald woman", "a bald woman"),
        ("keycap 1", "a keycap 1"),
    ],
)
def test_captions_are_english(name: str, phrase: str) -> None:
    names = concepts()["name"].tolist()
    four = all_drawings().select(torch.arange(4) + 4 * names.index(name))
    assert four.captions == [f"a {style} drawing of {phrase}" for style in STYLES]


def test_captions_are_unique() -> None:
    assert len(set(all_drawings().captions)) == 6252


def test_one_index_and_a_tensor_of_them_agree() -> None:
    part = drawings("pairs")
    indices = torch.tensor([7, 0, 399, 7])
    batch = part[indices]
    assert batch["image"].shape == (4, 3, 64, 64)
    assert batch["image"].dtype == torch.float32
    assert 0 <= batch["image"].min() < batch["image"].max() == 1
    assert torch.equal((255 * batch["image"]).round().byte(), part.images[indices])
    for place, index in enumerate(indices.tolist()):
        one = part[index]
        assert set(one) == set(batch) == {"image", "concept", "style", "category"}
        assert one["image"].shape == (3, 64, 64)
        assert all(torch.equal(one[key], batch[key][place]) for key in one)


def test_a_dataloader_takes_the_drawings() -> None:
    part = drawings("validation")
    batches = list(torch.utils.data.DataLoader(part, batch_size=64))
    assert [len(batch["style"]) for batch in batches] == [64, 64, 64, 8]
    assert torch.equal(torch.cat([batch["concept"] for batch in batches]), part.concept)


def test_select_takes_a_mask_or_indices() -> None:
    part = drawings("pairs")
    mask = part.style == STYLES.index("noto")
    by_mask, by_index = part.select(mask), part.select(mask.nonzero()[:, 0])
    assert len(by_mask) == len(by_index) == 100
    assert set(by_mask.style.tolist()) == {STYLES.index("noto")}
    assert torch.equal(by_mask.images, by_index.images)
    assert by_mask.captions == by_index.captions
    assert by_mask.captions == [caption for caption in part.captions if caption.startswith("a noto drawing")]


@pytest.fixture
def pictures() -> Tensor:
    return drawings("pairs")[torch.arange(0, 400, 25)]["image"]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
def test_augment_keeps_shape_and_range(pictures: Tensor, strength: float) -> None:
    before = pictures.clone()
    after = augment(pictures, strength)
    assert after.shape == pictures.shape
    assert after.dtype == pictures.dtype
    assert 0 <= after.min() < after.max() <= 1
    assert torch.equal(pictures, before)


def test_augment_differs_by_call_and_picture_and_repeats_with_the_seed(pictures: Tensor) -> None:
    same = pictures[:1].expand(8, -1, -1, -1)
    torch.manual_seed(0)
    first, second = augment(same), augment(same)
    assert not torch.equal(first, second)
    assert all(not torch.equal(one, other) for one, other in combinations(first, 2))
    torch.manual_seed(0)
    assert torch.equal(augment(same), first)


def test_augment_of_strength_0_changes_nothing(pictures: Tensor) -> None:
    torch.testing.assert_close(augment(pictures, 0), pictures, atol=1e-5, rtol=0)


def test_moved_shifts_each_picture_by_itself_and_white_comes_in() -> None:
    torch.manual_seed(0)
    dot = torch.ones(200, 3, 16, 16)
    dot[:, :, 8, 8] = 0
    places = (data.moved(dot, reach=2) == 0).nonzero()
    assert len(places) == 600 and (data.moved(dot, reach=2) == 1).sum() == dot.numel() - 600
    assert sorted(places[:, 2].unique().tolist()) == sorted(places[:, 3].unique().tolist()) == [6, 7, 8, 9, 10]
    assert len(places[:, 2:].unique(dim=0)) == 25
    assert torch.equal(data.moved(dot, reach=0), dot)


def test_augment_turns_and_scales_as_far_as_its_docstring_says(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = []

    def affine_grid(theta: Tensor, *rest: object, **options: object) -> Tensor:
        maps.append(theta)
        return F.affine_grid(theta, *rest, **options)

    torch.manual_seed(0)
    spy = SimpleNamespace(affine_grid=affine_grid, grid_sample=F.grid_sample)
    monkeypatch.setattr(data, "F", spy)
    augment(torch.ones(20_000, 3, 4, 4))
    (theta,) = maps
    scale = torch.det(theta[:, :, :2]) ** -0.5
    angle = torch.atan2(theta[:, 1, 0], (theta[:, 0, 0] * theta[:, 1, 1]).sqrt()).rad2deg()
    assert 0.75 < scale.min() < 0.77
    assert 1.18 < scale.max() < 1.20
    assert -12.1 < angle.min() < -11.9
    assert 11.9 < angle.max() < 12.1
    assert 0.13 < theta[:, :, 2].abs().max() <= 0.14


def test_augment_never_mirrors() -> None:
    left = torch.ones(200, 3, 32, 32)
    left[:, :, :, :16] = 0
    upper = left.transpose(2, 3).contiguous()
    torch.manual_seed(0)
    assert (augment(left)[..., :16].mean((1, 2, 3)) < augment(left)[..., 16:].mean((1, 2, 3))).all()
    assert (augment(upper)[..., :16, :].mean((1, 2, 3)) < augment(upper)[..., 16:, :].mean((1, 2, 3))).all()


def test_augment_hides_one_box_at_most(pictures: Tensor) -> None:
    torch.manual_seed(0)
    blank = augment(torch.ones(200, 3, 32, 32))
    border = torch.cat([blank[:, :, [0, -1]].flatten(2), blank[:, :, :, [0, -1]].flatten(2)], 2)
    ground = border.median(2).values[:, :, None, None]
    box = ((blank - ground).abs() > 1e-3).any(1)
    height, width = box.any(2).sum(1), box.any(1).sum(1)
    assert torch.equal(box.sum((1, 2)), height * width)
    assert 0.5 < (height > 0).float().mean() < 1
    assert 12 <= height.max() <= 15
    assert ground.min() > 0.7
    assert len(ground.flatten(1).unique(dim=0)) > 50


def test_augment_computes_where_the_pictures_are() -> None:
    after = augment(torch.empty(5, 3, 64, 64, device="meta"))
    assert after.device.type == "meta"
    assert after.shape == (5, 3, 64, 64)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the data folder that may be spoilt, with nothing loaded."""
    for name in ("emoji", "emojitwo", "reviews", "sentences", "glosses", "penguins"):
        shutil.copytree(data.DATA / name, tmp_path / name)
    shutil.copy(data.DATA / "SHA256SUMS", tmp_path)
    monkeypatch.setattr(data, "DATA", tmp_path)
    for function in CACHED:
        function.cache_clear()
    yield tmp_path
    for function in CACHED:
        function.cache_clear()


READERS = {
    "emoji/3d.png": lambda: drawings("train"),
    "emoji/noto.png": lambda: emoji("beaver"),
    "emoji/concepts.csv": concepts,
    "emoji/split.csv": lambda: drawings("pairs"),
    "emojitwo/drawings.png": data.fifth_style,
    "emojitwo/concepts.csv": data.fifth_style,
    "reviews/reviews.csv": data.reviews,
    "reviews/lexicon.csv": data.lexicon,
    "reviews/faces.csv": data.faces,
    "sentences/sentences.csv": data.sentences,
    "sentences/tokenizer.json": data.tokenizer,
    "emoji/tokenizer.json": data.caption_tokenizer,
    "penguins/penguins.csv": data.penguins,
    "glosses/glosses.csv": data.glosses,
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_or_missing_file_says_how_to_get_it_back(name: str, copied: Path) -> None:
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError) as damaged:
        READERS[name]()
    assert str(damaged.value) == (
        f"{path} is damaged or changed: its sha256 is not the one in data/SHA256SUMS; "
        f"get it back with `git checkout -- data/{name}`."
    )
    path.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        READERS[name]()
    assert str(missing.value) == f"{path} is missing; get it back with `git checkout -- data/{name}`."


def test_verified_takes_another_folder(tmp_path: Path) -> None:
    (tmp_path / "penguins").mkdir()
    shutil.copy(data.DATA / "penguins" / "penguins.csv", tmp_path / "penguins")
    path = data.verified("penguins/penguins.csv", tmp_path)
    assert path == tmp_path / "penguins" / "penguins.csv"
    path.write_text("species\n")
    with pytest.raises(ValueError, match="is damaged or changed"):
        data.verified("penguins/penguins.csv", tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: emoji("bever"), 'There is no concept "bever": did you mean "beaver"'),
        (lambda: emoji("qqqq"), 'There is no concept "qqqq": choose one of grinning face, '),
        (
            lambda: emoji("beaver", "sketch"),
            'There is no style "sketch": choose one of 3d, flat, noto, twemoji.',
        ),
        (lambda: emoji("beaver", "Noto"), 'There is no style "Noto": did you mean "noto"?'),
        (
            lambda: drawings("test"),
            'There is no split "test": choose one of train, fit, validation, pairs, concepts.',
        ),
        (lambda: drawings("concept"), 'There is no split "concept": did you mean "concepts"?'),
        (lambda: data.reviews("pairs"), 'There is no split "pairs": choose one of train, validation, test.'),
        (lambda: data.sentences("valid"), 'There is no split "valid": did you mean "validation"?'),
    ],
)
def test_unknown_name_gets_a_hint(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def read(name: str) -> list[dict[str, str]]:
    with open(data.DATA / name / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("split", "count"), [("train", 11348), ("validation", 1340), ("test", 1419)])
def test_reviews_have_texts_and_ratings(split: str, count: int) -> None:
    reviews = data.reviews(split)
    expected = [row for row in read("reviews") if row["split"] == split]
    assert isinstance(reviews, Texts)
    assert len(reviews) == len(expected) == count
    assert reviews.ratings.shape == (count,)
    assert reviews.ratings.dtype == torch.float32
    assert -4 <= reviews.ratings.min() < -3 < 3 < reviews.ratings.max() <= 4
    for index in (0, count // 2, count - 1):
        text, rating = reviews[index]
        assert text == expected[index]["text"]
        assert rating.item() == pytest.approx(float(expected[index]["rating"]), abs=1e-6)


@pytest.mark.parametrize(("split", "count"), [("train", 33206), ("validation", 4167), ("test", 4162)])
def test_sentences_are_texts_alone(split: str, count: int) -> None:
    sentences = data.sentences(split)
    assert sentences.ratings is None
    assert len(sentences) == count
    assert sentences.texts == [row["text"] for row in read("sentences") if row["split"] == split]
    assert [sentences[index] for index in (0, count - 1)] == [sentences.texts[0], sentences.texts[-1]]


def test_text_splits_cover_each_set() -> None:
    for load, name in ((data.reviews, "reviews"), (data.sentences, "sentences")):
        texts = [set(load(split).texts) for split in data.TEXT_SPLITS]
        assert sum(map(len, texts)) == len(set.union(*texts)) == len(read(name))
    assert data.reviews().texts == data.reviews("train").texts


def test_penguins_are_bills_and_species() -> None:
    bills, species = data.penguins()
    assert bills.shape == (342, 2)
    assert bills.dtype == torch.float64
    assert {name: species.count(name) for name in species} == {"Adelie": 151, "Chinstrap": 68, "Gentoo": 123}
    assert bills.min(0).values.tolist() == [32.1, 13.1]
    assert bills.max(0).values.tolist() == [59.6, 21.5]


def test_glosses_are_of_names() -> None:
    glosses = data.glosses()
    assert set(glosses) <= set(concepts()["name"]) and len(glosses) == 344
    assert glosses["beaver"].startswith("large semiaquatic rodent") and "Taurus" not in glosses
    assert all(2 <= len(text.split()) <= 12 for text in glosses.values())


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def claims(side: int) -> bytes:
    """A PNG of a hundred bytes that says it is `side` pixels wide and high."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    size = side.to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + b"\x08\x02\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


REFUSED = {
    "text": (b"a,b\n1,2\n", "no picture"),
    "empty": (b"", "no picture"),
    "half": (saved(Image.effect_noise((64, 64), 50))[:900], "no picture"),
    "wide": (saved(Image.new("RGB", (20_000, 20))), "20,000 by 20 pixels"),
    "large": (claims(5_000), "5,000 by 5,000 pixels"),
    "bomb": (claims(60_000), "would fill the memory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_uploads_that_are_refused(what: str) -> None:
    content, hint = REFUSED[what]
    with pytest.raises(ValueError, match=hint) as problem:
        data.from_upload(content)
    assert str(problem.value).count(".") == 1 and "\n" not in str(problem.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(64, 64), (300, 40), (1, 1), (3, 900)])
def test_uploads_become_drawings(kind: str, size: tuple[int, int]) -> None:
    image = data.from_upload(saved(Image.new("RGB", size, (255, 0, 0)), kind))
    assert image.shape == (3, 64, 64) and image.min() >= 0 and image.max() <= 1
    assert image[0].min() > 0.9  # red on white


def test_what_is_transparent_is_white() -> None:
    image = data.from_upload(saved(Image.new("RGBA", (64, 64), (9, 9, 9, 0))))
    assert (image == 1).all()
