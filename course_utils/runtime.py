"""Where and how a notebook runs: device, precision, seed, profile, cache, and the banner that says so."""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import platformdirs
import torch

ROOT = Path(__file__).resolve().parent.parent


def cache_dir(name: str = "") -> Path:
    """Folder for downloads and runs, made on first use: `$COURSE_CACHE`, or the user's cache folder."""
    base = os.environ.get("COURSE_CACHE") or platformdirs.user_cache_dir("mixtures-to-multimodal")
    folder = Path(base).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
