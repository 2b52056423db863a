"""The course's data sets as tensors and torch Datasets; every file is checked against its sha256 before it is read."""

import difflib
import io
import warnings
from dataclasses import dataclass
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from course_utils.runtime import ROOT, sha256

DATA = ROOT / "data"
SIZE = 64
ATLAS_COLUMNS = 40
STYLES = ("3d", "flat", "noto", "twemoji")
SPLITS = ("train", "fit", "validation", "pairs", "concepts")
TEXT_SPLITS = ("train", "validation", "test")
UPLOADS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
LARGEST = 4096


def verified(name: str, folder: Path | None = None) -> Path:
    """Path of a data file such as "emoji/3d.png", once its sha256 is the one in `data/SHA256SUMS`.

    Raises FileNotFoundError or ValueError, each saying how to get the file back.
    """
    folder = folder or DATA
    path = folder / name
    sums = dict(reversed(line.split()) for line in (DATA / "SHA256SUMS").read_text().splitlines())
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; get it back with `git checkout -- data/{name}`.")
    if sha256(path) != sums[name]:
        raise ValueError(
            f"{path} is damaged or changed: its sha256 is not the one in data/SHA256SUMS; "
            f"get it back with `git checkout -- data/{name}`."
        )
    return path


def choose(value: str, known: tuple[str, ...] | list[str], what: str) -> str:
    """`value` if it is one of `known`; else a ValueError that names the nearest ones."""
    if value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.6)
    hint = " or ".join(f'"{name}"' for name in near)
    hint = f"did you mean {hint}?" if near else f"choose one of {', '.join(list(known)[:6])}{', …' * (len(known) > 6)}."
    raise ValueError(f'There is no {what} "{value}": {hint}')


def read_atlas(path: Path, count: int) -> Tensor:
    """Cut an atlas into its first `count` tiles, (count, 3, SIZE, SIZE) uint8."""
    sheet = torch.from_numpy(np.array(Image.open(path)))
    lines = sheet.shape[0] // SIZE
    tiles = sheet.reshape(lines, SIZE, ATLAS_COLUMNS, SIZE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, SIZE, SIZE)[:count]


@dataclass(frozen=True, eq=False)  # == on tensors is no yes or no
class Drawings(Dataset):
    """Drawings in memory, with what they show.

    images (N, 3, 64, 64) uint8 on white; concept (N,) int64 in [0, 1563), an index into `concepts()`;
    style (N,) int64 in [0, 4), an index into STYLES; category (N,) int64 in [0, 9), an index into `categories()`.
    """

    images: Tensor
    concept: Tensor
    style: Tensor
    category: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Tensor) -> dict[str, Tensor]:
        """One drawing, or a batch for a tensor of indices (B,); images as float in [0, 1]."""
        return {
            "image": self.images[index].float() / 255,
            "concept": self.concept[index],
            "style": self.style[index],
            "category": self.category[index],
        }

    def select(self, rows: Tensor) -> "Drawings":
        """The drawings at `rows`, a boolean mask (N,) or indices."""
        return Drawings(self.images[rows], self.concept[rows], self.style[rows], self.category[rows])

    @property
    def captions(self) -> list[str]:
        """One caption a drawing: "a 3d drawing of a beaver"."""
        return [caption(*pair) for pair in zip(self.concept.tolist(), self.style.tolist(), strict=True)]


@cache
def concepts() -> pd.DataFrame:
    """One row a concept, 1,563 in all: name, phrase, category, subcategory, keywords (joined by "|"), emoji, icon."""
    return pd.read_csv(verified("emoji/concepts.csv"), keep_default_na=False)


def caption(concept: int, style: int) -> str:
    """The caption of a concept, a row of `concepts()`, in a style, an index into STYLES."""
    return f"a {STYLES[style]} drawing of {concepts()['phrase'][concept]}"


@cache
def categories() -> tuple[str, ...]:
    """The nine categories, in Unicode's order."""
    return tuple(concepts()["category"].unique())


@cache
def all_drawings() -> Drawings:
    """All 6,252 drawings, ordered by concept, then style: row 4 * concept + style."""
    count = len(concepts())
    with ThreadPool() as pool:
        atlases = pool.map(lambda style: read_atlas(verified(f"emoji/{style}.png"), count), STYLES)
    category = torch.from_numpy(pd.Categorical(concepts()["category"], categories()).codes.astype(np.int64))
    return Drawings(
        images=torch.stack(atlases, dim=1).flatten(0, 1).contiguous(),
        concept=torch.arange(count).repeat_interleave(len(STYLES)),
        style=torch.arange(len(STYLES)).repeat(count),
        category=category.repeat_interleave(len(STYLES)),
    )


