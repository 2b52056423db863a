"""How the course measures: the judge, kernel distance, and the scoreboard that every lesson adds to."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.data import Drawings


class ResidualBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), (B, D, H, W) to the same shape."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.dropout = nn.Dropout2d(dropout)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Judge(nn.Module):
    """A classifier trained only to judge: what a drawing shows, of which category, in which style.

    Images (B, 3, 64, 64) in [0, 1] to logits {"concept": (B, 1563), "category": (B, 9), "style": (B, 4)}. Four by four
    pixels become one position, then residual stages work at 16x16, 8x8 and 4x4 (He et al., 2016). The concept's logits
    are scaled cosines, so that no concept wins by the length of its weight vector.
    """

    def __init__(self, widths: tuple[int, ...] = (96, 192, 384), blocks: tuple[int, ...] = (1, 2, 2), dropout: float = 0.1):
        super().__init__()
        stages = [nn.PixelUnshuffle(4), nn.Conv2d(48, widths[0], 3, padding=1)]
        for before, width, count in zip((None, *widths), widths, blocks, strict=False):
            if before:
                stages += [nn.GroupNorm(8, before), nn.Conv2d(before, width, 2, stride=2)]
            stages += [ResidualBlock(width, dropout) for _ in range(count)]
        self.trunk = nn.Sequential(*stages, nn.GroupNorm(8, widths[-1]), nn.SiLU())
        self.embed = nn.Linear(widths[-1] * 2, 384)
        self.concept = nn.Parameter(torch.randn(1563, 384) * 0.05)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.category = nn.Linear(widths[-1] * 2, 9)
        self.style = nn.Linear(widths[-1] * 2, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.trunk((images - 0.5) * 4)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        direction = F.normalize(self.embed(pooled), dim=1)
        concept = self.log_scale.exp() * direction @ F.normalize(self.concept, dim=1).T
        return {"concept": concept, "category": self.category(pooled), "style": self.style(pooled)}


@torch.no_grad()
def judge_accuracy(judge: nn.Module, drawings: Drawings, batch_size: int = 200) -> dict[str, float]:
    """Share of drawings the judge names rightly: concept_top1, concept_top5, category, style, each in [0, 1]."""
    hits = []
    for rows in torch.arange(len(drawings)).split(batch_size):
        batch = drawings[rows]
        logits = judge(batch["image"])
        best = logits["concept"].topk(5).indices == batch["concept"][:, None]
        same = [logits[name].argmax(1) == batch[name] for name in ("category", "style")]
        hits.append(torch.stack([best[:, 0], best.any(1), *same], 1))
    return dict(zip(("concept_top1", "concept_top5", "category", "style"), torch.cat(hits).float().mean(0).tolist()))
