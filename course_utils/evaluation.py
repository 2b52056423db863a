"""How the course measures: the judge, kernel distance, and the scoreboard that every lesson adds to."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from safetensors import safe_open
from torch import Tensor, nn

from course_utils import pretrained, runtime
from course_utils.data import DATA, Drawings


class StyleNet(nn.Module):
    """Images (B, 3, 64, 64) in [0, 1] to logits of the style (B, 4), from statistics that cannot tell what is drawn.

    Which step between neighbouring pixels follows which (shading, flat colour, the softness of an edge), which colours
    there are (each vendor has a palette), and how full each row and column is (each leaves a margin of its own).
    """

    def __init__(self, width: int = 256, dropout: float = 0.2):
        super().__init__()
        self.register_buffer("edges", torch.tensor([0.5, 1.5, 2.5, 4.5, 8.5, 12.5, 20.5, 40.5, 80.5]) / 255)
        self.layers = nn.Sequential(
            nn.Linear(100 + 128 + 512, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 4),
        )  # fmt: skip

    def statistics(self, images: Tensor) -> Tensor:
        """Roots of the shares of 100 pairs of steps, of ink in 64 rows and 64 columns, and of 512 colours, (B, 740)."""
        images, pairs = images.clamp(0, 1), []
        for dim in (2, 3):
            step = torch.bucketize(images.diff(dim=dim).abs().amax(1), self.edges)  # 0 to 9
            first, second = step.narrow(dim - 1, 0, 62), step.narrow(dim - 1, 1, 62)
            pairs.append((10 * first + second).flatten(1))
        ink = (images.amin(1) < 0.96).float()
        red, green, blue = (images * 7.999).long().flatten(2).unbind(1)
        colours = share(64 * red + 8 * green + blue, 512)
        return torch.cat([share(torch.cat(pairs, dim=1), 100), ink.mean(2), ink.mean(1), colours], dim=1).sqrt()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.statistics(images))


def share(labels: Tensor, count: int) -> Tensor:
    """How often each of `count` labels occurs in each row: (B, N) int64 to (B, count), rows summing to one."""
    empty = torch.zeros(len(labels), count, device=labels.device)
    return empty.scatter_add_(1, labels, torch.ones_like(labels, dtype=empty.dtype)) / labels.shape[1]


class ConceptNet(nn.Module):
    """Images (B, 3, 64, 64) in [0, 1] to logits {"concept": (B, 1563), "category": (B, 9)}.

    EfficientNet-lite0 (Tan and Le, 2019) at 96x96, which `data/build/judge.py` starts from what it learnt on ImageNet.
    The concept's logits are scaled cosines, so that no concept wins by the length of its weight vector.
    """

    def __init__(self):
        super().__init__()
        self.trunk = EfficientNet.from_name("efficientnet-lite0")
        self.trunk._fc = nn.Identity()
        self.embed = nn.Linear(1280, 384)
        self.concept = nn.Parameter(torch.randn(1563, 384) * 0.05)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.category = nn.Linear(1280, 9)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        larger = F.interpolate(images, size=(96, 96), mode="bilinear", align_corners=False)
        pooled = self.trunk.extract_features((255 * larger - 127) / 128).mean((2, 3))
        direction = F.normalize(self.embed(pooled), dim=1)
        concept = self.log_scale.exp() * direction @ F.normalize(self.concept, dim=1).T
        return {"concept": concept, "category": self.category(pooled)}


class Judge(nn.Module):
    """A classifier trained only to judge: what a drawing shows, of which category, in which style.

    Images (B, 3, 64, 64) in [0, 1] to logits {"concept": (B, 1563), "category": (B, 9), "style": (B, 4)}. Style has a
    network of its own: a head on features that know the concept learns in which styles it was seen, and denies the
    one that is held out.
    """

    def __init__(self):
        super().__init__()
        self.what, self.style = ConceptNet(), StyleNet()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.what(images) | {"style": self.style(images)}


@torch.no_grad()
def judge_pictures(
    judge: nn.Module, images: Tensor, wanted: dict[str, Tensor], batch_size: int = 200
) -> dict[str, float]:
    """Share of images (N, 3, 64, 64) in [0, 1] in which the judge sees what is wanted, each in [0, 1].

    `wanted` holds the right concept, category and style, each (N,) int64. Returns concept_top1, concept_top5,
    category and style.
    """
    hits = []
    for rows in torch.arange(len(images)).split(batch_size):
        logits = judge(images[rows])
        best = logits["concept"].topk(5).indices == wanted["concept"][rows, None]
        same = [logits[name].argmax(1) == wanted[name][rows] for name in ("category", "style")]
        hits.append(torch.stack([best[:, 0], best.any(1), *same], 1))
    names = ("concept_top1", "concept_top5", "category", "style")
    return dict(zip(names, torch.cat(hits).float().mean(0).tolist(), strict=True))


def judge_accuracy(judge: nn.Module, drawings: Drawings, batch_size: int = 200) -> dict[str, float]:
    """`judge_pictures` of real drawings: the ceiling for all that are made."""
    batch = drawings[torch.arange(len(drawings))]
    return judge_pictures(judge, batch["image"], batch, batch_size)


def recall(scores: Tensor, right: Tensor, k: int) -> float:
    """Share of the queries with a right answer among their k best (recall@k).

    scores (Q, A), and right (Q, A) bool, in whose rows at least one is True. Raises ValueError for a k below 1 or above
    the number of answers, and for a query without a right answer.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k={k} is not one of 1 to {scores.shape[1]}, the number of answers to choose from.")
    if not right.any(1).all():
        raise ValueError(f"Query {int((~right.any(1)).nonzero()[0])} has no right answer: leave such queries out.")
    return right.gather(1, scores.topk(k, dim=1).indices).any(1).float().mean().item()


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (N, 3, H, W) in [0, 1] against its truth, in dB, (N,)."""
    return -10 * (images.clamp(0, 1) - truth).square().flatten(1).mean(1).log10()


def load_judge(device: str | torch.device = "cpu") -> tuple[Judge, dict[str, Any]]:
    """The trained judge, frozen and in eval mode, and its card with its ceilings on real held-out drawings."""
    judge, card = pretrained.load_checkpoint("judge", Judge(), device)
    return judge.eval().requires_grad_(False), card


@torch.no_grad()
def kid_lite0(real: Tensor, made: Tensor) -> float:
    """Kernel distance between images (N, 3, H, W) and (M, 3, H, W) in [0, 1], in EfficientNet-lite0's features.

    The unbiased estimate of the squared maximum mean discrepancy with the kernel (x.y / 1280 + 1)^3 (Binkowski et al.,
    2018); a little below zero where the sets do not differ. Not comparable with published values, which use Inception.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(real), len(made))
    spread = torch.arange(size) * len(real) // size  # a part's drawings are sorted by what they show
    with warnings.catch_warnings(action="ignore"):  # that it keeps all features in memory
        metric = KernelInceptionDistance(feature=pretrained.load_lite0(), subsets=1, subset_size=size)
    metric.update(real[spread], real=True)
    metric.update(made[:size], real=False)
    return metric.compute()[0].item()