@cache
def split_of() -> np.ndarray:
    """The part each of the 6,252 drawings belongs to, (6252,) of "fit", "validation", "pairs", "concepts"."""
    place = {name: index for index, name in enumerate(concepts()["name"])}
    part = np.full(len(place) * len(STYLES), "fit", dtype=object)
    for row in pd.read_csv(verified("emoji/split.csv")).itertuples():
        part[len(STYLES) * place[row.name] + STYLES.index(row.style)] = row.split
    return part


def drawings(split: str = "train") -> Drawings:
    """The drawings of one part of the course's fixed split.

    "train" (5,452) is all that may be learnt from; "fit" and "validation" (5,252 and 200) cut it in two for
    tuning. Held out: "pairs" (400 drawings whose concept is known in other styles), "concepts" (400 drawings of
    100 concepts that are never seen). Raises ValueError for another name.
    """
    choose(split, SPLITS, "split")
    parts = ("fit", "validation") if split == "train" else (split,)
    return all_drawings().select(torch.from_numpy(np.isin(split_of(), parts)))


@cache
def fifth_style() -> Drawings:
    """1,035 of the concepts as EmojiTwo draws them, to test with, never to learn from; their style is 4."""
    place = {name: index for index, name in enumerate(concepts()["name"])}
    names = pd.read_csv(verified("emojitwo/concepts.csv"))["name"]
    concept = torch.tensor([place[name] for name in names])
    images = read_atlas(verified("emojitwo/drawings.png"), len(names))
    category = all_drawings().category[len(STYLES) * concept]
    return Drawings(images, concept, torch.full_like(concept, len(STYLES)), category)


def emoji(name: str, style: str = "3d") -> Tensor:
    """One drawing by its concept's name, (3, 64, 64) float in [0, 1]: `emoji("beaver", style="flat")`."""
    names = concepts()["name"].tolist()
    concept = names.index(choose(name, names, "concept"))
    return all_drawings()[len(STYLES) * concept + STYLES.index(choose(style, STYLES, "style"))]["image"]


@dataclass(frozen=True, eq=False)  # == on tensors is no yes or no
class Texts(Dataset):
    """Sentences, and for reviews their mean human rating, (N,) float32 in [-4, 4]."""

    texts: list[str]
    ratings: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str | tuple[str, Tensor]:
        return self.texts[index] if self.ratings is None else (self.texts[index], self.ratings[index])


def reviews(split: str = "train") -> Texts:
    """Sentences of film and product reviews with their ratings; split "train", "validation" or "test"."""
    table = pd.read_csv(verified("reviews/reviews.csv"), keep_default_na=False)
    table = table[table["split"] == choose(split, TEXT_SPLITS, "split")]
    return Texts(table["text"].tolist(), torch.tensor(table["rating"].to_numpy(), dtype=torch.float32))


@cache
def lexicon() -> dict[str, float]:
    """VADER's words, in lower case, with their mean human rating in [-4, 4]: {"awful": -2.0, ...}."""
    table = pd.read_csv(verified("reviews/lexicon.csv"), keep_default_na=False)
    return dict(zip(table["word"], table["rating"], strict=True))


@cache
def faces() -> pd.DataFrame:
    """52 of the drawn faces by name, their valence (above 1 friendly, below -1 not), and split, as for the reviews."""
    return pd.read_csv(verified("reviews/faces.csv"))


def sentences(split: str = "train") -> Texts:
    """Short usage sentences from WordNet's glosses, 3 to 14 words; split "train", "validation" or "test"."""
    table = pd.read_csv(verified("sentences/sentences.csv"), keep_default_na=False)
    return Texts(table["text"][table["split"] == choose(split, TEXT_SPLITS, "split")].tolist())


def tokenizer() -> Tokenizer:
    """The course's byte-pair encoding, 4,096 tokens in lower case: 0 is padding, 1 start, 2 end, 3 blank."""
    return Tokenizer.from_file(str(verified("sentences/tokenizer.json")))


def caption_tokenizer() -> Tokenizer:
    """Byte-pair encoding of captions, 2,048 pieces in lower case: 0 stands where there is none."""
    return Tokenizer.from_file(str(verified("emoji/tokenizer.json")))


