"""Homework 3: the cases of each question, its typical mistakes (the docstring is the hint), other right answers."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from homework_source import Book
from torch import Tensor, nn

BOOK = Book()
Cases = Iterator[tuple[str, dict]]


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of some schedule, as inputs."""
    return (0.5 * math.pi * t).cos(), (0.5 * math.pi * t).sin()


def times(g: torch.Generator, count: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(count, generator=g)


# ---------------------------------------------------------------------------------------- 1 cosine_schedule


@BOOK.question(1, ("alpha", "sigma"))
def schedule_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 1)
    yield "seven times", {"t": 0.05 + 0.95 * torch.rand(7, generator=g)}
    yield "one early time", {"t": 0.03 + 0.02 * torch.rand(1, generator=g)}
    yield "the end and the middle", {"t": torch.stack([torch.tensor(1.0), torch.rand((), generator=g) / 4 + 0.4])}


def alpha_bar(t: Tensor, s: float = 0.008) -> Tensor:
    return ((t + s) / (1 + s) * math.pi / 2).cos().square() / math.cos(s / (1 + s) * math.pi / 2) ** 2


@BOOK.wrong(1)
def _(t):
    """these are alpha squared and sigma squared: take the roots."""
    return alpha_bar(t), 1 - alpha_bar(t)


@BOOK.wrong(1)
def _(t):
    """f(t) is not divided by f(0)."""
    a = alpha_bar(t) * math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    return a.sqrt(), (1 - a).sqrt()


@BOOK.wrong(1)
def _(t):
    """the offset s = 0.008 is missing."""
    return alpha_bar(t, 0.0).sqrt(), (1 - alpha_bar(t, 0.0)).sqrt()


@BOOK.wrong(1)
def _(t):
    """alpha and sigma are exchanged: at t = 1 all is noise."""
    return (1 - alpha_bar(t)).sqrt(), alpha_bar(t).sqrt()


@BOOK.wrong(1)
def _(t):
    """sigma is 1 - alpha: it is their squares that sum to 1."""
    return alpha_bar(t).sqrt(), 1 - alpha_bar(t).sqrt()


@BOOK.wrong(1)
def _(t):
    """the cosine is not squared: f is cos squared."""
    a = ((t + 0.008) / 1.008 * math.pi / 2).cos() / math.cos(0.008 / 1.008 * math.pi / 2)
    return a.sqrt(), (1 - a).sqrt()


@BOOK.wrong(1)
def _(t):
    """the signal falls in a straight line: it follows a cosine."""
    return (1 - t).sqrt(), t.sqrt()


@BOOK.wrong(1)
def _(t):
    """the time is not divided by 1 + s, so the cosine is past its zero at t = 1."""
    a = ((t + 0.008) * math.pi / 2).cos().square() / math.cos(0.008 * math.pi / 2) ** 2
    return a.sqrt(), (1 - a).sqrt()


@BOOK.right(1)
def _(t):
    def f(u):
        return torch.cos((u.double() + 0.008) / 1.008 * math.pi / 2) ** 2

    a = (f(t) / f(torch.zeros(1))).clamp(0, 1)
    return a.sqrt().float(), (1 - a).sqrt().float()


@BOOK.right(1)
def _(t):
    offset = 0.008 / 1.008 * math.pi / 2
    alpha = torch.sin((1 - t) * (math.pi / 2 - offset)).clamp(min=0) / math.cos(offset)
    return alpha, torch.sqrt(1 - alpha * alpha)


# ---------------------------------------------------------------------------------------- 2 from_v


@BOOK.question(2, ("x_0", "eps"))
def from_v_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 2)
    for title, B, D in (("three drawings", 3, 5), ("as many drawings as numbers", 4, 4), ("one drawing", 1, 6)):
        alpha, sigma = levels(times(g, B))
        x_t, v = torch.randn(2, B, D, generator=g)
        yield title, {"x_t": x_t, "v": v, "alpha": alpha, "sigma": sigma}