class TextJudge(nn.Module):
    """Reads texts with the frozen SmolLM2: how positive they are, and how likely it finds them.

    Positive or negative is told by a logistic regression on the states of one layer: their mean over the text, and the
    last of them, which has seen all of it. `data/build/sentiment.py` trains it, on reviews that no other model sees.
    """

    LAYER = 22

    def __init__(self) -> None:
        super().__init__()
        self.language_model, self.tokenizer = pretrained.load_llm()
        self.head = nn.Linear(2 * 576, 1)

    @torch.no_grad()
    def read(self, texts: list[str], batch_size: int = 32) -> dict[str, Tensor]:
        """features (N, 1152); nats, by which -log p(text) is meant, (N,); tokens, how many it has, (N,).

        Raises ValueError for an empty list or text.
        """
        if not texts or not all(text.strip() for text in texts):
            raise ValueError("The judge reads a list of texts of at least one word: leave out the empty ones.")
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths: little padding
        device, parts = self.language_model.device, []
        for rows in torch.tensor(order).split(batch_size):
            batch = [self.tokenizer.unk_token + texts[i] for i in rows.tolist()]  # <|endoftext|> opens a document
            tokens = self.tokenizer(batch, padding=True, return_tensors="pt").to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision(device) == "bf16"):
                out = self.language_model(**tokens, output_hidden_states=True)
            real = tokens["attention_mask"][:, 1:].float()
            states, logits = out.hidden_states[self.LAYER][:, 1:].float(), out.logits[:, :-1].float()
            nats = F.cross_entropy(logits.transpose(1, 2), tokens["input_ids"][:, 1:], reduction="none") * real
            length = real.sum(1)
            mean = (states * real[..., None]).sum(1) / length[:, None]
            last = states[torch.arange(len(rows)), length.long() - 1]
            parts.append((torch.cat([mean, last], 1), nats.sum(1), length))
        back = torch.tensor(order).argsort()
        features, nats, length = (torch.cat(part).cpu()[back] for part in zip(*parts, strict=True))
        return {"features": features, "nats": nats, "tokens": length}

    @torch.no_grad()
    def forward(self, texts: list[str]) -> dict[str, Tensor]:
        """positive: the probability that a text is a positive review, (N,); nats and tokens as `read` gives them."""
        found = self.read(texts)
        found["positive"] = self.head(found.pop("features").to(self.head.weight.device)).sigmoid()[:, 0].cpu()
        return found


