"""Lesson 01's functions against closed forms, torch and scikit-learn, and what must hold for any mixture."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from sklearn.mixture import GaussianMixture

from course_utils.models import gmm


def mixture(K: int, D: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pi = torch.rand(K, generator=generator, dtype=torch.float64) + 0.1
    root = torch.randn(K, D, D, generator=generator, dtype=torch.float64)
    Sigma = root @ root.mT / D + 0.2 * torch.eye(D, dtype=torch.float64)
    return pi / pi.sum(), 2 * torch.randn(K, D, generator=generator, dtype=torch.float64), Sigma


@pytest.fixture
def points() -> torch.Tensor:
    torch.manual_seed(0)
    return gmm.sample(*mixture(4, 3, seed=1), 500)[1]


def peer(theta: tuple, kind: str = "full", **settings) -> GaussianMixture:
    """scikit-learn's mixture with the same start."""
    pi, mu, Sigma = theta
    P = torch.linalg.inv(Sigma)
    precision = {"full": P, "tied": P[0], "diag": P.diagonal(dim1=1, dim2=2), "spherical": P[:, 0, 0]}[kind]
    start = {"weights_init": pi.numpy(), "means_init": mu.numpy(), "precisions_init": precision.numpy()}
    return GaussianMixture(len(pi), covariance_type=kind, tol=0, reg_covar=1e-6, **start, **settings)


def fitted(model: GaussianMixture, x: torch.Tensor) -> GaussianMixture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(x.numpy())


def test_log_joint_is_torchs(points: torch.Tensor) -> None:
    pi, mu, Sigma = mixture(5, 3)
    expected = torch.distributions.MultivariateNormal(mu, Sigma).log_prob(points[:, None]) + pi.log()
    torch.testing.assert_close(gmm.log_joint(points, pi, mu, Sigma), expected)


