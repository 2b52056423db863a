"""A small training as a process of its own, for test_training.py to kill and to run on two processes.

    python tests/training_job.py killed FOLDER KILLS SEED
    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/training_job.py shared FOLDER

`killed` imports torch once and forks a process for each life of the training, so that a kill costs no new
import. It leaves whole.pt (never interrupted) and killed.pt in FOLDER and prints what each kill met as JSON.
`shared` leaves rank0.pt and rank1.pt.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from course_utils import training
from course_utils.training import Batch, Run, train

STEPS, BATCH, ROWS = 100, 16, 150
PAUSE = 0.002
SIZE = {"steps": 60, "batch_size": BATCH, "warmup": 10, "precision": "no", "device": "cpu", "seed": 3}


class Points(Dataset):
    """Targets y (N, 3) of x (N, 6), which Python's and numpy's random numbers stretch and shift."""

    def __init__(self, rows: int = ROWS, augment: bool = True):
        self.x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
        self.y = torch.stack([self.x[:, 0] * self.x[:, 1], self.x[:, 2].sin(), self.x.sum(1)], dim=1)
        self.augment, self.asked = augment, []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        self.asked.append(rows.tolist())
        x = self.x[rows]
        if self.augment:
            shift = torch.as_tensor(np.random.normal(0, 0.1, (len(rows), 1)), dtype=torch.float32)
            x = x * random.uniform(0.9, 1.1) + shift
        return {"x": x, "y": self.y[rows]}


def small_model(dropout: float = 0.2, norm: bool = True) -> nn.Module:
    """(B, 6) to (B, 3); the norm has buffers that a checkpoint must hold as well."""
    torch.manual_seed(7)
    middle = nn.BatchNorm1d(24) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(6, 24), middle, nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 3))


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def noisy_loss(model: nn.Module, batch: Batch) -> Tensor:
    noise = torch.randn_like(batch["x"])
    return F.mse_loss(model(batch["x"] + 0.1 * noise), batch["y"])


def final(run: Run) -> dict:
    """All that must come out the same: weights and buffers, EMA, the optimizer's state, history and step."""
    state = {"model": run.model.state_dict(), "ema": run.ema, "optimizer": run.optimizer.state_dict()}
    return state | {"history": run.history, "step": run.step}


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt"))


class SlowFile:
    """A file on a slow disk: it writes in pieces, each of which reaches the file before the next.

    Where `stuck_at` is a number, a long write goes no further than that piece: it touches `marker` and waits.
    """

    PIECES = 7
    stuck_at: int | None = None
    marker: Path

    def __init__(self, path: Path, mode: str):
        self.file = open(path, mode)  # noqa: SIM115

    def __enter__(self) -> "SlowFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def write(self, content: bytes) -> None:
        content = memoryview(content)
        size = len(content) // self.PIECES + 1
        for piece in range(self.PIECES + 1):
            if piece == self.stuck_at and size > 1000:
                self.marker.touch()
                time.sleep(600)
            self.file.write(content[piece * size : (piece + 1) * size])
            self.file.flush()
            time.sleep(PAUSE)


def life(folder: Path | None, result: Path, hold: bool = False, stuck: tuple[int, int] | None = None) -> None:
    """Train to the end and write `result`; with `hold`, never reach the end but wait there to be killed.

    `stuck` is a step and a piece: a later checkpoint than that step's is written up to that piece alone.
    """

    def slow_loss(model: nn.Module, batch: Batch) -> Tensor:
        time.sleep(PAUSE)
        return noisy_loss(model, batch)

    def wait(run: Run) -> None:
        if stuck and run.step > stuck[0]:
            SlowFile.stuck_at, SlowFile.marker = stuck[1], result
        if hold and run.step >= STEPS - training.LOG_EVERY:
            time.sleep(600)

    training.open = SlowFile
    warnings.filterwarnings("error", message=".*damaged")
    size = SIZE | {"steps": STEPS, "learning_rate": 1e-2}
    run = train(small_model(), slow_loss, Points(), folder=folder, save_seconds=0, callbacks=(wait,), **size)
    torch.save(final(run), result)


def forked(work: Callable[[], None]) -> int:
    """Process id of a new process that does `work` and ends, with exit code 1 where it raised."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return process


def wait_until(true: Callable[[], bool], process: int) -> None:
    give_up = time.monotonic() + 300
    while not true():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "the training ended before it was killed"
        if time.monotonic() > give_up:
            os.kill(process, signal.SIGKILL)
            raise TimeoutError("no such moment in 300 s")
        time.sleep(0.0002)


def killed(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # a first optimizer step would import it, in every life anew
    rng = random.Random(seed)
    code = os.waitpid(forked(lambda: life(None, folder / "whole.pt")), 0)[1]
    assert code == 0, "the uninterrupted training failed"

    run, marker, met = folder / "run", folder / "marker", []
    saves = range(0, STEPS - 2 * training.LOG_EVERY, training.LOG_EVERY)
    moments = sorted(rng.sample(saves[1:], kills) if kills < len(saves) else rng.choices(saves, k=kills))
    for number, moment in enumerate(moments):
        marker.unlink(missing_ok=True)
        stuck = (moment, rng.randrange(SlowFile.PIECES + 1)) if number % 2 == 0 else None
        process = forked(lambda stuck=stuck: life(run, marker, hold=True, stuck=stuck))
        if stuck:
            wait_until(marker.exists, process)
        else:
            wait_until(lambda moment=moment: max(checkpoint_steps(run), default=0) >= moment, process)
        delay = rng.uniform(0, 10 * PAUSE)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status), f"it ended by itself with status {status}"
        written = run / "unfinished"
        size = written.stat().st_size if written.exists() else None
        newest = max(checkpoint_steps(run), default=0)
        met.append({"asked": moment, "newest": newest, "stuck": stuck, "delay": delay, "unfinished": size})

    code = os.waitpid(forked(lambda: life(run, folder / "killed.pt")), 0)[1]
    assert code == 0, "the training that was killed did not end"
    print(json.dumps(met))


class Stop(Exception):
    """Raised by a callback to end a training early."""


def stop_at(step: int) -> Callable[[Run], None]:
    """A callback that ends the run there, before the checkpoint of that step is written."""

    def callback(run: Run) -> None:
        if run.step == step:
            raise Stop

    return callback


def shared(folder: Path) -> None:
    """Train on every process of the group, stopped half way and started again; each writes where it ended."""
    torch.set_num_threads(1)
    size = SIZE | {"steps": 40, "folder": folder / "run", "save_seconds": 0}
    with contextlib.suppress(Stop):
        train(small_model(0, norm=False), plain_loss, Points(augment=False), callbacks=(stop_at(20),), **size)
    data, stopped = Points(augment=False), checkpoint_steps(folder / "run")
    run = train(small_model(0, norm=False), plain_loss, data, **size)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    assert world == 2, f"{world} processes"
    drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
    ended = final(run) | {"world": world, "rows": data.asked, "drawn": drawn, "stopped": stopped}
    torch.save(ended, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(Path(sys.argv[2]), kills=int(sys.argv[3]), seed=int(sys.argv[4]))
    else:
        shared(Path(sys.argv[2]))
