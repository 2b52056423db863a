"""Lesson 10's training step, and the same step as the public FROMAGe recipe has it: examples per second.

Both see the same drawings and captions, learn the same maps and the same [RET] from the same weights, with the same
three losses: captioning (in every second step two examples in a row), InfoNCE both ways within the batch, and the
cross-entropy of [RET]. The recipe runs the frozen encoder for each of its two modes, reads every caption in both,
computes the logits of the whole vocabulary at every place, in float32, and makes [RET] a row of the table, whose other
rows' gradients are set to zero. The course keeps features, keys and values, reads one word for retrieval, computes the
vocabulary only where something is said, in half precision where the chip has it. Captions are padded to the longest of
a batch (the recipe's default is 24 tokens). Both step with fused AdamW. The losses are compared before the clock
starts: captioning and InfoNCE with the recipe's; [RET] or not, of which the course keeps one number a place, with the
softmax over the whole vocabulary. A third side is the recipe with a table that is frozen. What the course reads once,
before the first step, is printed beside.

    python tests/benchmarks/grounding_vs_recipe.py [--batch 32] [--steps 4] [--rounds 3] [--threads 2]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from course_utils import data, pretrained, runtime
from course_utils.models.adapting import Prompt, Told, features_of
from course_utils.models.fromage import Fromage, Kept, caption_nats, contrastive_loss, ret_nats
from course_utils.models.multimodal import CLIP

START, RATE = 0, 3e-4  # <|endoftext|> opens a document; the recipe's learning rate
Losses = dict[str, Tensor]


class Course:
    """The step of the lesson: what is frozen has been read once."""

    def __init__(self, llm: PreTrainedModel, model: Fromage, clip: CLIP, images: Tensor, ids: list[list[int]]):
        self.llm, self.model = copy.deepcopy(llm), copy.deepcopy(model)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
        self.half = half[runtime.precision(torch.device("cpu"))]
        for weight in self.llm.parameters():
            weight.data = weight.data.to(self.half)
        start = time.perf_counter()
        self.kept = Kept(self.llm, [[START, *row] for row in ids])
        self.features = torch.cat([features_of(clip, some) for some in images.split(100)])
        self.seconds_once = time.perf_counter() - start
        self.prompt = Prompt(self.llm, self.llm.model.embed_tokens.weight[[START]])
        self.told = Told(self.features[:, None], torch.arange(len(ids)), ids, [len(row) for row in ids])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def losses(self, rows: Tensor, join: bool) -> Losses:
        model, kept, count = self.model, self.kept, len(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half == torch.bfloat16):
            caption = caption_nats(self.prompt, model, self.told[rows], join).mean()
            ret = model.ret.to(self.half).expand(count, 1, -1)
            queries = model.ask(kept.read(rows, ret, model.layers)[:, 0])
            none = torch.zeros(count, count, dtype=torch.bool)
            contrast = contrastive_loss(
                queries, model.look(self.features[rows]), torch.arange(count), none, model.scale
            )
            place, due = self.places(rows)
            emission = ret_nats(model.emission(kept.states[place]), kept.nats[place], due)
        return {"caption": caption, "contrast": contrast, "emission": emission}

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The places of texts in what is kept, (P,), and whether [RET] is due there, (P,)."""
        first, length = self.kept.first[rows], self.kept.length[rows]
        place = torch.cat([start + torch.arange(int(count)) for start, count in zip(first, length, strict=True)])
        return place, torch.isin(place, first + length - 1)

    @torch.no_grad()
    def emission_in_full(self, rows: Tensor) -> float:
        """The loss "[RET] or not" from logits of the whole vocabulary and a softmax over them and [RET]'s."""
        place, due = self.places(rows)
        states = self.kept.states[place]
        logits = torch.cat([self.llm.lm_head(states).float(), self.model.emission(states)[:, None]], 1)
        return F.binary_cross_entropy(logits.double().softmax(1)[:, -1], due.double()).item()

    def step(self, rows: Tensor, join: bool) -> None:
        sum(self.losses(rows, join).values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Recipe:
    """The step as the public code's main.py and models.py take it: two modes, each from pixels and the first word on.

    `frozen_table` spares it the gradient of the table, and [RET] then does not learn.
    """

    def __init__(
        self, llm: PreTrainedModel, model: Fromage, clip: CLIP, images: Tensor, ids: list[list[int]],
        frozen_table: bool = False,
    ):  # fmt: skip
        self.llm, self.model, self.clip, self.images = copy.deepcopy(llm), copy.deepcopy(model), clip, images
        table = torch.cat([llm.model.embed_tokens.weight, model.ret.detach()[None]])
        self.table, self.ret = nn.Embedding.from_pretrained(table, freeze=frozen_table), len(table) - 1
        self.llm.model.embed_tokens, self.llm.lm_head.weight = self.table, self.table.weight
        self.llm.vocab_size = self.llm.config.vocab_size = len(table)
        self.length = torch.tensor([len(row) + 1 for row in ids])
        rows = [torch.tensor([*row, self.ret]) for row in ids]
        self.ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        self.norm = llm.model.embed_tokens.weight.norm(dim=1).mean()
        heads = [part for name, part in self.model.named_parameters() if name not in ("row", "write", "bias")]
        self.learnt = [*heads, *(weight for weight in self.table.parameters() if weight.requires_grad)]
        self.optimizer = torch.optim.AdamW(self.learnt, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def captions(self, features: Tensor, ids: Tensor, join: bool) -> Tensor:
        """Cross-entropy of the captions after their soft tokens, in one or two examples a row."""
        soft = self.model.see(features)
        vectors = torch.cat([soft, self.table(ids.clamp(min=0))], 1)
        labels = F.pad(ids.masked_fill(ids == self.ret, -100), (soft.shape[1], 0), value=-100)
        if join:  # what is not said moves to the end, but for the soft tokens
            stays = (labels >= 0) | (torch.arange(labels.shape[1]) < soft.shape[1])
            vectors, labels, stays = (x.unflatten(0, (-1, 2)).flatten(1, 2) for x in (vectors, labels, stays))
            order = (~stays).long().argsort(dim=1, stable=True)
            vectors, labels = vectors.gather(1, order[..., None].expand_as(vectors)), labels.gather(1, order)
        opening = self.table(torch.full((len(vectors), 1), START))
        vectors, labels = torch.cat([opening, vectors], 1), F.pad(labels, (1, 0), value=-100)
        return self.llm(inputs_embeds=vectors, labels=labels, output_hidden_states=True).loss

    def retrieval(self, features: Tensor, ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of captions and [RET], and InfoNCE both ways within the batch."""
        opening = torch.full((len(ids), 1), START)
        vectors = self.table(torch.cat([opening, ids.clamp(min=0)], 1))
        out = self.llm(inputs_embeds=vectors, labels=F.pad(ids, (1, 0), value=-100), output_hidden_states=True)
        states = torch.cat([out.hidden_states[layer] for layer in self.model.layers], -1)
        queries = self.model.ask(states[torch.arange(len(ids)), length])
        logits = self.model.scale * self.model.look(features) @ queries.T
        own = torch.arange(len(ids))
        return out.loss, (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def losses(self, rows: Tensor, join: bool) -> Losses:
        length = self.length[rows]
        ids = self.ids[rows, : int(length.max())]
        caption = self.captions(features_of(self.clip, self.images[rows]), ids, join)
        words, contrast = self.retrieval(features_of(self.clip, self.images[rows]), ids, length)
        return {"caption": caption, "contrast": contrast, "emission": words}

    def step(self, rows: Tensor, join: bool) -> None:
        sum(self.losses(rows, join).values()).backward()
        if self.table.weight.requires_grad:
            self.table.weight.grad[: self.ret] = 0
        nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            row = self.table.weight[self.ret]
            row *= self.norm / row.norm()


def seconds(step: Callable[[Tensor, bool], None], batches: list[Tensor]) -> float:
    """Seconds of a step, every second one with two examples in a row."""
    start = time.perf_counter()
    for i, rows in enumerate(batches):
        step(rows, i % 2 == 1)
    return (time.perf_counter() - start) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="an even number")
    parser.add_argument("--steps", type=int, default=4, help="an even number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    llm, tokenizer = pretrained.load_llm()
    clip, _ = pretrained.load_checkpoint("clip", CLIP())
    clip.eval().requires_grad_(False)
    part = data.drawings("fit")
    part = part.select(torch.randperm(len(part))[: arguments.batch * arguments.steps])
    images = part[torch.arange(len(part))]["image"]
    ids = [tokenizer.encode(f" {text}", add_special_tokens=False) for text in part.captions]
    model = Fromage(dropout=0.0)
    given = (llm, model, clip, images, ids)
    sides = {
        "course": Course(*given),
        "recipe": Recipe(*given),
        "recipe, table frozen": Recipe(*given, frozen_table=True),
    }
    batches = list(torch.arange(len(part)).split(arguments.batch))
    for join in (False, True):
        with torch.no_grad():
            found = {name: side.losses(batches[0], join) for name, side in sides.items()}
        for key in ("caption", "contrast"):
            values = {name: losses[key].item() for name, losses in found.items()}
            print(f"{key}, {'two in a row' if join else 'one by one'}: { {k: round(v, 3) for k, v in values.items()} }")
            assert abs(values["course"] - values["recipe"]) < 0.05 * values["recipe"]
    in_short, in_full = found["course"]["emission"].item(), sides["course"].emission_in_full(batches[0])
    print(f"[RET] or not: {in_short:.3f}, by a softmax over the whole vocabulary {in_full:.3f}")
    assert abs(in_short - in_full) < 0.01 * in_full
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds + 1):
        for name, side in sides.items():
            times[name].append(seconds(side.step, batches))
    rate = {name: arguments.batch / statistics.median(values[1:]) for name, values in times.items()}
    for name, value in rate.items():
        print(f"{name:20} {value:7.1f} examples/s")
    once = sides["course"].seconds_once
    print(f"read once before the first step: {once:.1f} s for {len(part)} examples ({len(part) / once:.0f} a second)")
    print(f"to the recipe with a frozen table: {rate['course'] / rate['recipe, table frozen']:.2f}")
    print(f"ratio: {rate['course'] / rate['recipe']:.2f}")


if __name__ == "__main__":
    main()
