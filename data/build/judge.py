"""Train the judge, the classifier that scores what the course's models draw, and write its checkpoint and card.

    python data/build/judge.py

It learns from the part "fit" and is watched on "validation", so that its recipe was chosen without a look at what is
held out. Three drawings of a concept are few, so it starts from what others have learnt: its eyes from EfficientNet's
on ImageNet, and the vectors that stand for the concepts from where a frozen sentence encoder puts their phrases. About
25 minutes on two cores; killed, it goes on where it was when it is started again.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils import runtime
from course_utils.data import augment, concepts, drawings
from course_utils.evaluation import Judge, judge_accuracy, publish
from course_utils.pretrained import load_lite0, load_minilm
from course_utils.training import Run, averaged, train


def concept_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of concept and, with little weight, category on augmented drawings."""
    logits = model(augment(batch["image"]))
    concept = F.cross_entropy(logits["concept"], batch["concept"], label_smoothing=0.1)
    return concept + 0.2 * F.cross_entropy(logits["category"], batch["category"])


def style_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of style on drawings of which half are blurred, half noisy, half tinted, each by a little.

    A vendor's palette and margin are part of the style, so neither is changed by much. But what a model draws is never
    as clean as the data, and must not be called another style for that.
    """
    images = batch["image"]

    def some(channels: int) -> Tensor:
        """For each drawing 0 with probability one half, else uniform in [0, 1)."""
        return (torch.rand(len(images), 1, 1, 1) < 0.5).to(images) * torch.rand(len(images), channels, 1, 1).to(images)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    changed = images + some(1) * (blurred - images) + 0.02 * (some(3) - some(3))
    changed = changed + 0.02 * some(1) * torch.randn_like(images)
    return F.cross_entropy(model(changed), batch["style"])


def report(judge: Judge) -> Callable[[Run], None]:
    """A callback that prints the accuracy on the validation part every 400 steps."""

    def callback(run: Run) -> None:
        if run.step % 400 == 0:
            with averaged(run):
                accuracy = judge_accuracy(judge.eval(), drawings("validation"))
            print(f"\nstep {run.step}", {name: round(value, 4) for name, value in accuracy.items()}, flush=True)

    return callback


def main() -> None:
    torch.manual_seed(0)
    judge, fit = Judge(), drawings("fit")
    seen = load_lite0().network.state_dict()
    judge.what.trunk.load_state_dict({name: value for name, value in seen.items() if not name.startswith("_fc")})
    judge.to(memory_format=torch.channels_last)
    meanings = load_minilm().encode(concepts()["phrase"].tolist())
    judge.what.concept.data = F.normalize(meanings - meanings.mean(0), dim=1)
    runs = runtime.cache_dir("runs")
    shared = {"learning_rate": 1e-3, "warmup": 200, "weight_decay": 0.05, "callbacks": (report(judge),)}
    what = train(
        judge.what, concept_loss, fit, steps=1_200, batch_size=64, precision="no", folder=runs / "judge-what", **shared
    )
    style = train(judge.style, style_loss, fit, steps=2_500, batch_size=128, folder=runs / "judge-style", **shared)
    averages = {"what": what.ema, "style": style.ema}
    learnt = {f"{part}.{name}": value for part, ema in averages.items() for name, value in ema.items()}
    judge.load_state_dict(judge.state_dict() | learnt)
    judge.eval()
    metrics = {}
    for split, measures in (
        ("pairs", ("concept_top1", "concept_top5", "category", "style")),
        ("concepts", ("category", "style")),
    ):
        accuracy = judge_accuracy(judge, drawings(split))
        metrics |= {f"{split}/judge_{measure}": accuracy[measure] for measure in measures}
    publish(
        "judge", judge, lesson="00_start_here", config={}, steps=what.step + style.step,
        seconds=what.seconds + style.seconds, device=runtime.device(), seed=0, metrics=metrics,
    )  # fmt: skip
    print(metrics)


if __name__ == "__main__":
    main()
