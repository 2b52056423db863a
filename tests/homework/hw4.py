"""Homework 4: the cases of each question, its typical mistakes (the docstring is the hint), other right answers."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from homework_source import Book
from torch import Tensor

BOOK = Book()
Cases = Iterator[tuple[str, dict]]

# ---------------------------------------------------------------------------------------- 1 linear_map


@BOOK.question(1, ("W", "b"))
def linear_map_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 1)
    for title, N, d, m, ridge in (
        ("twenty pairs", 20, 3, 4, 1.0),
        ("fewer pairs than features", 4, 6, 2, 0.5),
        ("a strong ridge", 12, 4, 3, 30.0),
    ):
        x = torch.randn(N, d, generator=g) + 2 * torch.randn(d, generator=g)
        y = x @ torch.randn(d, m, generator=g) + 3 * torch.randn(m, generator=g) + torch.randn(N, m, generator=g)
        yield title, {"x": x, "y": y, "ridge": ridge}


def solved(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    return torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ y)


def centred(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    W = solved(x - x.mean(0), y - y.mean(0), ridge)
    return W, y.mean(0) - x.mean(0) @ W


@BOOK.wrong(1)
def _(x, y, ridge):
    """there is no bias: W must fit the deviations from the means, and b carries the means."""
    return solved(x, y, ridge), torch.zeros(y.shape[1])


@BOOK.wrong(1)
def _(x, y, ridge):
    """the ridge shrinks the bias as well: leave it out of the penalty."""
    both = solved(torch.cat([x, torch.ones(len(x), 1)], 1), y, ridge)
    return both[:-1], both[-1]


@BOOK.wrong(1)
def _(x, y, ridge):
    """the ridge is missing."""
    return centred(x, y, 1e-6)


@BOOK.wrong(1)
def _(x, y, ridge):
    """the ridge is multiplied by the number of rows: the error is a sum, not a mean."""
    return centred(x, y, ridge * len(x))


@BOOK.wrong(1)
def _(x, y, ridge):
    """the ridge is squared."""
    return centred(x, y, ridge**2 if ridge != 1 else 2.0)


@BOOK.wrong(1)
def _(x, y, ridge):
    """W is (m, d): a row is a feature of x, a column one of y."""
    W, b = centred(x, y, ridge)
    return W.T, b


@BOOK.wrong(1)
def _(x, y, ridge):
    """b is the mean of y alone: subtract what W makes of the mean of x."""
    return centred(x, y, ridge)[0], y.mean(0)


@BOOK.right(1)
def _(x, y, ridge):
    padded = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    penalty = ridge * torch.eye(padded.shape[1]).double()
    penalty[-1, -1] = 0
    both = torch.linalg.solve(padded.T @ padded + penalty, padded.T @ y.double()).float()
    return both[:-1], both[-1]


@BOOK.right(1)
def _(x, y, ridge):
    U, S, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    W = Vh.T @ ((S / (S.square() + ridge))[:, None] * (U.T @ (y - y.mean(0))))
    return W, (y - x @ W).mean(0)


# ---------------------------------------------------------------------------------------- 2 splice


@BOOK.question(2, ("embeds", "is_text"))
def splice_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 2)
    for title, B, T, P, d in (("three texts of five", 3, 5, 2, 3), ("at both ends", 2, 4, 3, 2), ("one", 1, 3, 1, 4)):
        place = torch.randint(1, T, (B,), generator=g)
        place = torch.tensor([0, T]) if title == "at both ends" else place
        yield title, {"text": torch.randn(B, T, d, generator=g), "image": torch.randn(B, P, d, generator=g),
                      "place": place}  # fmt: skip


def spliced(text: Tensor, image: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    rows = [torch.cat([t[:p], i, t[p:]]) for t, i, p in zip(text, image, place.tolist(), strict=True)]
    t = torch.arange(text.shape[1] + image.shape[1])
    return torch.stack(rows), (t < place[:, None]) | (t >= place[:, None] + image.shape[1])


@BOOK.wrong(2)
def _(text, image, place):
    """the image always stands in front: each row has its own place."""
    return spliced(text, image, torch.zeros_like(place))


@BOOK.wrong(2)
def _(text, image, place):
    """the image always stands at the end: each row has its own place."""
    return spliced(text, image, torch.full_like(place, text.shape[1]))


@BOOK.wrong(2)
def _(text, image, place):
    """all rows use the first row's place."""
    return spliced(text, image, place[:1].expand_as(place))


