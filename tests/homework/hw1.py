"""Homework 1: the cases of each question, its typical mistakes (the docstring is the hint), other right answers."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from homework_source import Book
from torch import Tensor, nn

BOOK = Book()
Cases = Iterator[tuple[str, dict]]


def ink(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=g).float()


def share(g: torch.Generator, *shape: int) -> Tensor:
    return 0.05 + 0.9 * torch.rand(shape, generator=g)


def weights(g: torch.Generator, K: int) -> Tensor:
    return (2 * torch.rand(K, generator=g)).softmax(0)


# ---------------------------------------------------------------------------------------- 1 log_joint


@BOOK.question(1, ("log_p",))
def log_joint_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 1)
    for title, N, K, D in (
        ("five drawings of 3 pixels, two components", 5, 2, 3),
        ("one pixel, one component", 2, 1, 1),
        ("as many drawings as components", 4, 4, 6),
        ("1,024 pixels", 3, 2, 1024),
    ):
        x = ink(g, N, D)
        x[0, 0], x[-1, 0] = 0, 1  # a case with all ink would forgive too much
        yield title, {"x": x, "pi": weights(g, K), "theta": share(g, K, D)}


def bernoulli(x: Tensor, theta: Tensor) -> Tensor:
    """(N, K)"""
    return x @ theta.log().T + (1 - x) @ (1 - theta).log().T


@BOOK.wrong(1)
def _(x, pi, theta):
    """the weights are missing: add log pi_k to every row."""
    return bernoulli(x, theta)


@BOOK.wrong(1)
def _(x, pi, theta):
    """pi_k is added as it is: add its logarithm."""
    return bernoulli(x, theta) + pi


@BOOK.wrong(1)
def _(x, pi, theta):
    """only inked pixels are counted: a blank one adds log(1 - theta)."""
    return x @ theta.log().T + pi.log()


@BOOK.wrong(1)
def _(x, pi, theta):
    """the pixels are averaged: the log of a product is a sum."""
    return bernoulli(x, theta) / x.shape[1] + pi.log()


@BOOK.wrong(1)
def _(x, pi, theta):
    """the result is (K, N): a row is a drawing, a column a component."""
    return (bernoulli(x, theta) + pi.log()).T


@BOOK.wrong(1)
def _(x, pi, theta):
    """probabilities are multiplied before the logarithm is taken, and underflow to 0: add logarithms."""
    p = (theta * x[:, None] + (1 - theta) * (1 - x[:, None])).prod(2)
    return (pi * p).log()


@BOOK.wrong(1)
def _(x, pi, theta):
    """the rows are normalised, which makes responsibilities: leave the joint as it is."""
    return (bernoulli(x, theta) + pi.log()).log_softmax(1)


@BOOK.wrong(1)
def _(x, pi, theta):
    """theta is passed through a sigmoid, but it is a probability already."""
    return bernoulli(x, theta.sigmoid()) + pi.log()


@BOOK.wrong(1)
def _(x, pi, theta):
    """this is the joint itself: take its logarithm."""
    return (bernoulli(x, theta) + pi.log()).exp()


@BOOK.right(1)
def _(x, pi, theta):
    each = torch.distributions.Bernoulli(theta).log_prob(x[:, None])
    return each.sum(2) + pi.log()


@BOOK.right(1)
def _(x, pi, theta):
    columns = [-F.binary_cross_entropy(t.expand_as(x), x, reduction="none").sum(1) for t in theta]
    return torch.stack([c + math.log(p) for c, p in zip(columns, pi.tolist(), strict=True)], dim=1)


# ---------------------------------------------------------------------------------------- 2 em_step


@BOOK.question(2, ("pi", "theta", "mean_log_px"))
def em_step_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 2)
    for title, N, K, D, a, shift in (
        ("six drawings, three components", 6, 3, 4, 1.0, 0.0),
        ("half a drawing of each kind", 9, 2, 5, 0.5, 0.0),
        ("one component takes all", 4, 1, 3, 2.0, 0.0),
        ("log joints near -800", 5, 3, 4, 1.0, -800.0),
    ):
        yield title, {"x": ink(g, N, D), "joint": 2 * torch.randn(N, K, generator=g) + shift, "a": a}
    joint = torch.randn(5, 3, generator=g)
    joint[:, 1] = -1e4
    yield "a component with no drawing", {"x": ink(g, 5, 4), "joint": joint, "a": 1.0}


def em_parts(x: Tensor, r: Tensor, a: float) -> tuple[Tensor, Tensor]:
    N_k = r.sum(0)
    return N_k / N_k.sum(), (r.T @ x + a) / (N_k + 2 * a)[:, None]


@BOOK.wrong(2)
def _(x, joint, a):
    """the responsibilities sum to one over the drawings: they must over the components, in every row."""
    return *em_parts(x, joint.softmax(0), a), joint.logsumexp(1).mean()


@BOOK.wrong(2)
def _(x, joint, a):
    """log p(x) is summed over the drawings: average it."""
    return *em_parts(x, joint.softmax(1), a), joint.logsumexp(1).sum()


@BOOK.wrong(2)
def _(x, joint, a):
    """each drawing goes to its likeliest component alone (that is k-means): share it out by r."""
    return *em_parts(x, F.one_hot(joint.argmax(1), joint.shape[1]).float(), a), joint.logsumexp(1).mean()


@BOOK.wrong(2)
def _(x, joint, a):
    """the a blank drawings are missing below the line: divide by N_k + 2 a."""
    r = joint.softmax(1)
    return em_parts(x, r, a)[0], (r.T @ x + a) / (r.sum(0) + a)[:, None], joint.logsumexp(1).mean()


@BOOK.wrong(2)
def _(x, joint, a):
    """the a drawings of each kind are missing in theta."""
    r = joint.softmax(1)
    return em_parts(x, r, a)[0], r.T @ x / r.sum(0)[:, None], joint.logsumexp(1).mean()


@BOOK.wrong(2)
def _(x, joint, a):
    """theta is divided by all N drawings: divide by those of its component, N_k."""
    r = joint.softmax(1)
    return em_parts(x, r, a)[0], (r.T @ x + a) / (len(x) + 2 * a), joint.logsumexp(1).mean()


@BOOK.wrong(2)
def _(x, joint, a):
    """pi is N_k, which sums to N: divide it by N."""
    pi, theta = em_parts(x, joint.softmax(1), a)
    return pi * len(x), theta, joint.logsumexp(1).mean()


@BOOK.wrong(2)
def _(x, joint, a):
    """the joint is exponentiated and underflows to 0 / 0: stay in logarithms (softmax and logsumexp do)."""
    p = joint.exp()
    return *em_parts(x, p / p.sum(1, keepdim=True), a), p.sum(1).log().mean()


@BOOK.wrong(2)
def _(x, joint, a):
    """log p(x) is the log of the sum over components, logsumexp: this is the mean log joint under r."""
    r = joint.softmax(1)
    return *em_parts(x, r, a), (r * joint).sum(1).mean()


@BOOK.wrong(2)
def _(x, joint, a):
    """the a drawings of each kind are counted in pi as well: pi is N_k / N."""
    r = joint.softmax(1)
    N_k = r.sum(0) + 2 * a
    return N_k / N_k.sum(), em_parts(x, r, a)[1], joint.logsumexp(1).mean()


@BOOK.right(2)
def _(x, joint, a):
    top = joint.amax(1, keepdim=True)
    p = (joint - top).exp()
    r = p / p.sum(1, keepdim=True)
    theta = torch.stack([(r[:, k, None] * x).sum(0) + a for k in range(r.shape[1])])
    return r.mean(0), theta / (r.sum(0)[:, None] + 2 * a), (p.sum(1).log() + top[:, 0]).mean()


@BOOK.right(2)
def _(x, joint, a):
    log_px = torch.logsumexp(joint, dim=1)
    r = torch.exp(joint - log_px[:, None])
    inked, blank = torch.einsum("nk,nd->kd", r, x) + a, torch.einsum("nk,nd->kd", r, 1 - x) + a
    return r.sum(0) / len(x), inked / (inked + blank), log_px.sum() / len(x)


# ---------------------------------------------------------------------------------------- 3 complete


@BOOK.question(3, ("p",))
def complete_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 3)
    for title, N, K, D in (("half of it is seen", 5, 3, 8), ("the halves of 1,024 pixels", 2, 3, 1024)):
        seen = torch.rand(N, D, generator=g) < 0.5
        yield title, {"x": ink(g, N, D), "seen": seen, "pi": weights(g, K), "theta": share(g, K, D)}
    for title, value in (("nothing is seen", False), ("all is seen", True)):
        seen = torch.full((3, 6), value)
        yield title, {"x": ink(g, 3, 6), "seen": seen, "pi": weights(g, 2), "theta": share(g, 2, 6)}


def seen_log_joint(x: Tensor, seen: Tensor, pi: Tensor, theta: Tensor) -> Tensor:
    return (seen * x) @ theta.log().T + (seen * (1 - x)) @ (1 - theta).log().T + pi.log()


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """the hidden pixels are used to find the component: only the seen ones may be."""
    return torch.where(seen, x, (bernoulli(x, theta) + pi.log()).softmax(1) @ theta)


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """hidden pixels are taken for blank ones: leave out their log(1 - theta) too."""
    return torch.where(seen, x, (bernoulli(x * seen, theta) + pi.log()).softmax(1) @ theta)


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """the weights pi are missing in the posterior."""
    return torch.where(seen, x, (seen_log_joint(x, seen, pi, theta) - pi.log()).softmax(1) @ theta)


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """only the likeliest component is used: average theta over all of them with their probabilities."""
    return torch.where(seen, x, theta[seen_log_joint(x, seen, pi, theta).argmax(1)])


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """seen pixels are predicted as well: copy them from x."""
    return seen_log_joint(x, seen, pi, theta).softmax(1) @ theta


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """the result is rounded to ink or blank: return the probability of ink."""
    return torch.where(seen, x, (seen_log_joint(x, seen, pi, theta).softmax(1) @ theta).round())


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """theta is averaged with the prior weights pi, whatever is seen: weigh it with the posterior."""
    return torch.where(seen, x, pi @ theta)


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """probabilities of many pixels underflow to 0 / 0: normalise in logarithms (softmax does)."""
    p = seen_log_joint(x, seen, pi, theta).exp()
    return torch.where(seen, x, p / p.sum(1, keepdim=True) @ theta)


@BOOK.wrong(3)
def _(x, seen, pi, theta):
    """seen and hidden are exchanged."""
    return torch.where(seen, seen_log_joint(x, ~seen, pi, theta).softmax(1) @ theta, x)


@BOOK.right(3)
def _(x, seen, pi, theta):
    each = torch.where(x[:, None] == 1, theta, 1 - theta).log()
    joint = each.masked_fill(~seen[:, None], 0).sum(2) + pi.log()
    r = (joint - joint.logsumexp(1, keepdim=True)).exp()
    return seen * x + ~seen * (r @ theta)


@BOOK.right(3)
def _(x, seen, pi, theta):
    p = x.clone()
    for n in range(len(x)):
        s = seen[n]
        joint = torch.distributions.Bernoulli(theta[:, s]).log_prob(x[n, s]).sum(1) + pi.log()
        p[n, ~s] = joint.softmax(0) @ theta[:, ~s]
    return p


# ---------------------------------------------------------------------------------------- 4 kl_gaussians


@BOOK.question(4, ("kl",))
def kl_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 4)
    for title, B, d in (("four pairs in 3 dimensions", 4, 3), ("one pair in 1 dimension", 1, 1), ("B = d", 5, 5)):
        mu_q, mu_p = torch.randn(2, B, d, generator=g)
        log_sigma_q, log_sigma_p = 0.5 * torch.randn(2, B, d, generator=g)
        yield title, {"mu_q": mu_q, "log_sigma_q": log_sigma_q, "mu_p": mu_p, "log_sigma_p": log_sigma_p}
    mu, log_sigma = torch.randn(2, 3, 4, generator=g)
    yield "q equals p", {"mu_q": mu, "log_sigma_q": log_sigma, "mu_p": mu.clone(), "log_sigma_p": log_sigma.clone()}
    one = {"mu_q": mu, "log_sigma_q": log_sigma}
    yield "p is the standard Gaussian", one | {"mu_p": torch.zeros(3, 4), "log_sigma_p": torch.zeros(3, 4)}


def kl_terms(m_q: Tensor, s_q: Tensor, m_p: Tensor, s_p: Tensor) -> Tensor:
    return 0.5 * ((2 * (s_q - s_p)).exp() + ((m_q - m_p) * (-s_p).exp()).square() - 1) + s_p - s_q


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """the KL is averaged over the batch: one value a row is asked for."""
    return kl_terms(mu_q, log_sigma_q, mu_p, log_sigma_p).sum(1).mean()


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """the KL is the other way round: the expectation is under q, so p's variance stands below the line."""
    return kl_terms(mu_p, log_sigma_p, mu_q, log_sigma_q).sum(1)


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """log sigma is taken for the log variance: the variance is exp(2 log sigma)."""
    return kl_terms(mu_q, 0.5 * log_sigma_q, mu_p, 0.5 * log_sigma_p).sum(1)


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """the -1 of every dimension is missing: for q = p the KL must be 0."""
    return (kl_terms(mu_q, log_sigma_q, mu_p, log_sigma_p) + 0.5).sum(1)


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """this is the KL to the standard Gaussian: p has a mean and a sigma of its own."""
    return kl_terms(mu_q, log_sigma_q, torch.zeros_like(mu_p), torch.zeros_like(mu_p)).sum(1)


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """the KL is averaged over the dimensions: sum it."""
    return kl_terms(mu_q, log_sigma_q, mu_p, log_sigma_p).mean(1)


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """the KL is not summed over the dimensions: one value a row is asked for."""
    return kl_terms(mu_q, log_sigma_q, mu_p, log_sigma_p)


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """the factor 1/2 is missing."""
    return 2 * kl_terms(mu_q, log_sigma_q, mu_p, log_sigma_p).sum(1)


