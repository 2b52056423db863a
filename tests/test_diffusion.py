"""Schedules, targets and samplers against closed forms and against diffusers; the U-Net and its shipped weights."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from course_utils import data, pretrained
from course_utils.models.diffusion import (
    Look,
    UNet,
    alpha_sigma,
    clean_and_noise,
    cosine_logsnr,
    ddim,
    ddpm_levels,
    denoiser,
    guided,
    heun,
    straight_levels,
    target,
    way_back,
)

KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")
BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA = (1 - BETA).sqrt().cumprod(0)
MEAN, SPREAD = 0.7, 0.3  # of the Gaussian that the samplers shall draw


def gaussian(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The exact E[x0 | x] and E[eps | x] for x0 ~ N(MEAN, SPREAD^2)."""
    away = (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
    return MEAN + alpha * SPREAD**2 * away, sigma * away


def bent(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Any network that is not linear."""
    return clean_and_noise(torch.tanh(x) + sigma * x, x, alpha, sigma, "v_prediction")


@pytest.fixture
def small() -> UNet:
    torch.manual_seed(0)
    return UNet(36, (16, 24), 32).eval()


def test_variance_stays_one_and_noise_only_grows() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    logsnr = cosine_logsnr(t)
    alpha, sigma = alpha_sigma(logsnr)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(t))
    assert torch.allclose((alpha / sigma).square().log(), logsnr)
    assert (logsnr.diff() < 0).all() and torch.allclose(logsnr[[0, -1]], logsnr.new_tensor([13, -10]))
    assert (alpha[20:80] - torch.cos(math.pi * t[20:80] / 2)).abs().max() < 0.01


def test_alpha_and_sigma_take_the_shape_of_what_they_multiply() -> None:
    alpha, sigma = alpha_sigma(torch.zeros(5), torch.ones(5, 3, 8, 8))
    assert alpha.shape == sigma.shape == (5, 1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("straight", [False, True])
def test_every_target_means_the_same_two_things(kind: str, straight: bool) -> None:
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 500, 3)
    alpha, sigma = alpha_sigma(torch.empty(500, 1).uniform_(-6, 6))
    if straight:
        alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
    x = alpha * x0 + sigma * eps
    found = clean_and_noise(target(x0, eps, alpha, sigma, kind), x, alpha, sigma, kind)
    # an error of float32 in x is 1 / alpha of it in x0, and 1 / sigma of it in eps
    assert ((found[0] - x0) * alpha).abs().max() < 1e-5 and ((found[1] - eps) * sigma).abs().max() < 1e-5


def test_unknown_targets_are_refused() -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match='no target "noise": use epsilon'):
        clean_and_noise(x, x, x, x, "noise")
    with pytest.raises(ValueError, match='no target "noise": use epsilon'):
        target(x, x, x, x, "noise")


def test_the_way_back_undoes_the_way_there() -> None:
    """q(x_s | x_t, x0), averaged over q(x_t | x0), must be q(x_s | x0)."""
    now, then = ((ALPHA[i], (1 - ALPHA[i] ** 2).sqrt()) for i in (400, 300))
    x0 = torch.tensor(0.3, dtype=torch.float64)
    at_mean, variance = way_back(now[0] * x0, x0, now, then)
    slope = way_back(now[0] * x0 + 1, x0, now, then)[0] - at_mean
    assert torch.isclose(at_mean, then[0] * x0)
    assert torch.isclose(slope**2 * now[1] ** 2 + variance, then[1] ** 2)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_samplers_equal_those_of_diffusers(steps: int) -> None:
    torch.manual_seed(0)
    known = {"trained_betas": BETA.numpy(), "clip_sample": False, "prediction_type": "v_prediction"}
    x = torch.randn(64, 3)
    old, new = ddpm_levels(ALPHA, steps).float(), straight_levels(steps).float()
    for scheduler, eta, levels in (
        (DDPMScheduler(**known), 1.0, old),
        (DDIMScheduler(**known), 0.0, old),
        (FlowMatchEulerDiscreteScheduler(), 0.0, new),
    ):
        straight = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        scheduler.set_timesteps(**({"sigmas": levels[:-1, 1].tolist()} if straight else {"num_inference_steps": steps}))
        theirs = x
        for t, (alpha, sigma) in zip(scheduler.timesteps, levels, strict=False):
            x0, eps = bent(theirs, alpha, sigma)
            said = target(x0, eps, alpha, sigma, "flow_prediction" if straight else "v_prediction")
            extra = {"generator": torch.Generator().manual_seed(1 + int(t))} if eta else {}
            theirs = scheduler.step(said, t, theirs, **extra).prev_sample
        ours = x
        for t, pair in zip(scheduler.timesteps, levels.unfold(0, 2, 1), strict=True):
            ours = ddim(bent, ours, pair.T, eta, torch.Generator().manual_seed(1 + int(t)))
        assert (ours - theirs).abs().max() < 1e-4, type(scheduler).__name__


@pytest.mark.parametrize(("way", "order"), [(ddim, 1), (heun, 2)])
def test_order_of_convergence(way, order: int) -> None:
    """For Gaussian data the exact end is known: the same quantile, MEAN + SPREAD x."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = [(way(gaussian, x, straight_levels(n)) - (MEAN + SPREAD * x)).abs().max() for n in (64, 128)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


def test_ancestral_samples_have_the_right_mean_and_spread() -> None:
    torch.manual_seed(0)
    x = ddim(gaussian, torch.randn(20_000, dtype=torch.float64), ddpm_levels(ALPHA, 500), eta=1.0)
    assert abs(x.mean() - MEAN) < 0.01 and abs(x.std() - SPREAD) < 0.01


def test_ancestral_sampling_is_seeded_and_ddim_is_not_random() -> None:
    x, levels = torch.zeros(3), ddpm_levels(ALPHA, 5).float()
    a, b, c = (ddim(bent, x, levels, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(ddim(bent, x, levels), ddim(bent, x, levels))


def test_levels_end_without_noise() -> None:
    for levels in (ddpm_levels(ALPHA, 10), straight_levels(10)):
        assert levels.shape == (11, 2) and levels[-1].tolist() == [1, 0] and (levels[:, 1].diff() < 0).all()


@pytest.mark.parametrize(
    ("levels", "eta"), [(torch.ones(1, 2), 0.0), (torch.ones(3, 2), -0.1), (torch.ones(3, 2), 1.5)]
)
def test_samplers_refuse_what_means_nothing(levels: Tensor, eta: float) -> None:
    with pytest.raises(ValueError, match="two levels or more and eta from 0 to 1"):
        ddim(bent, torch.zeros(2), levels, eta)


def test_heun_refuses_other_levels_than_those_of_the_straight_path() -> None:
    with pytest.raises(ValueError, match="take the levels of straight_levels"):
        heun(gaussian, torch.zeros(2), ddpm_levels(ALPHA, 5))


def test_guidance() -> None:
    told, untold = torch.randn(2, 5)
    assert torch.equal(guided(told, untold, 0), untold) and torch.allclose(guided(told, untold, 1), told)
    with pytest.raises(ValueError, match=r"guidance_scale=-1 .* take 0 or more"):
        guided(told, untold, -1)


def test_attention_adds_only_its_bias_at_the_start_and_then_sees_all_places() -> None:
    torch.manual_seed(0)
    look, x = Look(16), torch.randn(1, 16, 4, 4, requires_grad=True)
    assert torch.allclose(look(x), x + look.out.bias.view(1, 16, 1, 1))
    torch.nn.init.normal_(look.out.weight)
    (gradient,) = torch.autograd.grad(look(x)[0, :, 0, 0].sum(), x)
    assert (gradient.abs().sum(1) > 0).all()


def test_unet_shapes_and_that_every_weight_learns(small: UNet) -> None:
    x, logsnr, label = torch.randn(3, 3, 64, 64), torch.tensor([-9.0, 0.0, 12.0]), torch.tensor([0, 17, 36])
    assert small(x, logsnr, label).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x, logsnr, label).dtype == torch.float32
    torch.nn.init.normal_(small.looks[0].out.weight)
    torch.nn.init.normal_(small.looks[1].out.weight)
    for block in (*small.fine, *small.coarse, *small.back):
        torch.nn.init.normal_(block.conv2.weight)
    small(x, logsnr, label).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())


def test_the_label_and_the_level_matter(small: UNet) -> None:
    for block in (*small.fine, *small.coarse, *small.back):
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, zero = torch.randn(1, 3, 64, 64), torch.zeros(1)
    first = small(x, zero, torch.tensor([0]))
    assert not torch.allclose(first, small(x, zero, torch.tensor([1])))
    assert not torch.allclose(first, small(x, zero + 3, torch.tensor([0])))


def test_one_network_serves_every_schedule(small: UNet) -> None:
    torch.manual_seed(0)
    x, label = torch.randn(2, 3, 64, 64), torch.tensor([3, 5])
    denoise, r = denoiser(small, label), math.sqrt(0.3**2 + 0.7**2)
    straight = denoise(x, torch.tensor(0.3), torch.tensor(0.7))
    kept = denoise(x / r, torch.tensor(0.3 / r), torch.tensor(0.7 / r))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(straight, kept, strict=True))
    assert torch.allclose(0.3 * straight[0] + 0.7 * straight[1], x, atol=1e-5)


def test_pure_noise_and_no_noise_are_finite(small: UNet) -> None:
    denoise, x = denoiser(small, torch.tensor([0])), torch.randn(1, 3, 64, 64)
    for alpha, sigma in ((0.0, 1.0), (1.0, 0.0)):
        assert all(v.isfinite().all() for v in denoise(x, torch.tensor(alpha), torch.tensor(sigma)))


def test_guidance_asks_twice_and_only_where_needed(small: UNet) -> None:
    labels = []
    small.register_forward_hook(lambda _, inputs, __: labels.append(inputs[2].tolist()))
    x, level = torch.randn(1, 3, 64, 64), (torch.tensor(0.6), torch.tensor(0.8))
    denoiser(small, torch.tensor([4]))(x, *level)
    assert labels == [[4]]
    denoiser(small, torch.tensor([4]), 2.0)(x, *level)
    assert labels[1:] == [[4], [36]]


def test_the_shipped_network_removes_noise_that_it_has_not_seen() -> None:
    model, card = pretrained.load_checkpoint("pixel_diffusion", UNet(36))
    part = data.drawings("pairs").select(torch.arange(0, 400, 10))
    batch = part[torch.arange(len(part))]
    x0, label = 2 * batch["image"] - 1, 4 * batch["category"] + batch["style"]
    torch.manual_seed(0)
    alpha, sigma = alpha_sigma(torch.tensor(2.0))
    found, _ = denoiser(model.eval(), label)(alpha * x0 + sigma * torch.randn_like(x0), alpha, sigma)
    noised = alpha * x0 + sigma * torch.randn_like(x0)
    blurred = torch.nn.functional.avg_pool2d(noised / alpha, 5, 1, 2, count_include_pad=False)
    assert (found - x0).square().mean() < 0.5 * (blurred - x0).square().mean()
    before = pretrained.load_checkpoint("vae")[1]["metrics"]["pairs/bits_per_dim"]
    assert card["metrics"]["test/score_error"] < 0.05 and card["metrics"]["pairs/bits_per_dim"] < before