def parts(x_t: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    a, s = alpha[:, None], sigma[:, None]
    return a * x_t - s * v, s * x_t + a * v


@BOOK.wrong(2)
def _(x_t, v, alpha, sigma):
    """the sign of v is wrong: v = alpha eps - sigma x_0."""
    return parts(x_t, -v, alpha, sigma)


@BOOK.wrong(2)
def _(x_t, v, alpha, sigma):
    """x_0 and eps are exchanged."""
    return parts(x_t, v, alpha, sigma)[::-1]


@BOOK.wrong(2)
def _(x_t, v, alpha, sigma):
    """alpha and sigma are exchanged."""
    return parts(x_t, v, sigma, alpha)


@BOOK.wrong(2)
def _(x_t, v, alpha, sigma):
    """alpha (B,) meets the columns: each drawing, a row, has its own alpha; write alpha[:, None]."""
    return alpha * x_t - sigma * v, sigma * x_t + alpha * v


@BOOK.wrong(2)
def _(x_t, v, alpha, sigma):
    """v is taken for eps: (x_t - sigma eps) / alpha is x_0 when the model predicts eps."""
    return (x_t - sigma[:, None] * v) / alpha[:, None], v


@BOOK.wrong(2)
def _(x_t, v, alpha, sigma):
    """v is taken for x_0."""
    return v, (x_t - alpha[:, None] * v) / sigma[:, None]


@BOOK.wrong(2)
def _(x_t, v, alpha, sigma):
    """v is taken for the velocity of a straight path, eps - x_0."""
    return (x_t - sigma[:, None] * v) / (alpha + sigma)[:, None], (x_t + alpha[:, None] * v) / (alpha + sigma)[:, None]


@BOOK.right(2)
def _(x_t, v, alpha, sigma):
    x_0 = torch.einsum("b,bd->bd", alpha, x_t) - torch.einsum("b,bd->bd", sigma, v)
    return x_0, (x_t - alpha[:, None] * x_0) / sigma[:, None]


@BOOK.right(2)
def _(x_t, v, alpha, sigma):
    turn = torch.stack([torch.stack([alpha, -sigma], 1), torch.stack([sigma, alpha], 1)], 1)
    x_0, eps = (turn @ torch.stack([x_t, v], 1)).unbind(1)
    return x_0, eps


# ---------------------------------------------------------------------------------------- 3 ddim


@BOOK.question(3, ("x",), probe="linear_flow")
def ddim_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 3)
    for title, T, down in (
        ("four steps from noise", 4, True),
        ("one step", 1, True),
        ("five steps towards noise: inversion", 5, False),
    ):
        alphas, sigmas = levels(torch.linspace(0.95, 0.05, T + 1) + 0.04 * torch.rand(T + 1, generator=g))
        alphas, sigmas = (alphas, sigmas) if down else (alphas.flip(0), sigmas.flip(0))
        yield title, {"matrix": 0.5 * torch.randn(4, 4, generator=g), "drift": 0.1 * torch.randn(4, generator=g),
                      "x": torch.randn(3, 4, generator=g), "alphas": alphas, "sigmas": sigmas}  # fmt: skip