@BOOK.wrong(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    """the distance of the means is not divided by p's variance."""
    same_mean = kl_terms(mu_q, log_sigma_q, mu_q, log_sigma_p)
    return (same_mean + 0.5 * (mu_q - mu_p).square()).sum(1)


@BOOK.right(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    q, p = (torch.distributions.Normal(m, s.exp()) for m, s in ((mu_q, log_sigma_q), (mu_p, log_sigma_p)))
    return torch.distributions.kl_divergence(q, p).sum(1)


@BOOK.right(4)
def _(mu_q, log_sigma_q, mu_p, log_sigma_p):
    var_q, var_p = torch.exp(log_sigma_q) ** 2, torch.exp(log_sigma_p) ** 2
    return (torch.log(var_p / var_q) + (var_q + (mu_q - mu_p) ** 2) / var_p - 1).sum(dim=-1) / 2


# ---------------------------------------------------------------------------------------- 5 importance_bound


@BOOK.question(5, ("bound", "share"))
def importance_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 5)
    for title, B, k, d, level in (
        ("three drawings, five samples", 3, 5, 2, -4.0),
        ("one sample: the bound is an ELBO", 4, 1, 3, -4.0),
        ("log p(x | z) near -600", 2, 6, 4, -600.0),
        ("as many samples as drawings", 4, 4, 2, -10.0),
    ):
        mu, log_sigma = torch.randn(B, d, generator=g), 0.4 * torch.randn(B, d, generator=g)
        z = mu[:, None] + log_sigma.exp()[:, None] * torch.randn(B, k, d, generator=g)
        log_px_z = level + torch.randn(B, k, generator=g)
        yield title, {"log_px_z": log_px_z, "z": z, "mu": mu, "log_sigma": log_sigma}


def log_normal(z: Tensor, mu: Tensor | float = 0.0, log_sigma: Tensor | None = None) -> Tensor:
    log_sigma = torch.zeros(()) if log_sigma is None else log_sigma
    return (-0.5 * ((z - mu) / log_sigma.exp()).square() - log_sigma - 0.5 * math.log(2 * math.pi)).sum(2)


def importance(log_px_z: Tensor, z: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    return log_px_z + log_normal(z) - log_normal(z, mu[:, None], log_sigma[:, None])


def bound_and_share(log_w: Tensor) -> tuple[Tensor, Tensor]:
    w = log_w.softmax(1)
    return log_w.logsumexp(1) - math.log(log_w.shape[1]), 1 / (w.square().sum(1) * log_w.shape[1])


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """log k is not subtracted: the weights are averaged, not summed."""
    log_w = importance(log_px_z, z, mu, log_sigma)
    return log_w.logsumexp(1), bound_and_share(log_w)[1]


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """this is the mean of the logs, the ELBO: take the log of the mean."""
    log_w = importance(log_px_z, z, mu, log_sigma)
    return log_w.mean(1), bound_and_share(log_w)[1]


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """log q(z | x) is missing: samples of q are weighed by p / q."""
    return bound_and_share(log_px_z + log_normal(z))


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """log p(z) is missing: the weight is p(x | z) p(z) / q(z | x)."""
    return bound_and_share(log_px_z - log_normal(z, mu[:, None], log_sigma[:, None]))


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """prior and q are exchanged: add log p(z), subtract log q(z | x)."""
    return bound_and_share(2 * log_px_z - importance(log_px_z, z, mu, log_sigma))


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """log q(z | x) has lost its -log sigma: a narrow q has a high density."""
    return bound_and_share(importance(log_px_z, z, mu, log_sigma) - log_sigma.sum(1, keepdim=True))


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """the weights are exponentiated and underflow to 0: stay in logarithms."""
    w = importance(log_px_z, z, mu, log_sigma).exp()
    return w.mean(1).log(), w.sum(1).square() / w.square().sum(1) / w.shape[1]


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """the effective number of samples is not divided by k: a share in (0, 1] is asked for."""
    bound, share = bound_and_share(importance(log_px_z, z, mu, log_sigma))
    return bound, share * z.shape[1]


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """log sigma is taken for the log variance."""
    return bound_and_share(importance(log_px_z, z, mu, 0.5 * log_sigma))


@BOOK.wrong(5)
def _(log_px_z, z, mu, log_sigma):
    """the average runs over the drawings: average over the k samples of each."""
    log_w = importance(log_px_z, z, mu, log_sigma)
    return bound_and_share(log_w.T)


@BOOK.right(5)
def _(log_px_z, z, mu, log_sigma):
    eps = (z - mu[:, None]) / log_sigma[:, None].exp()
    log_w = log_px_z + 0.5 * (eps**2 - z**2).sum(-1) + log_sigma.sum(-1)[:, None]
    k = log_w.shape[1]
    top = log_w.max(1, keepdim=True).values
    w = (log_w - top).exp()
    return w.mean(1).log() + top[:, 0], w.sum(1) ** 2 / (k * (w**2).sum(1))


@BOOK.right(5)
def _(log_px_z, z, mu, log_sigma):
    q = torch.distributions.Independent(torch.distributions.Normal(mu, log_sigma.exp()), 1)
    prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(mu), 1.0), 1)
    log_w = torch.stack([log_px_z[:, j] + prior.log_prob(z[:, j]) - q.log_prob(z[:, j]) for j in range(z.shape[1])], 1)
    log_k = math.log(z.shape[1])
    share = (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1) - log_k).exp()
    return log_w.logsumexp(1) - log_k, share


