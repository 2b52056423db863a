"""Build the drawings: 1,563 emoji concepts in four drawing styles, their words, and the fixed split.

    python data/build/emoji.py

Writes `data/emoji/<style>.png` (an atlas a style), `concepts.csv` and `split.csv`, byte for byte the same each time.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import resvg_py
from packages import fetch
from PIL import Image

from course_utils.data import ATLAS_COLUMNS, SIZE, STYLES

PACKAGES = {
    "3d": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
}
HELD_OUT_CONCEPTS, HELD_OUT_PAIRS, VALIDATION_PAIRS = 100, 400, 200


NO_ARTICLE = set(
    """Aquarius|Aries|Cancer|Capricorn|Gemini|Leo|Libra|Ophiuchus|Sagittarius|Scorpio|Taurus|Virgo|Mrs. Claus
    Mx Claus|Santa Claus|Tokyo tower|mount fuji|ZZZ|om|dna|american football|badminton|baseball|basketball
    bowling|camping|cooking|construction|field hockey|horse racing|ice hockey|lacrosse|ping pong|rugby football
    softball|tennis|volleyball|baggage claim|left luggage|luggage|passport control|bread|butter|broccoli
    baguette bread|canned food|cooked rice|coral|curry rice|custard|dango|falafel|flatbread|fondue|garlic
    ginger root|green salad|leafy green|meat on bone|bacon|popcorn|money with wings|oden|pouring liquid|salt
    shaved ice|spaghetti|sushi|sake|wood|yarn|ice|soap|bubble tea|mate|fog|fire|non-potable water|potable water
    foggy|sunrise|sunrise over mountains|sunset|night with stars|high voltage|infinity|information|copyright
    registered|trade mark|divide|minus|multiply|plus|people hugging|locked|locked with key|locked with pen
    unlocked|rolling on the floor laughing|breast-feeding|vibration mode|prohibited|dashing away|no entry
    no littering|no smoking|no one under eighteen|flower playing cards|dizzy
    wireless|radioactive|biohazard|currency exchange|star-struck
    fleur-de-lis|yin yang""".replace("\n    ", "|").split("|")
)
AN = ("a", "e", "i", "o", "u", "hourglass", "ng ", "sos", "x-ray")
NOT_AN = ("euro", "ewe", "one", "unicorn")
ONE = ("face ", "globe ", "man ", "person ", "woman ")  # "a man lifting weights": one, though it ends like many


def words(label: str) -> str:
    """CLDR label to plain words: "man: red hair" -> "man with red hair", "keycap: 1" -> "keycap 1"."""
    name = label.replace("’", "'").replace("“", "").replace("”", "").replace(" (blood type)", "")
    person, _, trait = name.partition(": ")
    if trait == "bald":
        return f"bald {person}"
    if trait in ("beard", "red hair", "curly hair", "white hair"):
        return f"{person} with {'a ' if trait == 'beard' else ''}{trait}"
    return f"{person} {trait}".strip()


def phrase(name: str) -> str:
    """The name with the article that English wants: "a beaver", "an otter", "chopsticks", "bacon"."""
    head = re.split(" with | of | on | in | up ", name)[0]
    many = head.endswith("s") and not head.endswith(("ss", "us", "is", "rhinoceros", "thumbs"))
    plural = head == "skis" or (many and not head.startswith(ONE))
    if name in NO_ARTICLE or plural or name.endswith(("o'clock", "-thirty")) or name.startswith("no "):
        return name
    if name == "Statue of Liberty":
        return f"the {name}"
    start = name.lower()
    return f"an {name}" if start.startswith(AN) and not start.startswith(NOT_AN) else f"a {name}"


def concepts(icons: dict[str, dict]) -> list[dict[str, str]]:
    """One row a concept that all four styles draw, in Unicode's order, so that an atlas is sorted by kind."""
    shared = set.intersection(*(set(style["icons"]) for style in icons.values()))
    icon_names = {}
    for package in PACKAGES.values():
        for code, icon in json.loads((fetch(package) / "chars.json").read_text()).items():
            if icon in shared:
                icon_names[code.replace("-fe0f", "")] = icon
    emojibase = fetch("emojibase-data")
    groups = json.loads((emojibase / "meta" / "groups.json").read_text())
    rows = []
    for entry in sorted(json.loads((emojibase / "en" / "data.json").read_text()), key=lambda e: e.get("order", 0)):
        icon = icon_names.get(entry["hexcode"].lower().replace("-fe0f", ""))
        if icon is None:
            continue
        name = words(entry["label"])
        rows.append(
            {
                "name": name,
                "phrase": phrase(name),
                "category": groups["groups"][str(entry["group"])],
                "subcategory": groups["subgroups"][str(entry["subgroup"])],
                "keywords": "|".join(tag for tag in entry.get("tags", []) if tag != name),
                "emoji": entry["emoji"],
                "icon": icon,
            }
        )
    assert len({row["icon"] for row in rows}) == len({row["name"] for row in rows}) == len(rows) == len(shared)
    return rows