def penguins() -> tuple[Tensor, list[str]]:
    """Bill length and bill depth of 342 penguins in mm, (342, 2) float64, and the species of each."""
    table = pd.read_csv(verified("penguins/penguins.csv"))
    return torch.tensor(table[["bill_length_mm", "bill_depth_mm"]].to_numpy()), table["species"].tolist()


def moved(images: Tensor, reach: int = 3) -> Tensor:
    """Each drawing (B, 3, H, W) moved by up to `reach` pixels up or down, left or right; white comes in."""
    count, _, height, width = images.shape
    padded = F.pad(images, [reach] * 4, value=1.0)
    corners = torch.randint(0, 2 * reach + 1, (count, 2)).tolist()
    return torch.stack([x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, corners, strict=True)])


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """Move, turn, stretch, recolour and partly hide drawings, (B, 3, H, W) in [0, 1] to the same.

    Nothing is mirrored: "man walking facing right" must stay true. Colours change little: a blue heart is not a
    purple one. Strength 1 turns by at most 12 degrees and scales by 0.75 to 1.2.
    """
    count, device = len(images), images.device

    def noise(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(count, *shape, device=device) - 1)

    angle, zoom = 0.21 * noise(), torch.exp(0.23 * noise() + 0.05 * strength)
    stretch = torch.exp(0.12 * noise())
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = 0.14 * noise(2)
    rows = [
        torch.stack([cos * stretch, -sin, shift[:, 0]], 1),
        torch.stack([sin, cos / stretch, shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - images, grid, align_corners=False)

    mixing = torch.eye(3, device=device) + 0.1 * noise(3, 3)
    colour = torch.einsum("bij,bjhw->bihw", mixing / mixing.sum(2, keepdim=True), moved)
    colour = ((colour - 0.5) * (1 + 0.25 * noise(1, 1, 1)) + 0.5 + 0.08 * noise(1, 1, 1)).clamp(0, 1)

    y, x = torch.meshgrid(torch.linspace(-1, 1, images.shape[2]), torch.linspace(-1, 1, images.shape[3]), indexing="ij")
    place = torch.stack([y, x]).to(device) - 1.2 * (2 * torch.rand(count, 2, 1, 1, device=device) - 1)
    half = 0.45 * strength * torch.rand(count, 1, 1, 1, device=device)
    hidden = (place.abs() < half).all(1, keepdim=True)
    return torch.where(hidden, torch.rand(count, 3, 1, 1, device=device), colour)


@cache
def glosses() -> dict[str, str]:
    """What WordNet says of the concepts whose name is one of its nouns: {"beaver": "large semiaquatic rodent ..."}."""
    table = pd.read_csv(verified("glosses/glosses.csv"), keep_default_na=False)
    return dict(zip(table["name"], table["gloss"], strict=True))


def from_upload(content: bytes) -> Tensor:
    """A picture file as a drawing, (3, SIZE, SIZE) float in [0, 1]: on white, made square, its first frame.

    The size that it claims is looked at before a pixel is decoded. Raises ValueError, with one sentence that says what
    to do, for what is no picture and for one of more than LARGEST pixels a side.
    """
    too_large = f"at most {LARGEST:,} by {LARGEST:,} pixels: make it smaller and upload it again."
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is refused below
            image = Image.open(io.BytesIO(content), formats=UPLOADS)
            width, height = image.size
            fits = max(width, height) <= LARGEST
            if fits:
                image = ImageOps.exif_transpose(image).convert("RGBA")
    except Image.DecompressionBombError:
        raise ValueError(f"This picture would fill the memory: {too_large}") from None
    except Exception:  # a damaged file can raise nearly anything in the decoders
        raise ValueError("This file is no picture that can be read: upload a PNG, JPEG, GIF, WebP or BMP.") from None
    if not fits:
        raise ValueError(f"This picture has {width:,} by {height:,} pixels, {too_large}")
    width, height = (max(1, round(SIZE * side / max(image.size))) for side in image.size)
    paper = Image.new("RGBA", (SIZE, SIZE), "white")
    paper.alpha_composite(image.resize((width, height), Image.LANCZOS), ((SIZE - width) // 2, (SIZE - height) // 2))
    return torch.from_numpy(np.array(paper.convert("RGB"))).permute(2, 0, 1).float() / 255