@BOOK.wrong(2)
def _(text, image, place):
    """the image stands one place too late: it comes before the token with number `place`."""
    return spliced(text, image, (place + 1).clamp(max=text.shape[1]))


@BOOK.wrong(2)
def _(text, image, place):
    """the image replaces tokens: nothing of the text may be lost."""
    made = F.pad(text, (0, 0, 0, image.shape[1]))
    for row, p in enumerate(place.tolist()):
        made[row, p : p + image.shape[1]] = image[row]
    return made, spliced(text, image, place)[1]


@BOOK.wrong(2)
def _(text, image, place):
    """is_text is True where the image is: exchange the two."""
    embeds, is_text = spliced(text, image, place)
    return embeds, ~is_text


@BOOK.wrong(2)
def _(text, image, place):
    """is_text is a number: it must be bool."""
    embeds, is_text = spliced(text, image, place)
    return embeds, is_text.float()


@BOOK.right(2)
def _(text, image, place):
    B, T, d = text.shape
    P = image.shape[1]
    t = torch.arange(T + P).expand(B, -1)
    inside = (t >= place[:, None]) & (t < place[:, None] + P)
    source = torch.where(inside, T + t - place[:, None], torch.where(t < place[:, None], t, t - P))
    return torch.cat([text, image], 1).gather(1, source[..., None].expand(-1, -1, d)), ~inside


@BOOK.right(2)
def _(text, image, place):
    B, T, d = text.shape
    P = image.shape[1]
    is_text = torch.ones(B, T + P, dtype=torch.bool)
    for row, p in enumerate(place):
        is_text[row, p : p + P] = False
    embeds = torch.zeros(B, T + P, d)
    embeds[is_text] = text.flatten(0, 1)
    embeds[~is_text] = image.flatten(0, 1)
    return embeds, is_text


# ---------------------------------------------------------------------------------------- 3 recall_at_k


@BOOK.question(3, ("recall",))
def recall_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 3)
    for title, N, M, k in (("ten queries, k 3", 10, 8, 3), ("k 1", 12, 4, 1), ("as many answers as queries", 9, 9, 2)):
        answer = torch.randint(M, (N,), generator=g)
        scores = torch.randn(N, M, generator=g)
        scores[: N // 3, answer[: N // 3]] += 1.5
        yield title, {"scores": scores, "answer": answer, "k": k}
    yield "all scores alike", {"scores": torch.full((7, 6), torch.rand((), generator=g).item()),
                               "answer": torch.randint(6, (7,), generator=g), "k": 2}  # fmt: skip
    scores, answer = torch.randint(3, (12, 5), generator=g).float(), torch.randint(5, (12,), generator=g)
    yield "many ties", {"scores": scores, "answer": answer, "k": 2}


def at_answer(scores: Tensor, answer: Tensor) -> Tensor:
    return scores.gather(1, answer[:, None])


@BOOK.wrong(3)
def _(scores, answer, k):
    """a tie counts as a hit: an answer that is not above the others has not been found."""
    return ((scores > at_answer(scores, answer)).sum(1) < k).float().mean()


@BOOK.wrong(3)
def _(scores, answer, k):
    """this is recall at 1: look at the k best."""
    return ((scores >= at_answer(scores, answer)).sum(1) <= 1).float().mean()


@BOOK.wrong(3)
def _(scores, answer, k):
    """the k + 1 best are looked at: the answer itself is one of the k."""
    return ((scores >= at_answer(scores, answer)).sum(1) <= k + 1).float().mean()


@BOOK.wrong(3)
def _(scores, answer, k):
    """the lowest scores are taken for the best."""
    return ((scores <= at_answer(scores, answer)).sum(1) <= k).float().mean()


@BOOK.wrong(3)
def _(scores, answer, k):
    """hits are divided by k: every query has one answer, so divide by the queries."""
    return ((scores >= at_answer(scores, answer)).sum(1) <= k).float().mean() / k


@BOOK.wrong(3)
def _(scores, answer, k):
    """hits are counted: divide by the number of queries."""
    return ((scores >= at_answer(scores, answer)).sum(1) <= k).float().sum()


@BOOK.wrong(3)
def _(scores, answer, k):
    """this is one value a query: average."""
    return ((scores >= at_answer(scores, answer)).sum(1) <= k).float()


@BOOK.right(3)
def _(scores, answer, k):
    hits = 0
    for row, right in zip(scores.tolist(), answer.tolist(), strict=True):
        hits += sum(score >= row[right] for i, score in enumerate(row) if i != right) < k
    return torch.tensor(hits / len(scores))


@BOOK.right(3)
def _(scores, answer, k):
    mine = at_answer(scores, answer)
    others = scores.scatter(1, answer[:, None], -torch.inf)
    return (mine > others.sort(1, descending=True).values[:, k - 1 : k]).float().mean()


# ---------------------------------------------------------------------------------------- 4 best_threshold


@BOOK.question(4, ("threshold", "macro_f1"))
def threshold_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 4)
    for title, N, gap, share in (("twenty queries", 20, 1.0, 0.5), ("few that are there", 24, 0.8, 0.2),
                                 ("most are there", 24, 0.8, 0.8)):  # fmt: skip
        there = torch.rand(N, generator=g) < share
        there[:2] = torch.tensor([True, False])
        yield title, {"score": torch.randn(N, generator=g) + gap * there, "there": there}
    there = torch.arange(10) % 3 == 0
    yield "all clear", {"score": torch.rand(10, generator=g) + 2 * there, "there": there}


