"""Homework 2: the cases of each question, its typical mistakes (the docstring is the hint), other right answers."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from homework_source import Book
from torch import Tensor, nn

BOOK = Book()
Cases = Iterator[tuple[str, dict]]

# ---------------------------------------------------------------------------------------- 1 residual_quantise


@BOOK.question(1, ("ids", "z"), probe="with_gradients")
def residual_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 1)
    for title, N, M, K, d in (
        ("two codebooks of four", 6, 2, 4, 3),
        ("three codebooks of five", 5, 3, 5, 2),
        ("one codebook", 4, 1, 6, 3),
        ("as many vectors as codebooks", 3, 3, 4, 2),
    ):
        codebooks = torch.randn(M, K, d, generator=g) / torch.arange(1, M + 1)[:, None, None]
        codebooks[:, 0] *= 4  # a long code, which wins every inner product that it may
        yield title, {"h": 1.5 * torch.randn(N, d, generator=g), "codebooks": codebooks}


def stages(h: Tensor, codebooks: Tensor, sign: float = 1.0, follow: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """ids (N, M), the sum of the codes (N, d), and the last code (N, d)."""
    rest, ids, total, code = h.detach(), [], torch.zeros_like(h), torch.zeros_like(h)
    for codebook in codebooks:
        choice = torch.cdist(rest, codebook.detach()).argmin(1)
        code = codebook[choice]
        rest = rest - sign * code.detach() if follow else rest
        ids.append(choice)
        total = total + code
    return torch.stack(ids, 1), total, code


def through(h: Tensor, z: Tensor) -> Tensor:
    return h + (z - h).detach()


@BOOK.wrong(1)
def _(h, codebooks):
    """every codebook quantises h itself: from the second on they quantise what is left of it."""
    ids, z, _ = stages(h, codebooks, follow=False)
    return ids, through(h, z)


@BOOK.wrong(1)
def _(h, codebooks):
    """z is the code of the last codebook alone: add up the codes of all."""
    ids, _, z = stages(h, codebooks)
    return ids, through(h, z)


@BOOK.wrong(1)
def _(h, codebooks):
    """no gradient reaches h: pass it straight through, h + (z - h).detach()."""
    ids, z, _ = stages(h, codebooks)
    return ids, z


@BOOK.wrong(1)
def _(h, codebooks):
    """z is detached as a whole, so nothing gets a gradient: detach only the step from h to z."""
    ids, z, _ = stages(h, codebooks)
    return ids, z.detach()


@BOOK.wrong(1)
def _(h, codebooks):
    """the gradient reaches the codebooks too: detach z - h as a whole."""
    ids, z, _ = stages(h, codebooks)
    return ids, h - h.detach() + z


@BOOK.wrong(1)
def _(h, codebooks):
    """the code with the largest inner product is taken: the nearest has the smallest distance."""
    rest, ids = h.detach(), []
    for codebook in codebooks.detach():
        ids.append((rest @ codebook.T).argmax(1))
        rest = rest - codebook[ids[-1]]
    return torch.stack(ids, 1), through(h, h.detach() - rest)


@BOOK.wrong(1)
def _(h, codebooks):
    """a code is added to what is left: subtract it."""
    ids, z, _ = stages(h, codebooks, sign=-1.0)
    return ids, through(h, z)


@BOOK.wrong(1)
def _(h, codebooks):
    """ids are (M, N): a row is a vector, a column a codebook."""
    ids, z, _ = stages(h, codebooks)
    return ids.T, through(h, z)


@BOOK.wrong(1)
def _(h, codebooks):
    """z is what is left after all codebooks: return the sum of the codes."""
    ids, z, _ = stages(h, codebooks)
    return ids, through(h, h - z)


@BOOK.wrong(1)
def _(h, codebooks):
    """the farthest code is taken: argmin, not argmax, of the distance."""
    rest, ids = h.detach(), []
    for codebook in codebooks.detach():
        ids.append(torch.cdist(rest, codebook).argmax(1))
        rest = rest - codebook[ids[-1]]
    return torch.stack(ids, 1), through(h, h.detach() - rest)


@BOOK.right(1)
def _(h, codebooks):
    with torch.no_grad():
        rest, ids = h.clone(), torch.empty(len(h), len(codebooks), dtype=torch.int64)
        for m, e in enumerate(codebooks):
            ids[:, m] = (e.square().sum(1) - 2 * rest @ e.T).argmin(1)
            rest -= e[ids[:, m]]
    return ids, h - rest


@BOOK.right(1)
def _(h, codebooks):
    total, ids = torch.zeros_like(h), []
    for e in codebooks.detach().unbind():
        away = (h.detach() - total)[:, None] - e
        ids.append(away.square().sum(-1).min(1).indices)
        total = total + F.one_hot(ids[-1], len(e)).float() @ e
    return torch.stack(ids, -1), total + h - h.detach()


# ---------------------------------------------------------------------------------------- 2 perplexity


@BOOK.question(2, ("used",))
def perplexity_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 2)
    for title, N, M, K in (("three stages of five codes", 40, 3, 5), ("codes that are never used", 12, 2, 30)):
        yield title, {"ids": (K * torch.rand(N, M, generator=g).square()).long(), "codes": K}
    yield "one code has collapsed", {"ids": torch.full((7, 2), int(torch.randint(4, (), generator=g))), "codes": 4}


def frequencies(ids: Tensor, codes: int) -> Tensor:
    return F.one_hot(ids, codes).float().mean(0)


@BOOK.wrong(2)
def _(ids, codes):
    """this is the entropy: take its exponential."""
    p = frequencies(ids, codes)
    return -torch.xlogy(p, p).sum(1)


@BOOK.wrong(2)
def _(ids, codes):
    """the entropy is in nats, but 2 is raised to it: use exp."""
    p = frequencies(ids, codes)
    return 2 ** -torch.xlogy(p, p).sum(1)


@BOOK.wrong(2)
def _(ids, codes):
    """this counts the codes that occur at all: weigh them by how often they do."""
    return (frequencies(ids, codes) > 0).float().sum(1)


@BOOK.wrong(2)
def _(ids, codes):
    """all stages are thrown together: each has a codebook, and a perplexity, of its own."""
    p = frequencies(ids, codes).mean(0)
    return (-torch.xlogy(p, p).sum()).exp().expand(ids.shape[1])


@BOOK.wrong(2)
def _(ids, codes):
    """the perplexity is divided by the number of codes."""
    p = frequencies(ids, codes)
    return (-torch.xlogy(p, p).sum(1)).exp() / codes


@BOOK.wrong(2)
def _(ids, codes):
    """this is 1 / sum p^2: the perplexity is the exponential of the entropy."""
    return 1 / frequencies(ids, codes).square().sum(1)


@BOOK.wrong(2)
def _(ids, codes):
    """a code that is never used gives 0 log 0 = NaN: it counts as 0 (torch.xlogy)."""
    p = frequencies(ids, codes)
    return (-(p * p.log()).sum(1)).exp()


@BOOK.wrong(2)
def _(ids, codes):
    """the sign of the entropy is wrong: it is -sum p log p."""
    p = frequencies(ids, codes)
    return torch.xlogy(p, p).sum(1).exp()


@BOOK.right(2)
def _(ids, codes):
    counts = torch.stack([torch.bincount(column, minlength=codes) for column in ids.T])
    return torch.distributions.Categorical(probs=counts / len(ids)).entropy().exp()


@BOOK.right(2)
def _(ids, codes):
    found = []
    for column in ids.T:
        p = column.unique(return_counts=True)[1] / len(column)
        found.append(math.exp(-(p * p.log()).sum()))
    return torch.tensor(found)


# ---------------------------------------------------------------------------------------- 3 typical


@BOOK.question(3, ("p",))
def typical_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 3)
    for title, B, K, mass in (
        ("four rows of eight, mass 0.6", 4, 8, 0.6),
        ("mass 0.2 of twelve", 5, 12, 0.2),
        ("mass 0.9 of twelve", 5, 12, 0.9),
        ("so little mass that one is left", 3, 6, 0.001),
    ):
        yield title, {"logits": 2 * torch.randn(B, K, generator=g), "mass": mass}


def kept(p: Tensor, score: Tensor, mass: float, crossing: bool = True) -> Tensor:
    """Those of lowest score, up to the mass, renormalised."""
    order = score.argsort(-1)
    ordered = p.gather(-1, order)
    sums = ordered.cumsum(-1)
    keep = (sums - ordered < mass) if crossing else (sums <= mass)
    p = p * torch.zeros_like(keep).scatter(-1, order, keep)
    return p / p.sum(-1, keepdim=True)


def surprise(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, -log p (B, K) and the entropy (B, 1)."""
    log_p = logits.log_softmax(-1)
    return log_p.exp(), -log_p, -(log_p.exp() * log_p).sum(-1, keepdim=True)


