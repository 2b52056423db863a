"""Where and how a notebook runs: device, precision, seed, profile, cache, and the banner that says so."""

import hashlib
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import platformdirs
import torch

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
Check = tuple[bool, str, str]  # is it good; what was looked at; what to do where it is not

# Okabe and Ito's colours, which colour-blind readers tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")

PROFILES = {
    "smoke": "tiny sizes, for tests",
    "laptop": "short trainings run live, long ones are loaded from shipped checkpoints",
    "gpu": "trains the full model from scratch",
}
MINUTES = {
    "00_start_here": {"smoke": 0.5, "laptop": 1, "gpu": 0.5},
    "01_gmm_em": {"smoke": 1, "laptop": 2, "gpu": 1},
    "02_vae_elbo": {"smoke": 1, "laptop": 3, "gpu": 10},
    "03_text_vae_and_style": {"smoke": 1, "laptop": 3, "gpu": 15},
    "04_multimodal_representations": {"smoke": 1, "laptop": 3, "gpu": 20},
    "05_visual_tokens": {"smoke": 1, "laptop": 3, "gpu": 20},
    "06_autoregressive_text_to_image": {"smoke": 1, "laptop": 3, "gpu": 30},
    "07_diffusion": {"smoke": 1, "laptop": 3, "gpu": 20},
    "08_text_to_image_diffusion": {"smoke": 1, "laptop": 3, "gpu": 40},
    "09_adapting_llms": {"smoke": 1, "laptop": 3, "gpu": 20},
    "10_grounding_llms_for_retrieval": {"smoke": 1, "laptop": 3, "gpu": 20},
    "11_grounding_llms_for_generation": {"smoke": 1, "laptop": 3, "gpu": 20},
}
HOMEWORK_MINUTES = {f"hw{n}": {"smoke": 1, "laptop": 3, "gpu": 3} for n in range(1, 5)}


def cache_dir(name: str = "") -> Path:
    """Folder for downloads and runs, made on first use: `$COURSE_CACHE`, or the user's cache folder.

    "runs" may lie elsewhere, in `$COURSE_RUNS`: a run is worth keeping where what can be fetched again is not.
    """
    base = os.environ.get("COURSE_CACHE") or platformdirs.user_cache_dir("mixtures-to-multimodal")
    runs = os.environ.get("COURSE_RUNS") if name == "runs" else None
    folder = Path(runs or Path(base, name)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
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
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.5 ms for devices that are not there
    if device().type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device().type == "mps":
        torch.mps.manual_seed(seed)


def environment_checks() -> list[Check]:
    """What this computer has: Python, torch, speed, disk, data."""
    from course_utils import data  # which imports this module

    def speed() -> float:
        x = torch.rand(1024, 1024)
        start = time.perf_counter()
        for _ in range(10):
            x @ x
        return 10 * 2 * 1024**3 / (time.perf_counter() - start) / 1e9

    speed()
    damaged = []
    for line in (data.DATA / "SHA256SUMS").read_text().splitlines():
        try:
            data.verified(line.split()[1])
        except (FileNotFoundError, ValueError) as error:
            damaged.append(str(error))
    free = shutil.disk_usage(cache_dir()).free / 1e9
    gigaflops = speed()
    slow = "" if gigaflops > 10 else " (slow now: close other programs)"
    return [
        (sys.version_info >= (3, 11), f"Python {platform.python_version()}", "install Python 3.11 or newer"),
        (True, f"torch {torch.__version__} on {device().type}, mixed precision {precision(device())}", ""),
        (True, f"{os.cpu_count()} cores, {gigaflops:.0f} GFLOP/s in float32{slow}", ""),
        (
            free > 2,
            f"{free:.0f} GB free in the cache folder",
            "free 2 GB, or set COURSE_CACHE to a folder elsewhere",
        ),
        (not damaged, "data sets complete", " ".join(damaged)),
    ]


def say_ready(checks: Iterable[Check]) -> bool:
    """Print a line for each check as it comes, and a verdict; True where all are good."""
    ready = True
    for good, what, cure in checks:
        print(f"  {'ok ' if good else '-> '} {what}{'' if good else ': ' + cure}", flush=True)
        ready = ready and good
    print("Ready." if ready else "Not ready: see the lines with an arrow.")
    return ready


def check_environment() -> bool:
    """Print what this computer has, a line each, and a verdict; True where the lessons will run."""
    return say_ready(environment_checks())


@dataclass(frozen=True)
class Runtime:
    """What `setup` decided. `retrain` is true where COURSE_RETRAIN=1 asks for checkpoints to be made anew."""

    lesson: str
    profile: str
    device: torch.device
    retrain: bool

    def pick(self, *, smoke: T, laptop: T, gpu: T) -> T:
        """The value for this profile: `here.pick(smoke=10, laptop=100, gpu=1000)`."""
        return {"smoke": smoke, "laptop": laptop, "gpu": gpu}[self.profile]


def chosen_profile() -> str:
    """`$COURSE_PROFILE`, else "gpu" where there is one, else "laptop".

    Raises ValueError for a name that is not a profile.
    """
    profile = os.environ.get("COURSE_PROFILE") or ("laptop" if device().type == "cpu" else "gpu")
    if profile not in PROFILES:
        raise ValueError(f'There is no profile "{profile}": set COURSE_PROFILE to one of {", ".join(PROFILES)}.')
    return profile


def retraining() -> bool:
    """Whether COURSE_RETRAIN=1 asks for the shipped checkpoints to be made anew."""
    return os.environ.get("COURSE_RETRAIN") == "1"


def setup(lesson: str, seed: int = 0) -> Runtime:
    """Seed everything, choose device and profile (`chosen_profile`), and print the lesson's banner.

    Raises ValueError where COURSE_PROFILE names none.
    """
    import matplotlib.pyplot as plt  # half a second, which who only loads a model need not wait for

    where, profile = device(), chosen_profile()
    seed_all(seed)
    plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=PALETTE)
    plt.rcParams["image.cmap"] = "cividis"
    cores = f" with {os.cpu_count()} cores" if where.type == "cpu" else ""
    minutes = (MINUTES | HOMEWORK_MINUTES)[lesson][profile]
    print(
        f"{lesson} · profile {profile}: {PROFILES[profile]} · {where.type}{cores} · seed {seed} · "
        f"about {f'{minutes} minute' + 's' * (minutes > 1) if minutes >= 1 else 'half a minute'} in all"
    )
    return Runtime(lesson, profile, where, retraining())