def split(x: Tensor, v: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return a * x - s * v, s * x + a * v


@BOOK.wrong(3)
def _(predict, x, alphas, sigmas):
    """x_0 itself is carried on: give it its noise of the next level, alpha' x_0 + sigma' eps."""
    for i in range(len(alphas) - 1):
        x, _ = split(x, predict(x, i), alphas[i], sigmas[i])
    return x


@BOOK.wrong(3)
def _(predict, x, alphas, sigmas):
    """the model is asked for level i + 1: x is at level i."""
    for i in range(len(alphas) - 1):
        x_0, eps = split(x, predict(x, i + 1), alphas[i], sigmas[i])
        x = alphas[i + 1] * x_0 + sigmas[i + 1] * eps
    return x


@BOOK.wrong(3)
def _(predict, x, alphas, sigmas):
    """x_0 and eps are taken from x with the alpha and sigma of the next level: use those of level i."""
    for i in range(len(alphas) - 1):
        x_0, eps = split(x, predict(x, i), alphas[i + 1], sigmas[i + 1])
        x = alphas[i + 1] * x_0 + sigmas[i + 1] * eps
    return x


@BOOK.wrong(3)
def _(predict, x, alphas, sigmas):
    """the last step is missing: T + 1 levels have T steps between them."""
    for i in range(len(alphas) - 2):
        x_0, eps = split(x, predict(x, i), alphas[i], sigmas[i])
        x = alphas[i + 1] * x_0 + sigmas[i + 1] * eps
    return x


@BOOK.wrong(3)
def _(predict, x, alphas, sigmas):
    """x_0 and eps are exchanged where they are put together again."""
    for i in range(len(alphas) - 1):
        x_0, eps = split(x, predict(x, i), alphas[i], sigmas[i])
        x = alphas[i + 1] * eps + sigmas[i + 1] * x_0
    return x


@BOOK.wrong(3)
def _(predict, x, alphas, sigmas):
    """the levels are sorted, so that inversion runs backwards: walk them in the order that is given."""
    alphas, sigmas = alphas.sort().values, sigmas.sort(descending=True).values
    for i in range(len(alphas) - 1):
        x_0, eps = split(x, predict(x, i), alphas[i], sigmas[i])
        x = alphas[i + 1] * x_0 + sigmas[i + 1] * eps
    return x


@BOOK.wrong(3)
def _(predict, x, alphas, sigmas):
    """the prediction is taken for eps, but it is v."""
    for i in range(len(alphas) - 1):
        eps = predict(x, i)
        x = alphas[i + 1] * (x - sigmas[i] * eps) / alphas[i] + sigmas[i + 1] * eps
    return x


@BOOK.wrong(3)
def _(predict, x, alphas, sigmas):
    """the last step returns x_0 without its noise: the last sigma need not be 0."""
    for i in range(len(alphas) - 1):
        x_0, eps = split(x, predict(x, i), alphas[i], sigmas[i])
        x = alphas[i + 1] * x_0 + sigmas[i + 1] * eps if i < len(alphas) - 2 else x_0
    return x


@BOOK.right(3)
def _(predict, x, alphas, sigmas):
    angle = torch.atan2(sigmas, alphas)
    for i, turn in enumerate(angle.diff().tolist()):
        x = math.cos(turn) * x + math.sin(turn) * predict(x, i)
    return x


@BOOK.right(3)
def _(predict, x, alphas, sigmas):
    levels = list(zip(alphas.tolist(), sigmas.tolist(), strict=True))
    for i, ((a, s), (b, r)) in enumerate(pairwise(levels)):
        clean = a * x - s * predict(x, i)
        x = b * clean + r * (x - a * clean) / s
    return x


# ---------------------------------------------------------------------------------------- 4 guided


@BOOK.question(4, ("v",))
def guided_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 4)
    for title, B, D, scale in (("inside and outside", 5, 3, 3.0), ("as many rows as columns", 4, 4, 2.0),
                               ("a scale of 0", 4, 2, 0.0)):  # fmt: skip
        told, untold = torch.randn(2, B, D, generator=g)
        t = torch.linspace(0.05, 0.95, B)[torch.randperm(B, generator=g)]
        yield title, {"told": told, "untold": untold, "t": t, "scale": scale, "low": 0.2, "high": 0.7}


def mixed(told: Tensor, untold: Tensor, scale: float) -> Tensor:
    return untold + scale * (told - untold)


def between(t: Tensor, low: float, high: float) -> Tensor:
    return ((t >= low) & (t <= high))[:, None]


@BOOK.wrong(4)
def _(told, untold, t, scale, low, high):
    """outside the interval the caption is forgotten: return the told prediction there."""
    return torch.where(between(t, low, high), mixed(told, untold, scale), untold)


@BOOK.wrong(4)
def _(told, untold, t, scale, low, high):
    """guidance is applied at all times: only from `low` to `high`."""
    return mixed(told, untold, scale)