# ---------------------------------------------------------------------------------------- 6 vae_loss


@BOOK.question(6, ("loss",), probe="two_matrices")
def vae_loss_cases(seed: int) -> Cases:
    g = torch.Generator().manual_seed(seed + 6)
    for title, B, D, d, beta, scale in (
        ("four drawings of 6 pixels, beta 1", 4, 6, 2, 1.0, 0.4),
        ("beta 0: reconstruction alone", 3, 5, 2, 0.0, 0.4),
        ("beta 4", 3, 5, 3, 4.0, 0.4),
        ("one drawing", 1, 7, 2, 1.0, 0.4),
        ("a decoder that is very sure", 3, 5, 2, 1.0, 150.0),
    ):
        encoder, decoder = 0.4 * torch.randn(2 * d, D, generator=g), scale * torch.randn(D, d, generator=g)
        eps = torch.randn(B, d, generator=g)
        yield title, {"encoder": encoder, "decoder": decoder, "x": ink(g, B, D), "eps": eps, "beta": beta}


def vae_parts(model: nn.Module, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL, both (B,)."""
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    return likelihood(model, x, mu + log_sigma.exp() * eps), prior_kl(mu, log_sigma)


def likelihood(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(model.decoder(z), x, reduction="none").sum(1)


def prior_kl(mu: Tensor, log_sigma: Tensor) -> Tensor:
    return 0.5 * (mu.square() + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(1)


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """the KL is summed over the batch: average it."""
    reconstruction, kl = vae_parts(model, x, eps)
    return beta * kl.sum() - reconstruction.mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """the reconstruction is averaged over the pixels, so the KL weighs D times too much: sum over pixels."""
    reconstruction, kl = vae_parts(model, x, eps)
    return (beta * kl - reconstruction / x.shape[1]).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """this is the ELBO: a loss is what training lowers, so minus that."""
    reconstruction, kl = vae_parts(model, x, eps)
    return (reconstruction - beta * kl).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """the sign of the KL is wrong: the loss rewards leaving the prior."""
    reconstruction, kl = vae_parts(model, x, eps)
    return (-beta * kl - reconstruction).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """beta is not used."""
    reconstruction, kl = vae_parts(model, x, eps)
    return (kl - reconstruction).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """beta weighs the reconstruction: it belongs to the KL."""
    reconstruction, kl = vae_parts(model, x, eps)
    return (kl - beta * reconstruction).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """eps is multiplied by log sigma: take its exponential first."""
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    return (beta * prior_kl(mu, log_sigma) - likelihood(model, x, mu + log_sigma * eps)).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """log sigma is taken for the log variance: sigma is exp(log sigma)."""
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    return (beta * prior_kl(mu, 0.5 * log_sigma) - likelihood(model, x, mu + (0.5 * log_sigma).exp() * eps)).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """z has no noise in it: z = mu + sigma eps."""
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    return (beta * prior_kl(mu, log_sigma) - likelihood(model, x, mu)).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """no gradient goes through z, so the encoder learns nothing from the reconstruction: do not detach it."""
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    z = (mu + log_sigma.exp() * eps).detach()
    return (beta * prior_kl(mu, log_sigma) - likelihood(model, x, z)).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """the logits pass through a sigmoid twice: binary_cross_entropy_with_logits applies its own."""
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    p = model.decoder(mu + log_sigma.exp() * eps).sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(p, x, reduction="none").sum(1)
    return (beta * prior_kl(mu, log_sigma) + cross_entropy).mean()


@BOOK.wrong(6)
def _(model, x, eps, beta):
    """the sigmoid of a sure logit is exactly 0 or 1, whose log is not finite: use the logits themselves."""
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    p = model.decoder(mu + log_sigma.exp() * eps).sigmoid()
    reconstruction = (x * p.log() + (1 - x) * (1 - p).log()).sum(1)
    return (beta * prior_kl(mu, log_sigma) - reconstruction).mean()


@BOOK.right(6)
def _(model, x, eps, beta):
    h = model.encoder(x)
    d = h.shape[1] // 2
    mu, sigma = h[:, :d], h[:, d:].exp()
    logits = model.decoder(mu + sigma * eps)
    reconstruction = (x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum()
    kl = (0.5 * (mu**2 + sigma**2 - 1) - h[:, d:]).sum()
    return (beta * kl - reconstruction) / len(x)


@BOOK.right(6)
def _(model, x, eps, beta):
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    q, p = torch.distributions.Normal(mu, log_sigma.exp()), torch.distributions.Normal(torch.zeros_like(mu), 1.0)
    z = torch.addcmul(mu, log_sigma.exp(), eps)
    kl = torch.distributions.kl_divergence(q, p).sum(-1)
    log_p = torch.distributions.Bernoulli(logits=model.decoder(z)).log_prob(x).sum(-1)
    return -(log_p - beta * kl).mean()
