"""What the training loop costs over the same steps written by hand in torch.

Both sides train the same model on the same rows in the same order, in turn, in one process: AdamW (fused),
clipping, warm-up and cosine, moving average. By hand means what one writes without this course: no seeding,
no norms kept, no checkpoints, no bar. Their losses must agree. The bar is 1.03 on steps of 1 ms and more.

What is compared is the median time of ten steps, over short runs of both sides in turn: a computer that does
something else for a moment then changes little.

    python tests/benchmarks/loop_overhead.py [--repeats 20] [--threads 2]
"""

import argparse
import math
import statistics
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from course_utils.training import LOG_EVERY, Run, batch_rows, train

BATCH, ROWS, WIDTH_IN, SEED = 64, 6000, 64, 1
PEAK, WARMUP, DECAY, CLIP, WEIGHT_DECAY = 1e-3, 20, 0.999, 1.0, 0.01


class Rows(Dataset):
    """Inputs (N, 64) and targets (N, 64) in memory."""

    def __init__(self):
        generator = torch.Generator().manual_seed(SEED)
        self.x, self.y = (torch.randn(ROWS, WIDTH_IN, generator=generator) for _ in range(2))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        return {"x": self.x[rows], "y": self.y[rows]}


def model_of(width: int) -> nn.Module:
    """Two to six hidden layers with norms: the wider, the deeper, so that a step is made of many small calls."""
    torch.manual_seed(SEED)
    hidden = [
        part
        for _ in range(min(6, 1 + width // 32))
        for part in (nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
    ]
    return nn.Sequential(nn.Linear(WIDTH_IN, width), *hidden, nn.Linear(width, WIDTH_IN))


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def by_hand(width: int, data: Rows, steps: int) -> tuple[list[float], list[float]]:
    """Times at every tenth step, and the losses, of a loop without the course."""
    model = model_of(width).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, weight_decay=WEIGHT_DECAY, fused=True)
    average = [parameter.detach().clone() for parameter in parameters]
    order = torch.cat([batch_rows(step, BATCH, ROWS, SEED) for step in range(steps)])
    losses, times = [], []
    for step in range(steps):
        warm, past = (step + 1) / WARMUP, (step - WARMUP) / (steps - WARMUP)
        optimizer.param_groups[0]["lr"] = PEAK * (warm if step < WARMUP else 0.5 * (1 + math.cos(math.pi * past)))
        batch = data[order[step * BATCH : (step + 1) * BATCH]]
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(DECAY, (1 + step) / (10 + step)))
        losses.append(loss.detach())
        if (step + 1) % LOG_EVERY == 0:
            times.append(time.perf_counter())
    return times, torch.stack(losses).tolist()


def by_loop(width: int, data: Rows, steps: int) -> tuple[list[float], list[float]]:
    """The same of `train`."""
    times = []

    def tick(run: Run) -> None:
        times.append(time.perf_counter())

    size = {"steps": steps, "batch_size": BATCH, "learning_rate": PEAK, "warmup": WARMUP, "clip": CLIP, "ema": DECAY}
    size |= {"weight_decay": WEIGHT_DECAY, "precision": "no", "device": "cpu", "seed": SEED}
    run = train(model_of(width), loss_of, data, callbacks=(tick,), **size)
    return times, [row["loss"] for row in run.history]


def a_step(times: list[float]) -> list[float]:
    """Seconds a step between the times; what comes before the first of them is left out."""
    return [(after - before) / LOG_EVERY for before, after in pairwise(times)]


def width_for(seconds: float, data: Rows) -> int:
    """The smallest width whose step by hand takes at least so long."""
    width = 32
    while statistics.median(a_step(by_hand(width, data, WARMUP + 60)[0])) < seconds:
        width += max(16, width // 8 // 16 * 16)
    return width


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    data, worst = Rows(), 0.0
    print(f"{chosen.threads} threads, {chosen.repeats} runs of each side in turn")
    print(f"{'width':>6} {'by hand':>10} {'the loop':>10} {'more':>8} {'overhead':>9}")
    for target in (1e-3, 3e-3, 10e-3):
        width, steps = width_for(target, data), WARMUP + max(40, round(0.15 / target / LOG_EVERY) * LOG_EVERY)
        sides, seconds = (by_hand, by_loop), {by_hand: [], by_loop: []}
        for repeat in range(chosen.repeats):
            losses = {}
            for side in sides if repeat % 2 else sides[::-1]:
                times, losses[side] = side(width, data, steps)
                seconds[side] += a_step(times)
            torch.testing.assert_close(*map(torch.tensor, losses.values()), rtol=1e-4, atol=1e-5)
        hand, loop = (statistics.median(seconds[side]) for side in sides)
        tqdm.write(
            f"{width:6d} {hand * 1e3:7.2f} ms {loop * 1e3:7.2f} ms {(loop - hand) * 1e6:5.0f} us {loop / hand:9.3f}"
        )
        worst = max(worst, loop / hand)
    print(f"overhead: {worst:.2f}")


if __name__ == "__main__":
    main()
