"""Lesson 02's VAE in the course's loop, and in pythae's trainer: the seconds to the same bound.

Both train the same encoder and decoder from the same weights on the same drawings, with unit noise (half the squared
error plus the KL, pythae's default), batches of 64, learning rate 1e-3 and as many epochs; in turn, in one run. The
bound is measured by the same code on the validation drawings after each epoch, and the clock stands still meanwhile.
pythae is not among the course's packages:

    pip install pythae==0.1.2 && python tests/benchmarks/vae_vs_pythae.py [--epochs 10] [--threads 2]
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from pythae.models import VAE as PeerVAE
from pythae.models import VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import Tensor, nn

from course_utils import data
from course_utils.models.vae import VAE
from course_utils.training import train

D, WIDTHS, BATCH, RATE = 64, (32, 64, 128), 64, 1e-3


def terms(model: VAE, images: Tensor) -> Tensor:
    """Half the squared error plus the KL, the mean over images."""
    mu, log_sigma = model.posterior(images)
    mean, _ = model.decode(mu + log_sigma.exp() * torch.randn_like(mu))
    kl = 0.5 * (mu.square() + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(1)
    return (0.5 * (mean - images).square().flatten(1).sum(1) + kl).mean()


class PeerEncoder(BaseEncoder):
    def __init__(self, model: VAE):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> ModelOutput:
        mu, log_sigma = self.model.posterior(x)
        return ModelOutput(embedding=mu, log_covariance=2 * log_sigma)


class PeerDecoder(BaseDecoder):
    def __init__(self, model: VAE):
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.model.decode(z)[0])


class Clock:
    """Seconds of training and the bound on the validation drawings after each epoch."""

    def __init__(self, model: VAE):
        self.model, self.curve, self.paused = model, [], 0.0
        self.images = data.drawings("validation")[torch.arange(200)]["image"]
        self.started = time.perf_counter()

    @torch.no_grad()
    def tick(self) -> None:
        now = time.perf_counter()
        torch.manual_seed(0)
        was_training = self.model.training
        bound = terms(self.model.eval(), self.images).item()
        self.model.train(was_training)
        self.curve.append((now - self.started - self.paused, bound))
        self.paused += time.perf_counter() - now


def by_course(model: VAE, epochs: int) -> list[tuple[float, float]]:
    fit = data.drawings("fit")
    epoch, clock = len(fit) // BATCH // 10 * 10, Clock(model)

    def callback(run) -> None:
        if run.step % epoch == 0:
            clock.tick()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return terms(model, batch["image"])

    size = {"steps": epoch * epochs, "batch_size": BATCH, "learning_rate": RATE, "clip": 1e9, "weight_decay": 0.0}
    train(model, loss, fit, warmup=1, callbacks=(callback,), **size)
    return clock.curve


def by_pythae(model: VAE, epochs: int) -> list[tuple[float, float]]:
    images = data.drawings("fit").images.float() / 255
    peer = PeerVAE(VAEConfig(input_dim=(3, 64, 64), latent_dim=D), PeerEncoder(model), PeerDecoder(model))

    class Tick(TrainingCallback):
        def on_train_begin(self, training_config, **kwargs) -> None:
            self.clock = Clock(model)

        def on_epoch_end(self, training_config, **kwargs) -> None:
            self.clock.tick()

    tick = Tick()
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder, num_epochs=epochs, learning_rate=RATE, per_device_train_batch_size=BATCH, no_cuda=True
        )
        dataset = data_of(images)
        BaseTrainer(peer, train_dataset=dataset, training_config=config, callbacks=[tick]).train()
    return tick.clock.curve


def data_of(images: Tensor) -> torch.utils.data.Dataset:
    from pythae.data.datasets import BaseDataset

    return BaseDataset(images, torch.zeros(len(images)))


def seconds_to(curve: list[tuple[float, float]], bound: float) -> float:
    """When the curve first passes the bound, on the line between two epochs."""
    if curve[0][1] <= bound:
        return curve[0][0]
    (t0, high), (t1, low) = next(step for step in pairwise(curve) if step[1][1] <= bound)
    return t0 + (high - bound) / (high - low) * (t1 - t0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    start = VAE(d=D, widths=WIDTHS, likelihood="gaussian").to(memory_format=torch.channels_last)
    sides: dict[str, Callable] = {"pythae": by_pythae, "this course": by_course}
    curves = {name: side(copy.deepcopy(start), chosen.epochs) for name, side in sides.items()}
    for name, curve in curves.items():
        print(f"{name:12s}", ", ".join(f"{seconds:.1f} s: {bound:.1f}" for seconds, bound in curve))
    bound = max(min(value for _, value in curve) for curve in curves.values())
    theirs, ours = (seconds_to(curves[name], bound) for name in sides)
    print(
        f"seconds until half the squared error plus KL is {bound:.1f} nats: pythae {theirs:.1f}, this course {ours:.1f}"
    )
    print(f"ratio: {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