def f1(said: Tensor, true: Tensor) -> float:
    hits = (said & true).sum().item()
    return 2 * hits / max(1, said.sum().item() + true.sum().item())


def macro(score: Tensor, there: Tensor, threshold: float) -> float:
    said = score >= threshold
    return 0.5 * (f1(said, there) + f1(~said, ~there))


def pick(score: Tensor, there: Tensor, quality, last: bool = False) -> tuple[Tensor, Tensor]:
    """The candidate of best quality, the lowest or highest of several."""
    tried = sorted(score.tolist(), reverse=last)
    found = [quality(score, there, t) for t in tried]
    best = max(range(len(tried)), key=lambda i: round(found[i], 6))
    return torch.tensor(tried[best]), torch.tensor(found[best])


@BOOK.wrong(4)
def _(score, there):
    """only the F1 of "retrieve" is looked at: average it with that of "generate"."""
    return pick(score, there, lambda s, y, t: f1(s >= t, y))


@BOOK.wrong(4)
def _(score, there):
    """this is the accuracy, which forgets the rarer of the two: take the mean of both F1."""
    return pick(score, there, lambda s, y, t: ((s >= t) == y).float().mean().item())


@BOOK.wrong(4)
def _(score, there):
    """a score equal to the threshold is not retrieved: retrieve where score >= threshold."""
    return pick(score, there, lambda s, y, t: 0.5 * (f1(s > t, y) + f1(s <= t, ~y)))


@BOOK.wrong(4)
def _(score, there):
    """high scores are taken for absent: retrieve where the score is high."""
    return pick(score, there, lambda s, y, t: 0.5 * (f1(s < t, y) + f1(s >= t, ~y)))


@BOOK.wrong(4)
def _(score, there):
    """the threshold is the mean of the scores: try all of them and keep the best."""
    t = score.mean()
    return t, torch.tensor(macro(score, there, t.item()))


@BOOK.wrong(4)
def _(score, there):
    """the threshold is the lowest score: try the others too."""
    t = score.min()
    return t, torch.tensor(macro(score, there, t.item()))


@BOOK.wrong(4)
def _(score, there):
    """macro-F1 is the mean of the two F1: this is their sum."""
    return pick(score, there, lambda s, y, t: 2 * macro(s, y, t))


@BOOK.right(4)
def _(score, there):
    return pick(score, there, macro)


