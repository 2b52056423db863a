"""What the training loop costs over the same steps written by hand in torch.

Both sides train the same model on the same rows in the same order, in turn, in one process: AdamW (fused),
clipping, warm-up and cosine, moving average. By hand means what one writes without this course: no seeding,
no norms kept, no checkpoints, no bar. Their losses must agree. The bar is 1.03 on steps of 1 ms and more.

    python tests/benchmarks/loop_overhead.py [--repeats 9] [--threads 2]
"""

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from course_utils.training import batch_rows, train

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


def by_hand(width: int, data: Rows, steps: int) -> tuple[float, list[float]]:
    """Seconds a step and the losses of a loop without the course."""
    model = model_of(width).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, weight_decay=WEIGHT_DECAY, fused=True)
    average = [parameter.detach().clone() for parameter in parameters]
    order = torch.cat([batch_rows(step, BATCH, ROWS, SEED) for step in range(steps)])
    losses = []
    started = time.perf_counter()
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
    return (time.perf_counter() - started) / steps, torch.stack(losses).tolist()


def by_loop(width: int, data: Rows, steps: int) -> tuple[float, list[float]]:
    """Seconds a step and the losses of `train`; what it does once, before the first step, is left out."""
    size = {
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": PEAK,
        "warmup": WARMUP,
        "clip": CLIP,
        "ema": DECAY,
    }
    size |= {"weight_decay": WEIGHT_DECAY, "precision": "no", "device": "cpu", "seed": SEED}
    run = train(model_of(width), loss_of, data, **size)
    return run.seconds / steps, [row["loss"] for row in run.history]


def width_for(seconds: float, data: Rows) -> int:
    """The smallest width whose step by hand takes at least so long."""
    width = 32
    while min(by_hand(width, data, WARMUP + 10)[0] for _ in range(3)) < seconds:
        width += max(16, width // 8 // 16 * 16)
    return width


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    data, worst = Rows(), 0.0
    print(f"medians of {chosen.repeats} runs; {chosen.threads} threads")
    print(f"{'width':>6} {'by hand':>10} {'the loop':>10} {'more':>8} {'overhead':>9}")
    for target in (1e-3, 3e-3, 10e-3):
        width, steps = width_for(target, data), max(60, round(0.4 / target))
        sides, times = [by_hand, by_loop], {by_hand: [], by_loop: []}
        for repeat in range(chosen.repeats):
            results = {side: side(width, data, steps) for side in (sides if repeat % 2 else sides[::-1])}
            torch.testing.assert_close(*(torch.tensor(results[side][1]) for side in sides), rtol=1e-4, atol=1e-5)
            for side in sides:
                times[side].append(results[side][0])
        hand, loop = (statistics.median(times[side]) for side in sides)
        overhead = statistics.median(ours / bare for bare, ours in zip(*times.values(), strict=True))
        more = (overhead - 1) * hand
        tqdm.write(f"{width:6d} {hand * 1e3:7.2f} ms {loop * 1e3:7.2f} ms {more * 1e6:5.0f} us {overhead:9.3f}")
        worst = max(worst, overhead)
    print(f"overhead: {worst:.2f}")


if __name__ == "__main__":
    main()