@BOOK.wrong(3)
def _(logits, mass):
    """this is top-p: the most probable are kept, not the most typical."""
    p, s, _ = surprise(logits)
    return kept(p, s, mass)


@BOOK.wrong(3)
def _(logits, mass):
    """what is kept does not sum to 1: divide by its sum."""
    p, s, H = surprise(logits)
    return p * (kept(p, (s - H).abs(), mass) > 0)


@BOOK.wrong(3)
def _(logits, mass):
    """the one that reaches the mass is left out: keep it, or nothing may be left."""
    p, s, H = surprise(logits)
    return kept(p, (s - H).abs(), mass, crossing=False)


@BOOK.wrong(3)
def _(logits, mass):
    """the distance from the entropy has lost its absolute value."""
    p, s, H = surprise(logits)
    return kept(p, H - s, mass)


@BOOK.wrong(3)
def _(logits, mass):
    """the entropy is in bits and the surprise in nats."""
    p, s, H = surprise(logits)
    return kept(p, (s - H / math.log(2)).abs(), mass)


@BOOK.wrong(3)
def _(logits, mass):
    """the least typical are kept: sort the distances upwards."""
    p, s, H = surprise(logits)
    return kept(p, -(s - H).abs(), mass)


@BOOK.wrong(3)
def _(logits, mass):
    """the entropy is that of the whole batch: every row has its own."""
    p, s, H = surprise(logits)
    return kept(p, (s - H.mean()).abs(), mass)


