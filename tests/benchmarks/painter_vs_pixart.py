"""Lesson 08's painter, beside diffusers' PixArt transformer with the same sizes: eight drawings in twenty steps.

Both are diffusion transformers that look at the words of a caption: width 256, 8 blocks, 4 heads, tokens of 2 x 2 cells
of 16 x 8 x 8 latents, captions of 12 tokens of 384 numbers; both walk by Euler with guidance, two passes in one batch,
in turn in one run, in the number format in which the lesson draws where the chip has it. The weights are random, which
the time does not depend on. Ours also decodes its latents to drawings; the peer has no decoder.

    python tests/benchmarks/painter_vs_pixart.py [--batch 8] [--steps 20] [--rounds 5] [--threads 2] [--dtype float32]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import PixArtTransformer2DModel
from transformers.utils import logging

from course_utils.models.text_to_image import Autoencoder, Painter, euler

WORDS, STATES = 12, 384


class Peer(torch.nn.Module):
    """PixArt's transformer with the arguments of ours; its captions' mask is that of their states."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 8, "cross_attention_dim": 256}
        cells = {"in_channels": 16, "out_channels": 16, "sample_size": 8, "patch_size": 2}
        self.model = PixArtTransformer2DModel(
            **sizes, **cells, caption_channels=STATES, use_additional_conditions=False
        )

    def forward(self, z: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        kind = next(self.parameters()).dtype
        said = self.model(
            z.to(kind), states.to(kind), 1000 * t, encoder_attention_mask=(states != 0).any(2).to(kind),
            added_cond_kwargs={}, return_dict=False,
        )[0]  # fmt: skip
        return said.float()


def seconds(work: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> float:
    start = time.perf_counter()
    assert work().shape == shape
    return time.perf_counter() - start


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    dtype = getattr(torch, asked.dtype)
    painter, peer = (torch.nn.Module.to(model.eval(), dtype) for model in (Painter(), Peer()))
    autoencoder = Autoencoder().eval()
    states, noise = torch.randn(asked.batch, WORDS, STATES), torch.randn(asked.batch, 16, 8, 8)
    times = torch.linspace(1, 0, asked.steps + 1)

    @torch.no_grad()
    def by_course() -> torch.Tensor:
        *_, z = euler(painter, noise, times, 4.0, states=states)
        return autoencoder.decode(z, states)

    @torch.no_grad()
    def by_peer() -> torch.Tensor:
        *_, z = euler(peer, noise, times, 4.0, states=states)
        return z

    sides = {"course": (by_course, (asked.batch, 3, 64, 64)), "diffusers": (by_peer, noise.shape)}
    turns = [{name: seconds(*side) for name, side in sides.items()} for _ in range(asked.rounds + 1)][1:]
    median = {name: statistics.median(turn[name] for turn in turns) for name in sides}
    for name, model in (("course", painter), ("diffusers", peer)):
        print(f"{name:10} {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters {median[name]:6.2f} s")
    print(f"ratio: {median['diffusers'] / median['course']:.2f}")
