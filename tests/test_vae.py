"""Lesson 02's functions against torch, closed forms and what must hold for any VAE."""

import math

import pytest
import torch
from torch import Tensor

from course_utils import pretrained
from course_utils.data import drawings
from course_utils.models import vae
from course_utils.training import train

SMALL = {"d": 6, "widths": (8, 16, 24)}
SHIPPED = ("vae", "vae_gaussian", "cvae")


def small(**config) -> vae.VAE:
    torch.manual_seed(0)
    return vae.VAE(**(SMALL | config)).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return drawings("validation")[torch.arange(4)]["image"]


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> tuple[vae.VAE, dict]:
    _, card = pretrained.load_checkpoint(request.param)
    model, card = pretrained.load_checkpoint(request.param, vae.VAE(**card["config"]))
    return model.eval().requires_grad_(False), card


# ------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("mean", [-0.2, 0.0, 0.3, 0.999, 1.3])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 0.0])
def test_the_256_masses_sum_to_one(mean: float, log_scale: float) -> None:
    mass = vae.log_logistic(torch.arange(256.0).double(), torch.tensor(mean).double(), torch.tensor(log_scale).double())
    assert mass.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_a_mass_is_a_difference_of_torchs_distribution_function() -> None:
    mean, scale = torch.tensor(0.4).double(), torch.tensor(0.05).double()
    base = torch.distributions.Uniform(torch.tensor(0.0).double(), 1.0)
    transforms = [torch.distributions.SigmoidTransform().inv, torch.distributions.AffineTransform(mean, scale)]
    logistic = torch.distributions.TransformedDistribution(base, transforms)
    v = torch.arange(1.0, 255.0).double()
    expected = (logistic.cdf((v + 1) / 256) - logistic.cdf(v / 256)).log()
    torch.testing.assert_close(vae.log_logistic(v, mean, scale.log()), expected, atol=1e-6, rtol=1e-6)


def test_a_hopeless_value_has_a_finite_log_mass_and_gradient() -> None:
    mean = torch.tensor(0.0, requires_grad=True)
    log_p = vae.log_logistic(torch.tensor(200.0), mean, torch.tensor(-7.0))
    log_p.backward()
    assert log_p.isfinite() and log_p < -500 and mean.grad > 0


def test_the_gaussian_is_torchs_at_a_random_place_of_the_bin() -> None:
    torch.manual_seed(0)
    got = vae.log_gaussian(
        torch.full((50_000,), 128.0).double(), torch.tensor(0.5).double(), torch.tensor(-4.0).double()
    )
    x = torch.linspace(128, 129, 50_001).double() / 256
    expected = torch.distributions.Normal(0.5, math.exp(-4)).log_prob(x).mean() - math.log(256)
    assert got.mean().item() == pytest.approx(expected.item(), abs=1e-3)


# --------------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
def test_the_kl_is_torchs(likelihood: str, images: Tensor) -> None:
    model = small(likelihood=likelihood)
    mu, log_sigma = model.posterior(images)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, log_sigma.exp()), normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(vae.elbo_terms(model, images)[1], expected, rtol=1e-5, atol=1e-4)


def test_negative_elbo_is_the_terms_in_bits_and_beta_weighs_the_kl(images: Tensor) -> None:
    model = small()
    torch.manual_seed(1)
    reconstruction, kl = vae.elbo_terms(model, images)
    for beta in (0.0, 1.0, 4.0):
        torch.manual_seed(1)
        expected = (beta * kl - reconstruction).mean() / (12288 * math.log(2))
        torch.testing.assert_close(vae.negative_elbo(model, images, beta=beta), expected)


def test_more_samples_do_not_lower_the_bound(shipped: tuple, images: Tensor) -> None:
    model, card = shipped
    torch.manual_seed(0)
    given = card["config"].get("given", 0)
    c = torch.zeros(given).index_fill(0, torch.tensor([0, 4]), 1.0) if given else None
    weights = vae.log_weights(model, images[0], 400, c)
    bounds = [vae.iwae_bound(weights, k).item() for k in (1, 4, 40, 400)]
    assert bounds == sorted(bounds) and weights.shape == (400,)