def load_text_judge() -> tuple[TextJudge, dict[str, Any]]:
    """The judge of sentiment, frozen and in eval mode, and its card with its accuracy on unseen reviews."""
    judge = TextJudge()
    _, card = pretrained.load_checkpoint("sentiment", judge.head)
    return judge.eval().requires_grad_(False), card


def perplexity(nats: Tensor, tokens: Tensor) -> float:
    """exp of the nats per token over all texts, from (N,) each."""
    return (nats.sum() / tokens.sum()).exp().item()


def publish(name: str, tensors: nn.Module | dict[str, Tensor], **card: Any) -> Path:
    """`pretrained.save_checkpoint`, after which `data/scoreboard.json` is made anew from all cards."""
    path = pretrained.save_checkpoint(name, tensors, folder=pretrained.CHECKPOINTS, **card)
    (DATA / "scoreboard.json").write_text(json.dumps(scoreboard_rows(), indent=2) + "\n")
    return path


def scoreboard_rows() -> list[dict[str, Any]]:
    """One row a shipped checkpoint, in the order of the lessons: what it is, what it costs, how well it does."""
    rows = []
    for path in pretrained.CHECKPOINTS.glob("*/card.json"):
        card = json.loads(path.read_text())
        with safe_open(path.parent / "model.safetensors", "pt") as weights:
            parameters = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        facts = {key: card[key] for key in ("name", "lesson")} | {"parameters": parameters}
        rows.append(facts | {key: card[key] for key in ("seconds", "device")} | card["metrics"])
    return sorted(rows, key=lambda row: (row["lesson"], row["name"]))


MEASURES = {  # what the scoreboard shows, and how it heads the column
    "bits_per_dim": "bits/dim",
    "kid_lite0": "KID-lite0",
    "judge_concept_top1": "concept top 1",
    "judge_concept_top5": "top 5",
    "judge_style": "style",
}


def scoreboard() -> pd.DataFrame:
    """The scoreboard as a table, a row a model, the measures that all lessons share; empty where one does not apply."""
    columns: dict[tuple[str, str], list[Any]] = {}
    rows = scoreboard_rows()
    columns["", "lesson"] = [row["lesson"][:2] for row in rows]
    columns["", "parameters"] = [f"{row['parameters'] / 1e6:.2f} M" for row in rows]
    columns["", "minutes"] = [f"{row['seconds'] / 60:.1f}" for row in rows]
    for split in ("pairs", "concepts"):
        for key, head in MEASURES.items():
            values = [row.get(f"{split}/{key}") for row in rows]
            if any(value is not None for value in values):
                columns[f"held-out {split}", head] = ["" if value is None else f"{value:.3f}" for value in values]
    return pd.DataFrame(columns, index=[row["name"] for row in rows])


def with_scoreboard(readme: str) -> str:
    """The text of the README with the scoreboard as it is now, between its two marks.

    Raises ValueError where a mark is missing.
    """
    before, start, rest = readme.partition("<!-- scoreboard -->\n")
    _, end, after = rest.partition("<!-- end of the scoreboard -->")
    if not (start and end):
        raise ValueError('README.md must hold "<!-- scoreboard -->", then "<!-- end of the scoreboard -->".')
    table = scoreboard()
    heads = ["model", *(f"{split.removeprefix('held-out ')} {head}".strip() for split, head in table.columns)]
    rows = [[name, *row] for name, row in zip(table.index, table.values, strict=True)]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return before + start + "".join(f"| {' | '.join(line)} |\n" for line in lines) + end + after
