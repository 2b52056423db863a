"""Lesson 06's sampling with its cache, beside `generate` of a GPT-2 from transformers with the same sizes.

Both read a caption of 25 integers and write 64 more for each of a batch, at temperature 1, without dropout, in turn in
one run, in the number format in which the lesson writes where the chip has it. The peer has one vocabulary for both, as
many integers as ours has for drawings.

    python tests/benchmarks/sampling_vs_transformers.py [--batch 32] [--rounds 5] [--threads 2] [--dtype float32]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from course_utils.models.dalle import DALLE, PLACES, write

CODES, D, DEPTH, HEADS = 2048, 256, 6, 4


def seconds(work: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    drawn = work()
    assert drawn.shape[1] == 64
    return time.perf_counter() - start


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    dtype = getattr(torch, asked.dtype)
    ours = DALLE(2048, CODES, PLACES, D, DEPTH, HEADS).eval().to(dtype)
    sizes = {"vocab_size": CODES, "n_positions": 1 + PLACES + 64, "n_embd": D, "n_layer": DEPTH, "n_head": HEADS}
    peer = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval().to(dtype)
    text = torch.randint(1, 2048, (asked.batch, PLACES))
    prompt = torch.cat([text[:, :1], text], 1)
    length = {"min_new_tokens": 64, "max_new_tokens": 64, "pad_token_id": 0}

    def by_course() -> torch.Tensor:
        *_, ids = write(ours, text)
        return ids

    def by_peer() -> torch.Tensor:
        with torch.inference_mode():
            out = peer.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, use_cache=True, **length
            )
        return out[:, prompt.shape[1] :]

    sides = {"course": by_course, "transformers": by_peer}
    turns = [{name: seconds(side) for name, side in sides.items()} for _ in range(asked.rounds + 1)][1:]
    rate = {name: asked.batch * 64 / statistics.median(turn[name] for turn in turns) for name in sides}
    for name, value in rate.items():
        print(f"{name:13} {value:7.0f} visual tokens/s")
    print(f"ratio: {rate['course'] / rate['transformers']:.2f}")