def test_the_importance_weighted_bound_of_one_sample_is_the_elbo(shipped: tuple, images: Tensor) -> None:
    model, card = shipped
    given = card["config"].get("given", 0)
    c = torch.zeros(given) if given else None
    torch.manual_seed(0)
    weights = vae.log_weights(model, images[0], 600, c)
    many = images[:1].expand(600, -1, -1, -1)
    reconstruction, kl = vae.elbo_terms(model, many, None if c is None else c.expand(600, -1))
    elbo, error = (reconstruction - kl).mean(), (weights.std() + reconstruction.std()) / 600**0.5
    assert (weights.mean() - elbo).abs() < 5 * error
    assert vae.iwae_bound(weights, 600) >= elbo - 5 * error


def test_iwae_bound_averages_over_groups() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0, 99.0])
    pairs = [torch.tensor(pair).exp().mean().log() for pair in ([0.0, 1.0], [2.0, 3.0])]
    torch.testing.assert_close(vae.iwae_bound(weights, 2), torch.stack(pairs).mean())


# ------------------------------------------------------------------------------------------- what is shipped


def test_shipped_vaes_beat_the_mixture_and_use_their_dimensions(shipped: tuple) -> None:
    model, card = shipped
    held_out = drawings("pairs")[torch.arange(0, 400, 4)]["image"]  # they are sorted by concept
    mu, _ = model.posterior(held_out)
    assert (mu.var(0) > 0.01).float().mean() >= 0.5
    if card["name"] != "cvae":
        torch.manual_seed(0)
        bits = vae.negative_elbo(model, held_out).item()
        assert bits == pytest.approx(card["metrics"]["pairs/bits_per_dim"], abs=0.15)
        mixture = pretrained.load_checkpoint("gmm")[1]["metrics"]
        for split in ("pairs", "concepts"):
            assert card["metrics"][f"{split}/bits_per_dim"] < mixture[f"{split}/bits_per_dim"] - 0.1


def test_cards_say_that_5000_samples_tighten_the_bound(shipped: tuple) -> None:
    _, card = shipped
    metrics = card["metrics"]
    assert metrics["pairs/iwae_bits_per_dim"] < metrics["pairs/iwae_elbo_bits_per_dim"]
    assert metrics["pairs/iwae_drawings"] == 5 and metrics["pairs/active_units"] >= card["config"]["d"] / 2


def test_the_condition_changes_the_drawing_and_not_the_posterior() -> None:
    _, card = pretrained.load_checkpoint("cvae")
    model, _ = pretrained.load_checkpoint("cvae", vae.VAE(**card["config"]))
    image = drawings("pairs")[torch.arange(1)]["image"]
    with torch.no_grad():
        z = model.eval().posterior(image)[0].expand(4, -1)
        c = vae.condition(torch.arange(4), torch.zeros(4, dtype=torch.int64))
        drawn = model.decode(z, c)[0]
    assert c.shape == (4, 13) and c.sum(1).tolist() == [2.0] * 4
    for one in range(3):
        assert (drawn[one] - drawn[one + 1]).abs().mean() > 0.01


# ------------------------------------------------------------------------------------ errors, devices, training


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(2, 3, 32, 32), "(2, 3, 32, 32)"),
        (torch.zeros(3, 64, 64), "(3, 64, 64)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "uint8"),
        (torch.full((2, 3, 64, 64), 255.0), "divide by 255"),
        (torch.full((2, 3, 64, 64), -0.5), "[0, 1]"),
        (torch.full((2, 3, 64, 64), math.nan), "[0, 1]"),
    ],
)
def test_a_wrong_picture_is_refused_in_one_sentence(wrong: Tensor, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        vae.elbo_terms(small(), wrong)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_negative_beta_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"beta=-0\.5"):
        vae.negative_elbo(small(), images, beta=-0.5)


@pytest.mark.parametrize("config", [{}, {"likelihood": "gaussian"}, {"given": 13}])
def test_a_step_stays_on_the_models_device(config: dict) -> None:
    meta = torch.device("meta")
    model = small(**config).to(meta)
    c = vae.condition(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)).to(meta)
    loss = vae.negative_elbo(model, torch.empty(2, 3, 64, 64, device=meta), c if "given" in config else None)
    loss.backward()
    assert loss.device == meta
    assert {p.grad.device for p in model.parameters() if p.grad is not None} == {meta}


def test_training_lowers_the_bound(images: Tensor) -> None:
    run = train(small(), lambda model, batch: vae.negative_elbo(model, batch["image"]), drawings("fit"), steps=30,
                batch_size=16, warmup=5, learning_rate=3e-3)  # fmt: skip
    losses = [row["loss"] for row in run.history]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5
