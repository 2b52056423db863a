"""The drawings: rendered anew from their packages they are the committed ones, to the pixel and byte.

The everyday test renders every 20th concept; COURSE_FULL=1 rebuilds everything, in about 35 seconds.
"""

import importlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, features

from course_utils.data import ATLAS_COLUMNS, SIZE, STYLES, all_drawings, concepts, drawings, fifth_style
from course_utils.runtime import ROOT, sha256

FOLDER = ROOT / "data" / "emoji"
MADE_WITH = {"resvg_py": "0.5.0", "pillow": "13.0.0"}
FILES = ("3d.png", "flat.png", "noto.png", "twemoji.png", "concepts.csv", "split.csv")
SUMS = dict(reversed(line.split()) for line in (ROOT / "data" / "SHA256SUMS").read_text().splitlines())


def need(package: str) -> None:
    """Skip the test unless `package` has the version that the committed files were made with."""
    try:
        found = version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    if found != MADE_WITH[package]:
        pytest.skip(f"{package} is {found}; the drawings were made with {MADE_WITH[package]}")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build script; skips without the pinned renderer or where the packages cannot be fetched."""
    need("resvg_py")
    monkeypatch.syspath_prepend(ROOT / "data" / "build")
    build = importlib.import_module("emoji")
    try:
        for package in (*build.PACKAGES.values(), "emojibase-data"):
            build.fetch(package)
    except (RuntimeError, OSError) as error:
        pytest.skip(f"a package is not cached and cannot be fetched: {str(error).splitlines()[0]}")
    return build


def icons(script: ModuleType, style: str) -> dict:
    return json.loads((script.fetch(script.PACKAGES[style]) / "icons.json").read_text())


@pytest.mark.parametrize("style", STYLES)
def test_every_20th_drawing_renders_to_the_committed_pixels(script: ModuleType, style: str) -> None:
    package, sheet, table = icons(script, style), Image.open(FOLDER / f"{style}.png"), concepts()
    for index in range(0, len(table), 20):
        line, column = divmod(index, ATLAS_COLUMNS)
        corner = (column * SIZE, line * SIZE)
        tile = sheet.crop((*corner, corner[0] + SIZE, corner[1] + SIZE))
        drawing = script.render(package["icons"][table["icon"][index]], (package["width"], package["height"]))
        assert drawing.mode == tile.mode == "RGB"
        assert np.array_equal(drawing, tile), f"{table['name'][index]} in {style}"


def test_tables_are_rebuilt_byte_for_byte(script: ModuleType, tmp_path: Path) -> None:
    rows = script.concepts({style: icons(script, style) for style in STYLES})
    sheets = {style: Image.open(FOLDER / f"{style}.png") for style in STYLES}
    script.write_csv(tmp_path / "concepts.csv", rows)
    script.write_csv(tmp_path / "split.csv", script.split(rows, sheets))
    for name in ("concepts.csv", "split.csv"):
        assert sha256(tmp_path / name) == SUMS[f"emoji/{name}"], name


def test_split_passes_over_a_drawing_that_another_style_repeats(script: ModuleType) -> None:
    table = [{"name": name} for name in concepts()["name"]]
    sheets = {style: Image.open(FOLDER / f"{style}.png") for style in STYLES}
    before = [row for row in script.split(table, sheets) if row["split"] == "pairs"]
    place = table.index({"name": before[0]["name"]})
    corner = (place % ATLAS_COLUMNS * SIZE, place // ATLAS_COLUMNS * SIZE)
    tile = sheets[before[0]["style"]].crop((*corner, corner[0] + SIZE, corner[1] + SIZE))
    for sheet in sheets.values():
        sheet.paste(tile, corner)
    after = [row for row in script.split(table, sheets) if row["split"] == "pairs"]
    assert len(after) == len(before) == 400
    assert before[0]["name"] not in {row["name"] for row in after}


@pytest.mark.skipif(os.environ.get("COURSE_FULL") != "1", reason="COURSE_FULL=1 rebuilds all drawings")
def test_build_writes_the_committed_bytes(script: ModuleType, tmp_path: Path) -> None:
    need("pillow")
    script.build(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    differing = [name for name in FILES if sha256(tmp_path / name) != SUMS[f"emoji/{name}"]]
    repacked = [
        name
        for name in differing
        if name.endswith(".png")
        and np.array_equal(np.array(Image.open(tmp_path / name)), np.array(Image.open(FOLDER / name)))
    ]
    assert not set(differing) - set(repacked), "these were built otherwise"
    assert not repacked, (
        f"{', '.join(repacked)}: every pixel is right, but this Pillow's zlib ({features.version('zlib')}) "
        "packs them into other bytes; keep the committed files"
    )


def test_the_fifth_style_renders_to_the_committed_pixels(script: ModuleType) -> None:
    try:
        style = json.loads((script.fetch("@iconify-json/emojione") / "icons.json").read_text())
    except (RuntimeError, OSError) as error:
        pytest.skip(f"the package is not cached and cannot be fetched: {str(error).splitlines()[0]}")
    part, table = fifth_style(), concepts()
    assert len(part) == sum(icon in style["icons"] for icon in table["icon"]) == len(part.concept.unique())
    for row in range(0, len(part), 20):
        icon = table["icon"][int(part.concept[row])]
        drawn = np.array(script.render(style["icons"][icon], (style["width"], style["height"])))
        assert np.array_equal(drawn, part.images[row].permute(1, 2, 0).numpy()), icon


def test_the_fifth_style_is_described_and_like_no_other() -> None:
    folder = FOLDER.parent / "emojitwo"
    datasheet = (folder / "README.md").read_text(encoding="utf-8")
    for name in ("drawings.png", "concepts.csv"):
        assert f"| `{name}` | `{sha256(folder / name)}` |" in datasheet
        assert f"{(folder / name).stat().st_size:,} bytes" in datasheet
    assert (folder / "LICENSE").read_text().startswith("EmojiTwo graphics")
    part, every = fifth_style(), all_drawings()
    known = {image.numpy().tobytes() for image in every.images}
    assert not [row for row in range(len(part)) if part.images[row].numpy().tobytes() in known]
    held_out = drawings("concepts").concept.unique()
    assert f"{int(torch.isin(part.concept, held_out).sum())} of the 100 held-out concepts" in datasheet
    assert part[torch.tensor([0])]["style"].item() == 4 and f"{len(part):,} of the course's" in datasheet


def test_files_are_as_the_datasheet_says() -> None:
    datasheet = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        size = (FOLDER / name).stat().st_size
        assert f"| `{name}` | {size:,} | `{sha256(FOLDER / name)}` |" in datasheet
        assert sha256(FOLDER / name) == SUMS[f"emoji/{name}"]


def test_datasheet_names_the_pinned_packages_and_their_licences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "data" / "build")
    packages = importlib.import_module("packages").PACKAGES
    datasheet = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("fluent-emoji", "fluent-emoji-flat", "noto", "twemoji"):
        package = packages[f"@iconify-json/{name}"]
        assert f"| `@iconify-json/{name}` | {package.version} | " in datasheet
        assert package.sha256 in datasheet
    assert packages["emojibase-data"].sha256 in datasheet
    for name, start in (
        ("fluent", "MIT License\n\nCopyright (c) Microsoft Corporation."),
        ("noto", "Noto Emoji"),
        ("twemoji", "Twemoji graphics"),
        ("emojibase", "MIT License\n\nCopyright (c) 2017-2019 Miles Johnson"),
    ):
        licence = (FOLDER / f"LICENSE-{name}").read_text(encoding="utf-8")
        assert f"`LICENSE-{name}`" in datasheet
        assert licence.startswith(start)
        assert len(licence) > 1000