@BOOK.wrong(3)
def _(logits, mass):
    """what is kept is passed through a softmax once more: divide it by its sum."""
    p, s, H = surprise(logits)
    keep = kept(p, (s - H).abs(), mass) > 0
    return p.masked_fill(~keep, -torch.inf).softmax(-1)


@BOOK.right(3)
def _(logits, mass):
    p, s, H = surprise(logits)
    made = torch.zeros_like(p)
    for b in range(len(p)):
        total = 0.0
        for k in (s[b] - H[b]).abs().argsort().tolist():
            made[b, k] = p[b, k]
            total += p[b, k].item()
            if total >= mass:
                break
    return made / made.sum(1, keepdim=True)


@BOOK.right(3)
def _(logits, mass):
    d = torch.distributions.Categorical(logits=logits)
    _, order = (d.entropy()[:, None] + d.logits).square().sort(-1)
    before = F.pad(d.probs.gather(-1, order).cumsum(-1)[:, :-1], (1, 0))
    out = before >= mass
    return logits.masked_fill(torch.empty_like(out).scatter_(-1, order, out), -torch.inf).softmax(-1)


# ---------------------------------------------------------------------------------------- 4 masked_counts


@BOOK.question(4, ("left",))
def counts_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 4)
    for steps in (8, 5, 1, 11):
        n = int(torch.randint(30, 400, (), generator=g))
        yield f"{n} cells in {steps} step{'s' * (steps > 1)}", {"n": n, "steps": steps}


def share_left(n: int, steps: int) -> Tensor:
    return n * torch.cos(0.5 * math.pi * torch.arange(1, steps + 1, dtype=torch.float64) / steps)


@BOOK.wrong(4)
def _(n, steps):
    """the count falls in a straight line: it follows a cosine."""
    return (n * (1 - torch.arange(1, steps + 1) / steps)).round().long()


@BOOK.wrong(4)
def _(n, steps):
    """the count before every step is given, which starts at n: give that after it, which ends at 0."""
    return (n * torch.cos(0.5 * math.pi * torch.arange(steps, dtype=torch.float64) / steps)).round().long()


@BOOK.wrong(4)
def _(n, steps):
    """these are the cells that are no longer masked: return those that still are."""
    return n - share_left(n, steps).round().long()


@BOOK.wrong(4)
def _(n, steps):
    """the count is not int64: round it and convert."""
    return share_left(n, steps).round().float()


@BOOK.wrong(4)
def _(n, steps):
    """the count is rounded down: round to the nearest."""
    return share_left(n, steps).floor().long()


@BOOK.wrong(4)
def _(n, steps):
    """the cosine is squared, as in the noise schedules of diffusion: here it is not."""
    return (share_left(n, steps).square() / n).round().long()


@BOOK.wrong(4)
def _(n, steps):
    """the angle runs to pi: it must end at pi / 2, where the cosine is 0."""
    return (n * torch.cos(math.pi * torch.arange(1, steps + 1, dtype=torch.float64) / steps)).round().long()


