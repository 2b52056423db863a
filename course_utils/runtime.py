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


def device() -> torch.device:
    """The GPU if there is one (CUDA, then Apple's), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precision(device: torch.device) -> str:
    """Mixed precision that `device` does in hardware: "bf16", "fp16" (a T4 has no bf16) or "no"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and has_bf16() else "no"


def seed_all(seed: int, process: int = 0) -> None:
    """Seed Python, numpy and torch on every device; each process of a run draws its own numbers."""
    seed = (seed + 7_919_000_000 * process) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