def render(icon: dict, size: tuple[int, int]) -> Image.Image:
    """One icon on white, (SIZE, SIZE) RGB. Both width and height are set: without them some come out 64x63."""
    width, height = icon.get("width", size[0]), icon.get("height", size[1])
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{box}">{icon["body"]}</svg>'
    )
    drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    return Image.alpha_composite(white, drawing).convert("RGB")


def atlas(rows: list[dict[str, str]], style: dict) -> Image.Image:
    """All drawings of one style on one sheet, ATLAS_COLUMNS to a row, in the order of `rows`."""
    lines = -(-len(rows) // ATLAS_COLUMNS)
    sheet = Image.new("RGB", (ATLAS_COLUMNS * SIZE, lines * SIZE), "white")
    for index, row in enumerate(rows):
        line, column = divmod(index, ATLAS_COLUMNS)
        drawing = render(style["icons"][row["icon"]], (style["width"], style["height"]))
        sheet.paste(drawing, (column * SIZE, line * SIZE))
    return sheet


def split(rows: list[dict[str, str]], sheets: dict[str, Image.Image]) -> list[dict[str, str]]:
    """Held-out concepts, held-out pairs and the validation pairs, chosen by the hash of their names.

    A hash depends on no library's random numbers and on no other row. Some drawings are the same, pixel by pixel:
    noto draws "astronaut" and "man astronaut" alike. None of those is held out, or the test would be in the training
    set.
    """

    def draw_lots(names: list[str], what: str) -> list[str]:
        return sorted(names, key=lambda name: hashlib.sha256(f"{what}:{name}".encode()).hexdigest())

    def pixels(name: str, style: str) -> bytes:
        line, column = divmod(place[name], ATLAS_COLUMNS)
        corner = (column * SIZE, line * SIZE)
        return sheets[style].crop((*corner, corner[0] + SIZE, corner[1] + SIZE)).tobytes()

    place = {row["name"]: index for index, row in enumerate(rows)}
    content = {(name, style): pixels(name, style) for name in place for style in STYLES}
    copies = Counter(content.values())
    alone = {drawing: copies[content[drawing]] == 1 for drawing in content}

    names = draw_lots(list(place), "concepts")
    unseen = [name for name in names if all(alone[name, style] for style in STYLES)][:HELD_OUT_CONCEPTS]
    rest = draw_lots([name for name in names if name not in unseen], "pairs")
    chosen = [(name, style, "concepts") for name in unseen for style in STYLES]
    pairs = 0
    for name in rest:
        part = "pairs" if pairs < HELD_OUT_PAIRS else "validation"
        style = STYLES[pairs % len(STYLES)]
        if alone[name, style]:
            chosen.append((name, style, part))
            pairs += 1
        if pairs == HELD_OUT_PAIRS + VALIDATION_PAIRS:
            break
    chosen.sort(key=lambda row: (row[2], place[row[0]], STYLES.index(row[1])))
    return [dict(zip(("name", "style", "split"), row, strict=True)) for row in chosen]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def build(folder: Path) -> None:
    """Write the atlases and tables into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    icons = {style: json.loads((fetch(name) / "icons.json").read_text()) for style, name in PACKAGES.items()}
    rows = concepts(icons)
    sheets = {style: atlas(rows, icons[style]) for style in STYLES}
    for style, sheet in sheets.items():
        sheet.save(folder / f"{style}.png", optimize=True)
    write_csv(folder / "concepts.csv", rows)
    write_csv(folder / "split.csv", split(rows, sheets))


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent / "emoji")
