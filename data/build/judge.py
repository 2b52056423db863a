"""Train the judge, the classifier that scores what the course's models draw, and write its checkpoint and card.

    python data/build/judge.py            # on everything that may be learnt from: about 50 minutes on two cores
    python data/build/judge.py --tune     # on the part cut for tuning, measured on validation; writes no checkpoint
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils import runtime
from course_utils.data import augment, drawings
from course_utils.evaluation import Judge, judge_accuracy
from course_utils.training import Run, averaged, train

CONFIG = {"widths": [96, 192, 384], "blocks": [1, 2, 2], "dropout": 0.1}
BATCH = 128


def judge_loss(judge: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy on augmented drawings; the concept is what is hard, so the other two weigh little."""
    logits = judge(augment(batch["image"]))
    concept = F.cross_entropy(logits["concept"], batch["concept"], label_smoothing=0.1)
    rest = sum(F.cross_entropy(logits[name], batch[name]) for name in ("category", "style"))
    return concept + 0.2 * rest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--steps", type=int, default=4500)
    arguments = parser.parse_args()
    part = "fit" if arguments.tune else "train"
    torch.manual_seed(0)
    judge = Judge(**CONFIG).to(memory_format=torch.channels_last)
    held_out = drawings("validation")

    def report(run: Run) -> None:
        if run.step % 200 == 0:
            with averaged(run) as model:
                accuracy = judge_accuracy(model, held_out)
            print(f"step {run.step}", {name: round(value, 4) for name, value in accuracy.items()}, flush=True)

    run = train(
        judge, judge_loss, drawings(part), steps=arguments.steps, batch_size=BATCH, learning_rate=2e-3, weight_decay=0.05,
        warmup=200, folder=runtime.cache_dir("runs") / f"judge-{part}-{arguments.steps}",
        callbacks=(report,) if arguments.tune else (),
    )  # fmt: skip
    print("seconds", run.seconds)


if __name__ == "__main__":
    main()