def test_responsibilities_sum_to_one_even_where_densities_underflow() -> None:
    far = torch.tensor([[500.0, -500.0, 500.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    joint = gmm.log_joint(far, *mixture(3, 3))
    assert (joint[0].exp() == 0).all()
    r, log_px = gmm.responsibilities(joint)
    torch.testing.assert_close(r.sum(1), torch.ones(2, dtype=torch.float64))
    assert torch.isfinite(r).all() and torch.isfinite(log_px).all()


def test_one_component_is_the_closed_form(points: torch.Tensor) -> None:
    pi, mu, Sigma = gmm.m_step(points, torch.ones(len(points), 1, dtype=torch.float64), floor=0.0)
    torch.testing.assert_close(mu[0], points.mean(0))
    torch.testing.assert_close(Sigma[0], points.T.cov(correction=0))
    assert pi.item() == pytest.approx(1)


def test_sampling_has_the_moments_of_the_mixture() -> None:
    torch.manual_seed(0)
    pi, mu, Sigma = mixture(3, 2)
    z, x = gmm.sample(pi, mu, Sigma, 200_000)
    mean = pi @ mu
    away = mu - mean
    cov = (pi[:, None, None] * (Sigma + away[:, :, None] * away[:, None, :])).sum(0)
    torch.testing.assert_close(torch.bincount(z) / len(z), pi.float(), atol=5e-3, rtol=0)
    torch.testing.assert_close(x.mean(0), mean, atol=2e-2, rtol=0)
    torch.testing.assert_close(x.T.cov(), cov, atol=5e-2, rtol=0)


def test_em_never_falls_and_is_scikit_learns(points: torch.Tensor) -> None:
    start = gmm.start_from(points, points[:4])
    path = gmm.em(points, *start, steps=30)
    values = [row[3] for row in path]
    assert all(after >= before - 1e-12 for before, after in pairwise(values))
    model = fitted(peer(start, max_iter=30), points)
    assert values[-1] == pytest.approx(model.score(points.numpy()), rel=1e-6)
    torch.testing.assert_close(path[-1][1], torch.from_numpy(model.means_), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_each_kind_of_covariance_is_scikit_learns(points: torch.Tensor, kind: str) -> None:
    theta = gmm.start_from(points, points[:3])
    theta = (*theta[:2], gmm.restrict(theta[2], theta[0], kind))
    model = fitted(peer(theta, kind, max_iter=5), points)
    for _ in range(5):
        r, _ = gmm.responsibilities(gmm.log_joint(points, *theta))
        pi, mu, Sigma = gmm.m_step(points, r, floor=1e-6)
        theta = pi, mu, gmm.restrict(Sigma, pi, kind)
    ours = gmm.log_joint(points, *theta).logsumexp(1).mean().item()
    assert ours == pytest.approx(model.score(points.numpy()), rel=1e-6)
    assert gmm.free_numbers(3, 3, kind) == model._n_parameters()


def test_elbo_plus_kl_is_log_p(points: torch.Tensor) -> None:
    joint = gmm.log_joint(points, *mixture(4, 3))
    r, log_px = gmm.responsibilities(joint)
    q = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((len(points),))
    KL = (q * (q.log() - r.log())).sum(1)
    torch.testing.assert_close(gmm.elbo(q, joint) + KL, log_px)
    assert (gmm.elbo(q, joint) <= log_px).all()


def test_a_component_that_is_ruled_out_adds_nothing() -> None:
    sure, joint = torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, -900.0]])
    assert gmm.elbo(sure, joint).item() == -2


@pytest.mark.parametrize(("K", "D", "chunk"), [(1, 1, 7), (4, 3, 64), (6, 9, 2048)])
def test_fast_em_is_plain_em(K: int, D: int, chunk: int) -> None:
    torch.manual_seed(0)
    x = gmm.sample(*mixture(4, D, seed=2), 300)[1] + 100  # far from the origin, where products lose digits
    start = gmm.start_from(x, x[:K])
    path = gmm.em(x, *start, steps=10)
    *theta, history = gmm.fast_em(x, *start, steps=10, chunk=chunk)
    for ours, plain in zip(theta, path[-1][:3], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9)
    assert history == pytest.approx([row[3] for row in path[:-1]], rel=1e-9)


def test_natural_parameters_give_the_log_joint(points: torch.Tensor) -> None:
    theta = mixture(5, 3)
    product = (gmm.natural_parameters(*theta) @ gmm.features(points)).T
    torch.testing.assert_close(product, gmm.log_joint(points, *theta))


def test_an_empty_component_stays_finite(points: torch.Tensor) -> None:
    start = gmm.start_from(points, torch.cat([points[:2], torch.full((1, 3), 1e6, dtype=torch.float64)]))
    for theta in (gmm.em(points, *start, steps=5)[-1][:3], gmm.fast_em(points, *start, steps=5)[:3]):
        assert all(torch.isfinite(value).all() for value in theta)
        assert theta[0][2] < 1e-6


def test_floor_keeps_a_component_from_collapsing() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    theta = gmm.em(x, *gmm.start_from(x, x), steps=50, floor=1e-2)[-1]
    assert torch.linalg.eigvalsh(theta[2]).min() >= 0.99e-2 and math.isfinite(theta[3])


def test_kmeans_plus_plus_spreads_out() -> None:
    crowds = torch.randn(40, 2, dtype=torch.float64) * 0.01 + torch.arange(4).repeat_interleave(10)[:, None] * 10.0
    assert len(gmm.kmeans_plus_plus(crowds, 4).div(10).round().unique(dim=0)) == 4


def test_density_of_drawings_is_that_of_the_whole_gaussian() -> None:
    """One component: mixture on PCA coordinates plus noise on the rest is one Gaussian with a known covariance."""
    torch.manual_seed(0)
    D, d, sigma2 = 7, 3, torch.tensor(0.3, dtype=torch.float64)
    B = torch.linalg.qr(torch.randn(D, d, dtype=torch.float64)).Q
    m, x = torch.randn(D, dtype=torch.float64), torch.randn(20, D, dtype=torch.float64)
    pi, mu, Sigma = (
        torch.ones(1, dtype=torch.float64),
        torch.randn(1, d, dtype=torch.float64),
        mixture(1, d)[2],
    )
    cov = B @ Sigma[0] @ B.T + sigma2 * (torch.eye(D, dtype=torch.float64) - B @ B.T)
    expected = torch.distributions.MultivariateNormal(m + B @ mu[0], cov).log_prob(x)
    torch.testing.assert_close(gmm.drawing_log_p(x, m, B, sigma2, pi, mu, Sigma), expected)


def test_a_uniform_density_costs_eight_bits() -> None:
    assert gmm.bits_per_dim(torch.zeros(2), 12288).tolist() == [8.0, 8.0]


@pytest.mark.parametrize("name", ["log_joint", "m_step", "fast_em", "sample"])
def test_nothing_is_tied_to_the_cpu(name: str) -> None:
    pi, mu, Sigma = (value.to("meta") for value in mixture(3, 2))
    x = torch.empty(10, 2, dtype=torch.float64, device="meta")
    if name == "log_joint":
        assert gmm.responsibilities(gmm.log_joint(x, pi, mu, Sigma))[0].device.type == "meta"
    elif name == "m_step":
        assert gmm.m_step(x, torch.empty(10, 3, dtype=torch.float64, device="meta"))[2].device.type == "meta"
    elif name == "fast_em":
        phi, theta = gmm.features(x), gmm.natural_parameters(pi, mu, Sigma)
        assert gmm.m_step_from_sums((theta @ phi) @ phi.T, 2, 1e-6)[2].device.type == "meta"
    else:
        assert gmm.sample(pi, mu, Sigma, 4)[1].device.type == "meta"