@BOOK.wrong(4)
def _(n, steps):
    """these are the cells that each step uncovers: return how many are still masked after it."""
    left = share_left(n, steps).round().long()
    return torch.cat([torch.tensor([n]), left[:-1]]) - left


@BOOK.right(4)
def _(n, steps):
    return torch.tensor([round(n * math.cos(math.pi * t / (2 * steps))) for t in range(1, steps + 1)])


@BOOK.right(4)
def _(n, steps):
    angle = torch.linspace(0, math.pi / 2, steps + 1, dtype=torch.float64)[1:]
    return (n * angle.cos() + 0.5).floor().to(torch.int64)


# ---------------------------------------------------------------------------------------- 5 uncover


@BOOK.question(5, ("ids",))
def uncover_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 5)
    for title, B, n, K, masked, left in (
        ("half of the cells are masked", 4, 8, 5, 4, 2),
        ("nothing is known yet", 3, 9, 6, 9, 6),
        ("the last step", 3, 6, 4, 3, 0),
        ("nothing may be uncovered", 2, 6, 4, 4, 4),
    ):
        ids = torch.randint(K, (B, n), generator=g)
        ids.scatter_(1, torch.rand(B, n, generator=g).argsort(1)[:, :masked], K)
        logits = 2 * torch.randn(B, n, K, generator=g) + 3 * torch.randn(B, n, 1, generator=g)
        noise = -torch.rand(B, n, generator=g).log().neg().log()  # Gumbel's
        yield title, {"logits": logits, "chosen": torch.randint(K, (B, n), generator=g), "ids": ids, "noise": noise,
                      "left": left}  # fmt: skip


def confidence(logits: Tensor, chosen: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]


def uncovered(score: Tensor, chosen: Tensor, ids: Tensor, left: int, codes: int, known: bool = True) -> Tensor:
    """All masked cells but the `left` of lowest score get what was chosen."""
    masked = ids == codes
    score = score.masked_fill(~masked, torch.inf) if known else score
    waits = torch.zeros_like(masked).scatter(1, score.argsort(1)[:, :left], True)
    return torch.where(masked & ~waits, chosen, ids)


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """known cells compete for the places of the masked ones: only masked cells may stay masked."""
    return uncovered(confidence(logits, chosen) + noise, chosen, ids, left, logits.shape[-1], known=False)


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """known cells are overwritten: they stay as they are."""
    made = uncovered(confidence(logits, chosen) + noise, chosen, ids, left, logits.shape[-1])
    return torch.where(made == logits.shape[-1], made, chosen)


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """the most confident cells stay masked: it is the least confident that wait."""
    score = (-confidence(logits, chosen) - noise).masked_fill(ids != logits.shape[-1], torch.inf)
    return uncovered(score, chosen, ids, left, logits.shape[-1])


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """confidence is the logit, which means nothing from cell to cell: take log probabilities."""
    score = logits.gather(-1, chosen[..., None])[..., 0] + noise
    return uncovered(score, chosen, ids, left, logits.shape[-1])


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """the noise is not added to the confidence."""
    return uncovered(confidence(logits, chosen), chosen, ids, left, logits.shape[-1])


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """confidence is the probability of the likeliest code: take that of the code that was chosen."""
    return uncovered(logits.log_softmax(-1).amax(-1) + noise, chosen, ids, left, logits.shape[-1])


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """`left` cells are uncovered: `left` is how many stay masked."""
    masked = (ids == logits.shape[-1]).sum(1)[0].item()
    return uncovered(confidence(logits, chosen) + noise, chosen, ids, masked - left, logits.shape[-1])


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """cells get their likeliest code: they must get the code that was chosen."""
    return uncovered(confidence(logits, chosen) + noise, logits.argmax(-1), ids, left, logits.shape[-1])


@BOOK.wrong(5)
def _(logits, chosen, ids, noise, left):
    """the noise is added to the probability: add it to its logarithm."""
    return uncovered(confidence(logits, chosen).exp() + noise, chosen, ids, left, logits.shape[-1])


@BOOK.right(5)
def _(logits, chosen, ids, noise, left):
    made, K = ids.clone(), logits.shape[-1]
    for b in range(len(ids)):
        cells = (ids[b] == K).nonzero()[:, 0]
        log_p = logits[b, cells].log_softmax(-1)[torch.arange(len(cells)), chosen[b, cells]]
        sure = cells[(log_p + noise[b, cells]).argsort(descending=True)][: len(cells) - left]
        made[b, sure] = chosen[b, sure]
    return made


