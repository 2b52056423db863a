"""Lesson 04's CLIP in the course's loop, and the same tower in a plain float32 loop: drawings per second.

Both train the same towers from the same weights with the same loss on the same augmented drawings, in batches of 256;
in turn, several times, in one run. The plain loop is what one writes first: a DataLoader over the drawings, float32,
PyTorch's default memory layout and optimizer. It has the words' features in memory as the course has; a third side
reads the words with MiniLM at each step, so that one sees what the cache is worth. Then the share of the machine's own
rate of matrix products, measured in bfloat16, at which the course's loop works.

    python tests/benchmarks/clip_vs_fp32.py [--steps 10] [--rounds 3] [--threads 2]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from course_utils import data, pretrained, runtime
from course_utils.models.multimodal import CLIP, ImageTower, clip_loss
from course_utils.training import Run, train

BATCH, RATE = 256, 2e-3


def objective(model: CLIP, batch: dict[str, Tensor], words: Tensor) -> Tensor:
    same = batch["concept"][:, None] == batch["concept"]
    drawings = model.encode_image(data.augment(batch["image"]))
    return clip_loss(model.logits(drawings, model.encode_text(words)), same)


class PlainTower(ImageTower):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.middle(2 * images - 1)
        return middle, self.last(middle)


class Clock:
    """A callback that keeps the seconds after each ten steps."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def __call__(self, run: Run) -> None:
        self.marks.append(time.perf_counter())


def course(model: CLIP, features: Tensor, steps: int) -> float:
    """Seconds per step in the course's loop, the first ten steps left out."""
    clock = Clock()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return objective(model, batch, features[batch["concept"]])

    train(
        model, loss, data.drawings("train"), steps=10 + steps, batch_size=BATCH, learning_rate=RATE, callbacks=(clock,)
    )
    return (clock.marks[-1] - clock.marks[0]) / steps


def plain(model: CLIP, words_of: Callable[[Tensor], Tensor], steps: int) -> float:
    """Seconds per step in a plain float32 loop, the first two steps left out."""
    model.train().to(memory_format=torch.contiguous_format)
    model.eyes.__class__ = PlainTower
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            yield from DataLoader(data.drawings("train"), BATCH, shuffle=True, drop_last=True)

    for step, batch in enumerate(batches()):
        if step == 2:
            started = time.perf_counter()
        if step == 2 + steps:
            return (time.perf_counter() - started) / steps
        loss = objective(model, batch, words_of(batch["concept"]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
    raise AssertionError("the loop above never ends by itself")


def matrix_rate(size: int = 2048, rounds: int = 20) -> float:
    """Operations per second of a bfloat16 matrix product, the best of several."""
    a, seconds = torch.randn(size, size).bfloat16(), []
    for _ in range(rounds):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def operations(model: CLIP, features: Tensor) -> int:
    """Floating point operations of one step's forward and backward pass."""
    batch = data.drawings("train")[torch.arange(BATCH)]
    with FlopCounterMode(display=False) as counter:
        objective(model, batch, features[batch["concept"]]).backward()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="a multiple of ten")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    phrases = data.concepts()["phrase"].tolist()
    minilm = pretrained.load_minilm()
    features = pretrained.cached_features(minilm, phrases)
    torch.manual_seed(0)
    model = CLIP()
    sides = {
        "course": lambda twin: course(twin, features, arguments.steps),
        "plain": lambda twin: plain(twin, lambda concept: features[concept], arguments.steps),
        "plain, words read": lambda twin: plain(
            twin, lambda concept: minilm.encode([phrases[i] for i in concept.tolist()]), arguments.steps
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            seconds[name].append(side(copy.deepcopy(model)))
    step = {name: statistics.median(times) for name, times in seconds.items()}
    for name, value in step.items():
        print(f"{name:20} {BATCH / value:7.0f} drawings/s")
    rate, work = matrix_rate(), operations(copy.deepcopy(model), features)
    print(f"precision {runtime.precision(torch.device('cpu'))}; one step is {work / 1e9:.0f} GFLOP")
    share = work / step["course"] / rate
    print(f"{share * rate / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s, {share:.0%} of the machine's matrix rate")
    print(f"to the plain loop that reads the words at each step: {step['plain, words read'] / step['course']:.2f}")
    print(f"ratio: {step['plain'] / step['course']:.2f}")


if __name__ == "__main__":
    main()
