"""Lesson 05's VQ layer beside that of vector-quantize-pytorch: one codebook, the same vectors, in one run.

Each turn gives both layers a batch of 64 drawings (4,096 vectors of 16 numbers), forwards and backwards, in training
with moving means, and in eval mode. Codes that have lost their members are left alone, for each side starts them anew
by a rule of its own. The results are compared before the clock starts.

    python tests/benchmarks/vq_vs_library.py [--codes 2048] [--turns 40] [--threads 2]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from course_utils.models.visual_tokens import VectorQuantiser


def pair(codes: int) -> tuple[VectorQuantiser, VectorQuantize]:
    """Both layers with the same codebook and moving means."""
    ours = VectorQuantiser(codes, restart=False)
    library = VectorQuantize(16, codes, decay=ours.means.decay, commitment_weight=0.25, eps=1e-9, rotation_trick=False)
    library._codebook.embed.copy_(ours.means.codebook)
    library._codebook.embed_avg.copy_(ours.means.total)
    return ours, library


def training_step(layer: nn.Module, h: Tensor) -> Tensor:
    z, _, cost = layer.train()(h)
    (gradient,) = torch.autograd.grad(z.square().mean() + cost, h)
    return gradient


@torch.no_grad()
def look_up(layer: nn.Module, h: Tensor) -> Tensor:
    return layer.eval()(h)[0]


def seconds(work: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, h: Tensor) -> float:
    start = time.perf_counter()
    work(layer, h)
    return time.perf_counter() - start


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--codes", type=int, default=2048)
    options.add_argument("--turns", type=int, default=40)
    options.add_argument("--threads", type=int, default=2)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    layers, h = pair(asked.codes), torch.randn(64, 64, 16, requires_grad=True)
    torch.testing.assert_close(look_up(layers[0], h), look_up(layers[1], h), atol=1e-6, rtol=0)
    ratios = {}
    for work in (look_up, training_step):
        turns = [[seconds(work, layer, h) for layer in layers] for _ in range(asked.turns + 3)][3:]
        ours, library = (1000 * statistics.median(side) for side in zip(*turns, strict=True))
        ratios[work.__name__] = library / ours
        print(f"{work.__name__:13} ours {ours:6.2f} ms, library {library:6.2f} ms: {library / ours:.2f} times as fast")
    print(f"ratio: {min(ratios.values()):.2f}")