@BOOK.right(4)
def _(score, there):
    tried = score.sort().values
    said = score >= tried[:, None]
    both = [2 * (a & b).sum(1) / (a.sum(1) + b.sum()) for a, b in ((said, there), (~said, ~there))]
    value = sum(both) / 2
    best = (value > value.max() - 1e-6).nonzero()[0, 0]
    return tried[best], value[best]


# ---------------------------------------------------------------------------------------- 5 info_nce


@BOOK.question(5, ("loss",), probe="with_gradients")
def info_nce_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 5)
    for title, N, d, concept in (
        ("six pairs, two of one concept", 6, 4, [0, 1, 2, 1, 3, 4]),
        ("all concepts differ", 5, 3, [4, 2, 0, 1, 3]),
        ("three of one concept", 5, 3, [7, 7, 2, 7, 5]),
    ):
        image, words = 2 * torch.randn(2, N, d, generator=g)
        scale = 5.0 + 5 * torch.rand((), generator=g).item()
        yield title, {"image": image, "words": words, "concept": torch.tensor(concept), "scale": scale}


def cosines(image: Tensor, words: Tensor, scale: float) -> Tensor:
    return scale * F.normalize(image, dim=1) @ F.normalize(words, dim=1).T


def masked(logits: Tensor, concept: Tensor) -> Tensor:
    alike = (concept[:, None] == concept) & ~torch.eye(len(concept), dtype=torch.bool)
    return logits.masked_fill(alike, -torch.inf)


def both_ways(logits: Tensor) -> Tensor:
    n = torch.arange(len(logits))
    return 0.5 * (F.cross_entropy(logits, n) + F.cross_entropy(logits.T, n))


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """another drawing of the same concept counts as wrong: leave such pairs out of the sum."""
    return both_ways(cosines(image, words, scale))


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """only drawings look for words: let words look for drawings too, and average."""
    return F.cross_entropy(masked(cosines(image, words, scale), concept), torch.arange(len(image)))


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """only words look for drawings: let drawings look for words too, and average."""
    return F.cross_entropy(masked(cosines(image, words, scale), concept).T, torch.arange(len(image)))


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """the vectors are not normalised: the logits are cosines times the scale."""
    return both_ways(masked(scale * image @ words.T, concept))


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """the cosines are divided by the scale: multiply."""
    return both_ways(masked(cosines(image, words, 1 / scale), concept))


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """both directions are added: average them."""
    return 2 * both_ways(masked(cosines(image, words, scale), concept))


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """masked pairs get a logit of 0, which still counts in the sum: take -inf."""
    logits = cosines(image, words, scale)
    return both_ways(torch.where(masked(logits, concept).isinf(), 0.0, logits))


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """other drawings of the concept are taken for further right answers: they are to be left out."""
    log_p = [x.log_softmax(1) for x in (cosines(image, words, scale), cosines(image, words, scale).T)]
    alike = (concept[:, None] == concept).float()
    return -sum((alike / alike.sum(1, keepdim=True) * x).sum(1).mean() for x in log_p) / 2


@BOOK.wrong(5)
def _(image, words, concept, scale):
    """the scale is not used."""
    return both_ways(masked(cosines(image, words, 1.0), concept))


@BOOK.right(5)
def _(image, words, concept, scale):
    image, words = image / image.norm(dim=1, keepdim=True), words / words.norm(dim=1, keepdim=True)
    total = 0.0
    for a, b in ((image, words), (words, image)):
        for n in range(len(a)):
            others = (concept != concept[n]) | (torch.arange(len(a)) == n)
            s = scale * (b[others] @ a[n])
            total = total + s.logsumexp(0) - scale * (a[n] @ b[n])
    return total / (2 * len(image))


@BOOK.right(5)
def _(image, words, concept, scale):
    s = cosines(image, words, scale)
    keep = (concept.unsqueeze(0) != concept.unsqueeze(1)).float() + torch.eye(len(s))
    terms = (s - s.max().detach()).exp() * keep
    log_sums = terms.sum(1).log() + terms.sum(0).log() + 2 * s.max().detach()
    return (0.5 * log_sums - s.diagonal()).mean()
