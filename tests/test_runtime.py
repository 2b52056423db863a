"""Profiles, banner, devices and seeds."""

import random

import numpy as np
import pytest
import torch

from course_utils import runtime


@pytest.fixture(autouse=True)
def no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    monkeypatch.delenv("COURSE_RETRAIN", raising=False)


@pytest.mark.parametrize("profile", list(runtime.PROFILES))
def test_profile_from_the_environment(monkeypatch, capsys, profile: str) -> None:
    monkeypatch.setenv("COURSE_PROFILE", profile)
    here = runtime.setup("01_gmm_em")
    assert here.pick(smoke="smoke", laptop="laptop", gpu="gpu") == profile == here.profile
    banner = capsys.readouterr().out
    assert banner.count("\n") == 1 and profile in banner and "minute" in banner


def test_default_profile_follows_the_device(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda"))
    assert runtime.setup("00_start_here").profile == "gpu"
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
    assert runtime.setup("00_start_here").profile == "laptop"


def test_a_bad_profile_is_named_with_the_good_ones(monkeypatch) -> None:
    monkeypatch.setenv("COURSE_PROFILE", "labtop")
    with pytest.raises(ValueError, match='no profile "labtop": set COURSE_PROFILE to one of smoke, laptop, gpu'):
        runtime.setup("00_start_here")


def test_precision_is_what_the_chip_does(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert runtime.precision(torch.device("cuda")) == "fp16"  # a T4
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert runtime.precision(torch.device("cuda")) == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert runtime.precision(torch.device("cpu")) == "no"
    assert runtime.precision(torch.device("mps")) == "no"


def test_seeds_repeat_and_processes_differ() -> None:
    def draw(process: int) -> tuple:
        runtime.seed_all(5, process)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(0) == draw(0)
    assert all(a != b for a, b in zip(draw(0), draw(1), strict=True))


def test_cache_folder_can_be_moved(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("COURSE_RUNS", raising=False)
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "elsewhere"))
    assert runtime.cache_dir("runs") == tmp_path / "elsewhere" / "runs"
    assert runtime.cache_dir("runs").is_dir()


def test_runs_can_be_kept_elsewhere_than_downloads(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "there" / "runs"))
    assert runtime.cache_dir("runs") == tmp_path / "there" / "runs" and runtime.cache_dir("runs").is_dir()
    assert runtime.cache_dir("wheels") == tmp_path / "here" / "wheels"


def test_environment_check_says_ready_or_what_is_wrong(monkeypatch, capsys, tmp_path) -> None:
    assert runtime.check_environment()
    assert capsys.readouterr().out.rstrip().endswith("Ready.")
    from course_utils import data

    (tmp_path / "SHA256SUMS").write_text((data.DATA / "SHA256SUMS").read_text())
    monkeypatch.setattr(data, "DATA", tmp_path)
    assert not runtime.check_environment()
    out = capsys.readouterr().out
    assert "git checkout" in out and "Not ready" in out