@BOOK.wrong(4)
def _(told, untold, t, scale, low, high):
    """told and untold are exchanged: a scale of 1 must give the told prediction."""
    return torch.where(between(t, low, high), mixed(untold, told, scale), told)


@BOOK.wrong(4)
def _(told, untold, t, scale, low, high):
    """the scale counts from the told prediction: here it counts from the untold one, and 1 means no guidance."""
    return torch.where(between(t, low, high), told + scale * (told - untold), told)


@BOOK.wrong(4)
def _(told, untold, t, scale, low, high):
    """inside and outside are exchanged."""
    return torch.where(between(t, low, high), told, mixed(told, untold, scale))


@BOOK.wrong(4)
def _(told, untold, t, scale, low, high):
    """the whole batch follows the first time: each row has its own t."""
    return mixed(told, untold, scale) if low <= t[0] <= high else told


@BOOK.wrong(4)
def _(told, untold, t, scale, low, high):
    """only the lower end of the interval is looked at."""
    return torch.where(between(t, low, 1.0), mixed(told, untold, scale), told)


@BOOK.right(4)
def _(told, untold, t, scale, low, high):
    s = torch.where((low <= t) & (t <= high), scale, 1.0)
    return torch.lerp(untold, told, s[:, None])


@BOOK.right(4)
def _(told, untold, t, scale, low, high):
    v = told.clone()
    for b, time in enumerate(t.tolist()):
        if low <= time <= high:
            v[b] = (1 - scale) * untold[b] + scale * told[b]
    return v


# ---------------------------------------------------------------------------------------- 5 min_snr


@BOOK.question(5, ("weight",))
def min_snr_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 5)
    for title, B, gamma in (("eight levels, gamma 5", 8, 5.0), ("gamma 1", 6, 1.0), ("one level", 1, 5.0)):
        alpha, sigma = levels(0.1 + 0.8 * torch.rand(B, generator=g) if B > 1 else times(g, 1) / 4)
        yield title, {"alpha": alpha, "sigma": sigma, "gamma": gamma}


@BOOK.wrong(5)
def _(alpha, sigma, gamma):
    """this is the weight for a model that predicts eps: for v divide by SNR + 1."""
    snr = (alpha / sigma).square()
    return snr.clamp(max=gamma) / snr


@BOOK.wrong(5)
def _(alpha, sigma, gamma):
    """this is the weight for a model that predicts x_0: for v divide by SNR + 1."""
    return (alpha / sigma).square().clamp(max=gamma)


@BOOK.wrong(5)
def _(alpha, sigma, gamma):
    """the larger of SNR and gamma is taken: take the smaller."""
    snr = (alpha / sigma).square()
    return snr.clamp(min=gamma) / (snr + 1)


@BOOK.wrong(5)
def _(alpha, sigma, gamma):
    """SNR is alpha squared over sigma squared: the squares are missing."""
    snr = alpha / sigma
    return snr.clamp(max=gamma) / (snr + 1)


@BOOK.wrong(5)
def _(alpha, sigma, gamma):
    """SNR is upside down: the signal stands above."""
    snr = (sigma / alpha).square()
    return snr.clamp(max=gamma) / (snr + 1)


@BOOK.wrong(5)
def _(alpha, sigma, gamma):
    """the SNR below the line is cut off at gamma as well: only the one above is."""
    snr = (alpha / sigma).square().clamp(max=gamma)
    return snr / (snr + 1)


@BOOK.wrong(5)
def _(alpha, sigma, gamma):
    """the weights are divided by their mean: leave them as they are."""
    snr = (alpha / sigma).square()
    weight = snr.clamp(max=gamma) / (snr + 1)
    return weight / weight.mean()


@BOOK.right(5)
def _(alpha, sigma, gamma):
    return torch.minimum(alpha**2, gamma * sigma**2) / (alpha**2 + sigma**2)


@BOOK.right(5)
def _(alpha, sigma, gamma):
    log_snr = 2 * (alpha.log() - sigma.log())
    return torch.exp(torch.clamp(log_snr, max=math.log(gamma)) - F.softplus(log_snr))