@BOOK.right(5)
def _(logits, chosen, ids, noise, left):
    B, n, K = logits.shape
    score = noise - F.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none").view(B, n)
    filled = torch.where(ids == K, chosen, ids)
    score = torch.where(ids == K, score, torch.full_like(score, torch.inf))
    return filled.scatter(1, score.topk(left, largest=False).indices, K)


# ---------------------------------------------------------------------------------------- 6 masked_loss


@BOOK.question(6, ("loss",), probe="reader")
def masked_loss_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 6)
    for title, B, n, K, shares in (
        ("four drawings, masked by 20 to 90 %", 4, 10, 5, (0.2, 0.9)),
        ("all is masked", 2, 6, 4, (1.0, 1.0)),
        ("so little that one cell is masked", 3, 8, 4, (0.01, 0.02)),
        ("shares that round up", 3, 7, 5, (0.3, 0.35)),
    ):
        vectors, out = 0.7 * torch.randn(K + 1, 6, generator=g), torch.randn(K, 6, generator=g)
        share = shares[0] + (shares[1] - shares[0]) * torch.rand(B, generator=g)
        yield title, {"vectors": vectors, "out": out, "ids": torch.randint(K, (B, n), generator=g), "share": share,
                      "noise": torch.rand(B, n, generator=g), "codes": K}  # fmt: skip


def lowest(noise: Tensor, share: Tensor) -> Tensor:
    """Where to mask, (B, n) bool."""
    return noise.argsort(1).argsort(1) < (share * noise.shape[1]).ceil()[:, None]


def entropies(model: nn.Module, ids: Tensor, mask: Tensor, token: int) -> Tensor:
    """Nats of every cell, (B, n)."""
    return F.cross_entropy(model(ids.masked_fill(mask, token)).transpose(1, 2), ids, reduction="none")


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """the loss counts all cells: only those that are masked are to be guessed."""
    return entropies(model, ids, lowest(noise, share), codes).mean()


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """the loss counts the cells that are seen: it must be those that are masked."""
    mask = lowest(noise, share)
    return (entropies(model, ids, mask, codes) * ~mask).sum() / (~mask).sum().clamp(min=1)


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """the number of masked cells is rounded down, and may be 0: round it up."""
    mask = noise.argsort(1).argsort(1) < (share * noise.shape[1]).floor()[:, None]
    return entropies(model, ids, mask, codes)[mask].mean()


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """every cell is masked by its own coin, noise < share: mask exactly so many, those of the lowest noise."""
    mask = noise < share[:, None]
    return entropies(model, ids, mask, codes)[mask].mean()


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """the model sees what it shall guess: give it the ids with the mask in them."""
    mask = lowest(noise, share)
    return entropies(model, ids, torch.zeros_like(mask), codes)[mask].mean()


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """the mean is taken for every drawing, then over drawings: every masked cell of the batch counts the same."""
    mask = lowest(noise, share)
    return ((entropies(model, ids, mask, codes) * mask).sum(1) / mask.sum(1)).mean()


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """0 is a code, not the mask: the mask is the integer `codes`."""
    mask = lowest(noise, share)
    return entropies(model, ids, mask, 0)[mask].mean()


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """the cells of the highest noise are masked: take the lowest."""
    mask = lowest(-noise, share)
    return entropies(model, ids, mask, codes)[mask].mean()


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """the loss is summed over the masked cells: average it."""
    mask = lowest(noise, share)
    return entropies(model, ids, mask, codes)[mask].sum()


@BOOK.wrong(6)
def _(model, ids, share, noise, codes):
    """`share` is taken for the share that is seen."""
    mask = lowest(noise, 1 - share)
    return entropies(model, ids, mask, codes)[mask].sum() / mask.sum().clamp(min=1)


@BOOK.right(6)
def _(model, ids, share, noise, codes):
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for b in range(len(ids)):
        mask[b, noise[b].argsort()[: math.ceil(share[b].item() * ids.shape[1])]] = True
    hidden = ids.clone()
    hidden[mask] = codes
    return F.cross_entropy(model(hidden)[mask], ids[mask])


@BOOK.right(6)
def _(model, ids, share, noise, codes):
    count = (share * ids.shape[1]).ceil().long()
    limit = noise.sort(1).values.gather(1, count[:, None] - 1)
    mask = noise <= limit
    targets = torch.where(mask, ids, -100)
    logits = model(torch.where(mask, codes, ids))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
