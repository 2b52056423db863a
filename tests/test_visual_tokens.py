"""Lesson 05's quantisers and tokenizers: closed forms, the library's layer, dead codes, and what they refuse."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from course_utils import evaluation, pretrained
from course_utils.data import drawings
from course_utils.models import visual_tokens as vt
from course_utils.training import Run, train

KINDS = {
    "dvae": lambda codes: vt.DiscreteQuantiser(codes, cooling=20),
    "vq": lambda codes: vt.VectorQuantiser(codes),
    "fsq": lambda codes: vt.FiniteScalarQuantiser((4, codes // 4)),
}


@pytest.fixture(params=KINDS)
def small(request: pytest.FixtureRequest) -> vt.VisualTokenizer:
    torch.manual_seed(0)
    return vt.VisualTokenizer(KINDS[request.param](32), widths=(8, 12), depths=(1, 1))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return drawings("validation")[torch.arange(6)]["image"]


def objective(model: vt.VisualTokenizer, batch: dict[str, Tensor]) -> Tensor:
    drawn, _, cost, style = model(batch["image"])
    named = F.cross_entropy(style, batch["style"])
    return (50 * (drawn - batch["image"]).square().flatten(1).sum(1).mean() + cost + 5000 * named) / 12288


# ---------------------------------------------------------------------------------------------------- quantisers


@pytest.mark.parametrize("codes", [2, 512, 8192])
def test_the_kl_is_the_librarys_and_never_passes_log_k(codes: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, codes) * 4
    uniform = torch.distributions.Categorical(logits=torch.zeros(codes))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), uniform)
    torch.testing.assert_close(vt.kl_to_uniform(logits), expected, atol=1e-4, rtol=1e-4)
    certain = torch.zeros(codes).index_fill(0, torch.tensor([1]), 200.0)
    assert vt.kl_to_uniform(certain).item() == pytest.approx(math.log(codes), rel=1e-5)
    assert vt.kl_to_uniform(torch.zeros(codes)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("tau", [2.0, 0.5, 1 / 16])
def test_gumbel_samples_win_as_often_as_the_softmax_says_at_any_temperature(tau: float) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([1.5, 0.0, -1.0, 0.5])
    y = vt.gumbel_softmax(logits.expand(200_000, 4), tau)
    torch.testing.assert_close(y.sum(1), torch.ones(len(y)))
    share = y.argmax(1).bincount(minlength=4) / len(y)
    assert (share - logits.softmax(0)).abs().max() < 4 * 0.5 / math.sqrt(len(y))


@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_a_temperature_that_softens_nothing_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="take it above 0"):
        vt.gumbel_softmax(torch.zeros(3), tau)


def test_the_dvae_cools_while_it_learns_and_takes_the_likeliest_code_afterwards() -> None:
    torch.manual_seed(0)
    layer, h = vt.DiscreteQuantiser(24, d=8, cooling=10), torch.randn(4, 64, 8)
    kls = [layer(h)[2].item() for _ in range(12)]
    assert kls[0] == 0 and kls[0] < kls[1] < kls[2] < kls[3] == kls[-1]
    assert layer.step == 12
    z, ids, _ = layer.eval()(h)
    assert (
        torch.equal(ids, (h @ layer.codebook.T).argmax(2)) and torch.equal(z, layer.codebook[ids]) and layer.step == 12
    )


def test_the_nearest_code_is_the_nearest_also_under_autocast() -> None:
    torch.manual_seed(0)
    h, codebook = torch.randn(500, 16), torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = vt.nearest_code(h, codebook)
    assert torch.equal(found, torch.cdist(h, codebook).argmin(1))


def test_vq_is_the_librarys_layer() -> None:
    torch.manual_seed(0)
    ours = vt.VectorQuantiser(32, d=8, restart=False)
    library = VectorQuantize(8, 32, decay=0.99, commitment_weight=0.25, eps=1e-9, rotation_trick=False)
    library._codebook.embed.copy_(ours.means.codebook)
    library._codebook.embed_avg.copy_(ours.means.total)
    for _ in range(5):
        h = torch.randn(3, 64, 8, requires_grad=True)
        z, ids, cost = ours(h)
        expected, expected_ids, expected_cost = library(h)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(cost, 64 * 8 * expected_cost)  # its mean over numbers, ours the sum over a drawing
        weight = torch.randn_like(h)
        gradients = [
            torch.autograd.grad((weight * out).sum() + loss, h)[0]
            for out, loss in ((z, cost), (expected, 64 * 8 * expected_cost))
        ]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(ours.means.codebook[None], library._codebook.embed, atol=1e-5, rtol=1e-5)


def test_codes_start_at_the_vectors_and_a_dead_one_starts_anew() -> None:
    torch.manual_seed(0)
    far = torch.randn(4, 64, 2) * 0.1 + 50
    left, cured = vt.VectorQuantiser(16, 2, restart=False), vt.VectorQuantiser(16, 2)
    for layer in (left, cured):
        for _ in range(400):
            _, ids, _ = layer(far)
        layer.used = len(ids.unique())
    assert left.used < 4 and cured.used > 12
    with torch.no_grad():
        cured.means.codebook[3], cured.means.members[3] = -1e4, 0.0
        cured(far)
    assert (cured.means.codebook[3] - 50).abs().max() < 1


def test_every_point_of_the_grid_is_reached_and_read_back() -> None:
    layer = vt.FiniteScalarQuantiser((5, 3, 8))
    points = layer.lookup(torch.arange(120))
    assert len(points.unique(dim=0)) == 120 and points.min() == -1 and points.max() == 1
    inside = ((points + 1) / 2 * (layer.levels - 1) + 0.5) / layer.levels  # the middle of each level
    z, ids, cost = layer(inside.logit()[:, None])
    assert ids[:, 0].tolist() == list(range(120)) and cost == 0
    torch.testing.assert_close(z[:, 0], points)
    extreme = layer(torch.tensor([[[1e4, -1e4, 0.0]]]))
    assert extreme[0].isfinite().all() and extreme[0].abs().max() <= 1 and 0 <= extreme[1].item() < 120


# ---------------------------------------------------------------------------------------------------- tokenizers


def test_what_is_encoded_is_decoded_as_the_whole_model_does(small: vt.VisualTokenizer, images: Tensor) -> None:
    small.eval()
    drawn, ids, _, style = small(images)
    assert ids.shape == (6, 64) and ids.dtype == torch.int64 and 0 <= ids.min() <= ids.max() < small.codes == 32
    assert torch.equal(small.encode(images), ids)
    torch.testing.assert_close(small.decode(ids), drawn)
    torch.testing.assert_close(small.decode(ids[2:3]), drawn[2:3])
    assert style.shape == (6, 4) and drawn.shape == images.shape and drawn.min() >= 0 and drawn.max() <= 1


def test_the_encoder_learns_through_the_choice(small: vt.VisualTokenizer, images: Tensor) -> None:
    run = train(small, objective, drawings("validation"), steps=10, batch_size=8, device="cpu")
    assert all(entry["grad_norm"] > 0 for entry in run.history)
    for part in (0, 3):  # the drawing alone, and the style alone
        small.zero_grad()
        small(images)[part].square().sum().backward()
        assert small.encoder[1].weight.grad.abs().sum() > 0


def test_a_run_that_was_stopped_ends_bit_for_bit_where_the_whole_one_ends(
    small: vt.VisualTokenizer, tmp_path: Path
) -> None:
    """Temperature, moving means and restarted codes are part of what is saved."""

    def stop(run: Run) -> None:
        if run.step == 20:
            raise KeyboardInterrupt

    start = {key: value.clone() for key, value in small.state_dict().items()}
    sizes = {"steps": 40, "batch_size": 8, "device": "cpu"}
    train(small, objective, drawings("validation"), **sizes)
    whole = {key: value.clone() for key, value in small.state_dict().items()}
    small.load_state_dict(start)
    resumable = sizes | {"folder": tmp_path, "save_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(small, objective, drawings("validation"), callbacks=(stop,), **resumable)
    small.load_state_dict(start)
    run = train(small, objective, drawings("validation"), **resumable)
    assert run.step == 40
    for key, value in small.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_a_faint_shade_is_a_clear_step() -> None:
    images = torch.full((1, 3, 64, 64), 0.5)
    images[..., 32:] += 1 / 255
    images[:, :, 10:] -= 0.3
    steps = vt.with_steps(images)
    assert torch.equal(steps[:, :3], 2 * images - 1)
    right, down = steps[:, 3:6], steps[:, 6:]
    assert (right[..., 31] > 0.2).all() and right[..., 31].numel() == (right.abs() > 1e-4).sum()
    assert (down[:, :, 9] < -0.99).all() and down[:, :, 9].numel() == (down.abs() > 1e-4).sum()


def test_each_pixel_takes_the_nearest_of_its_own_drawings_inks() -> None:
    torch.manual_seed(0)
    images, inks = torch.rand(3, 3, 8, 8), torch.rand(3, 5, 3)
    printed = vt.nearest_ink(images, inks)
    for drawing, own, found in zip(images, inks, printed, strict=True):
        errors = (drawing[None] - own[:, :, None, None]).square().sum(1)
        assert torch.equal(found.movedim(0, -1), own[errors.argmin(0)])
    assert torch.equal(vt.nearest_ink(printed, inks), printed)


def test_only_styles_that_print_are_printed(small: vt.VisualTokenizer, images: Tensor) -> None:
    small.eval()
    drawn, ids, _, style = small(images)
    small.inks.copy_(torch.rand(4, 64, 3))
    torch.testing.assert_close(small.decode(ids), drawn)
    small.prints[style.argmax(1)] = True
    found = small.decode(ids).movedim(1, -1)
    for drawing, own in zip(found, style.argmax(1), strict=True):
        assert (drawing.flatten(0, 1)[:, None] == small.inks[own]).all(2).any(1).all()


@pytest.mark.parametrize("wrong", [(0, 3, 64, 64), (2, 3, 32, 32), (3, 64, 64), (2, 1, 64, 64)])
def test_what_is_no_drawing_is_refused(small: vt.VisualTokenizer, wrong: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 64, 64\)"):
        small.encode(torch.zeros(wrong))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 64), 32), "from 0 to 31, not 32 to 32"),
        (torch.full((1, 64), -1), "from 0 to 31, not -1 to -1"),
        (torch.zeros(1, 63, dtype=torch.int64), r"64 integers, \(B, 64\)"),
        (torch.zeros(64, dtype=torch.int64), r"64 integers, \(B, 64\)"),
        (torch.zeros(1, 64), "not torch.float32"),
    ],
)
def test_integers_that_no_drawing_has_are_refused(small: vt.VisualTokenizer, ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.decode(ids)


# ---------------------------------------------------------------------------------------------- shipped tokenizers


FULL = {
    "dvae": lambda: vt.DiscreteQuantiser(2048),
    "vq": lambda: vt.VectorQuantiser(2048),
    "fsq": lambda: vt.FiniteScalarQuantiser((8, 8, 8, 4)),
}


@pytest.mark.parametrize("kind", FULL)
@torch.no_grad()
def test_a_shipped_tokenizer_reads_back_what_its_card_says(kind: str) -> None:
    model, card = pretrained.load_checkpoint(f"tokens_{kind}", vt.VisualTokenizer(FULL[kind]()))
    parts = torch.arange(400).split(100)
    pairs, measured = drawings("pairs"), card["metrics"]
    drawn = torch.cat([model.eval().decode(model.encode(pairs[rows]["image"])) for rows in parts])
    found = evaluation.psnr((255 * drawn).round() / 255, pairs.images / 255).mean().item()
    assert found == pytest.approx(measured["pairs/psnr"], abs=0.02)
    assert found > evaluation.psnr(drawn.roll(1, 0), pairs.images / 255).mean() + 5
    style = evaluation.load_judge()[0].style(drawn).argmax(1) == pairs.style
    assert style.float().mean().item() == pytest.approx(measured["pairs/judge_style"], abs=0.01)


@torch.no_grad()
def test_a_part_of_the_drawings_needs_no_more_codes_than_all_of_them() -> None:
    model, card = pretrained.load_checkpoint("tokens_fsq", vt.VisualTokenizer(FULL["fsq"]()))
    ids = model.eval().encode(drawings("train")[torch.arange(0, 5452, 8)]["image"])
    assert 0.5 < len(ids.unique()) / model.codes <= card["metrics"]["train/code_use"]