# ---------------------------------------------------------------------------------------- 6 v_loss


@BOOK.question(6, ("loss",), probe="denoiser")
def v_loss_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 6)
    for title, B, D, n in (("four drawings", 4, 5, 3), ("as many drawings as numbers", 4, 4, 2), ("one", 1, 3, 2)):
        t = times(g, B)
        alpha, sigma = levels(t)
        x_0, eps = torch.randn(2, B, D, generator=g)
        told = torch.arange(B) % 2 == 0
        yield title, {"matrix": 0.5 * torch.randn(D + 1 + n, D, generator=g), "x_0": x_0, "eps": eps, "t": t,
                      "alpha": alpha, "sigma": sigma, "c": torch.randn(B, n, generator=g), "told": told,
                      "weight": 0.5 + torch.rand(B, generator=g)}  # fmt: skip


def squares(model: nn.Module, x_0: Tensor, eps: Tensor, t: Tensor, a: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """Mean squared error of v, (B,)."""
    a, s = a[:, None], s[:, None]
    return (model(a * x_0 + s * eps, t, c) - (a * eps - s * x_0)).square().mean(1)


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """the condition is never dropped: it is 0 where `told` is False."""
    return (weight * squares(model, x_0, eps, t, alpha, sigma, c)).mean()


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """the condition is dropped where `told` is True: exchange the two."""
    return (weight * squares(model, x_0, eps, t, alpha, sigma, c * ~told[:, None])).mean()


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """the weights are not used."""
    return squares(model, x_0, eps, t, alpha, sigma, c * told[:, None]).mean()


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """the target is eps: here it is v = alpha eps - sigma x_0."""
    x_t = alpha[:, None] * x_0 + sigma[:, None] * eps
    return (weight * (model(x_t, t, c * told[:, None]) - eps).square().mean(1)).mean()


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """the sign of v is wrong: v = alpha eps - sigma x_0."""
    a, s = alpha[:, None], sigma[:, None]
    v = s * x_0 - a * eps
    return (weight * (model(a * x_0 + s * eps, t, c * told[:, None]) - v).square().mean(1)).mean()


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """the error is summed over the numbers of a drawing: average it."""
    return (weight * squares(model, x_0, eps, t, alpha, sigma, c * told[:, None])).mean() * x_0.shape[1]


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """the model is shown the clean x_0: show it x_t = alpha x_0 + sigma eps."""
    v = alpha[:, None] * eps - sigma[:, None] * x_0
    return (weight * (model(x_0, t, c * told[:, None]) - v).square().mean(1)).mean()


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """drawings that are not told are left out: they teach the model to draw without a condition."""
    loss = weight * squares(model, x_0, eps, t, alpha, sigma, c)
    return (loss * told).sum() / told.sum()


@BOOK.wrong(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    """alpha and sigma are exchanged in x_t."""
    v = alpha[:, None] * eps - sigma[:, None] * x_0
    x_t = sigma[:, None] * x_0 + alpha[:, None] * eps
    return (weight * (model(x_t, t, c * told[:, None]) - v).square().mean(1)).mean()


@BOOK.right(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    c = torch.where(told[:, None], c, torch.zeros_like(c))
    mixed = torch.einsum("b,bd->bd", alpha, x_0) + torch.einsum("b,bd->bd", sigma, eps)
    v = (alpha * eps.T - sigma * x_0.T).T
    return torch.mean(weight[:, None] * (v - model(mixed, t, c)) ** 2)


@BOOK.right(6)
def _(model, x_0, eps, t, alpha, sigma, c, told, weight):
    a, s = alpha.unsqueeze(-1), sigma.unsqueeze(-1)
    given = c.clone()
    given[~told] = 0
    error = F.mse_loss(model(a * x_0 + s * eps, t, given), a * eps - s * x_0, reduction="none")
    return (error.sum(1) * weight).sum() / error.numel()
