"""What the repository promises: pins with hashes, one source for each fact, no address of a registry, known files."""

import json
import re
import subprocess
import tomllib

import pytest

from course_utils import runtime

ROOT = runtime.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked() -> list[str]:
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    return run.stdout.splitlines()


def test_lock_pins_and_hashes_every_direct_dependency() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([a-z0-9._-]+)==", lock, flags=re.MULTILINE))
    wanted = PROJECT["dependencies"] + [name for extra in PROJECT["optional-dependencies"].values() for name in extra]
    names = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in wanted}
    assert names <= pinned
    assert lock.count("--hash=sha256:") >= len(pinned) and "http://" not in lock and "https://" not in lock


def test_conda_asks_for_what_pyproject_asks_for() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert f"python{PROJECT['requires-python']}" in text
    (extras,) = re.findall(r"-e \.\[(.*)\]", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_no_address_of_a_package_registry() -> None:
    hosts = [
        "py" + "pi.org",
        "pythonhosted" + ".org",
        "npm" + "js.org",
        "npm" + "js.com",
        "deb.debian" + ".org",
    ]
    for name in tracked():
        if name.endswith((".png", ".safetensors")):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not [host for host in hosts if host in text], f"{name} names a registry"


def test_readme_gives_the_minutes_of_every_lesson() -> None:
    readme = (ROOT / "README.md").read_text()
    for lesson, minutes in runtime.MINUTES.items():
        (row,) = [line for line in readme.splitlines() if line.startswith("| [") and f"{lesson}.ipynb" in line]
        assert f"| {minutes['laptop']} min | {minutes['gpu']} min |" in row


@pytest.mark.parametrize("page", ["README.md", "TEACHING.md"])
def test_relative_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), f"{page} links to {target}, which is not there"


def schedules() -> dict[str, tuple[int, list[list[str]]]]:
    """From TEACHING.md, for each lesson's number its minutes and the rows of its schedule."""
    found = {}
    for part in re.split(r"^### ", (ROOT / "TEACHING.md").read_text(), flags=re.MULTILINE)[1:]:
        number, minutes = re.match(r"(\d\d) · .*?, (\d+) minutes", part).groups()
        rows = [line.strip("| ").split(" | ") for line in part.splitlines() if re.match(r"\| \d", line)]
        found[number] = int(minutes), rows
    return found


def sections_of(row: list[str]) -> range:
    first, *last = row[0].split("–")
    return range(int(first), int(last[0] if last else first) + 1)


@pytest.mark.parametrize("lesson", runtime.MINUTES)
def test_teaching_has_a_schedule_of_every_section(lesson: str) -> None:
    minutes, rows = schedules()[lesson[:2]]
    cells = json.loads((ROOT / "notebooks" / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]
    section, clicked = 0, set()
    for cell in cells:
        titles = re.findall(r"^## (\d+) · ", "".join(cell["source"]), flags=re.MULTILINE)
        section = int(titles[-1]) if titles else section
        outputs = [kind for output in cell.get("outputs", ()) for kind in output.get("data", ())]
        clicked |= {section} if "application/vnd.jupyter.widget-view+json" in outputs else set()
    assert [number for row in rows for number in sections_of(row)] == list(range(1, section + 1))
    assert sum(int(row[2]) for row in rows) == minutes
    has_widget = [bool(clicked.intersection(sections_of(row))) for row in rows]
    assert has_widget == ["**Click**" in row[3] for row in rows]
    assert lesson == "00_start_here" or any("**Break it**" in row[3] for row in rows)


def test_checkpoints_stay_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "data" / "checkpoints").glob("*/*")]
    assert max(sizes) <= 24_000_000 and sum(sizes) <= 225_000_000


def test_top_level() -> None:
    expected = {
        "notebooks",
        "course_utils",
        "data",
        "tests",
        "environment.yml",
        "README.md",
        "TEACHING.md",
        "pyproject.toml",
        ".ci",
    }
    expected |= {"requirements.lock", "Makefile", "LICENSE", ".gitignore", ".gitattributes"}
    assert {name.split("/")[0] for name in tracked()} == expected
