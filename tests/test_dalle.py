"""Lesson 06's transformer: blind to what comes later, the same with a cache and without, and what sampling refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from course_utils import data
from course_utils.models import dalle
from course_utils.models.dalle import DALLE, PLACES, CausalAttention, distribution, read, write


@pytest.fixture
def small() -> DALLE:
    torch.manual_seed(0)
    return DALLE(40, 32, places=6, d=16, depth=2, heads=2).eval()


@pytest.fixture
def text() -> Tensor:
    return torch.tensor([[3, 7, 9, 0, 0, 0], [5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def test_attention_is_the_librarys() -> None:
    torch.manual_seed(0)
    attention, x = CausalAttention(16, heads=4), torch.randn(3, 9, 16)
    q, k, v = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in attention.qkv(x).chunk(3, 2))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention(x), attention.out(mixed.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 17, 62])
def test_no_integer_sees_those_that_come_later(small: DALLE, text: Tensor, place: int) -> None:
    vectors = small.embed_drawing(torch.randint(32, (3, 64))).detach().requires_grad_()
    hidden = small.read(torch.cat([small.embed_text(text), vectors], 1))[:, small.places + 1 :]
    (seen,) = torch.autograd.grad(hidden[1, place, 0], vectors)
    assert seen[[0, 2]].abs().sum() == 0
    assert seen[1].abs().sum(1).bool().tolist() == [True] * (place + 1) + [False] * (63 - place)


def test_with_the_cache_as_without(small: DALLE, text: Tensor) -> None:
    ids = torch.randint(32, (3, 64))
    with torch.no_grad():
        _, expected = small(text, ids[:, :-1])
        cache, start, found = dalle.empty_cache(small, 3), 0, []
        x = torch.cat([small.embed_text(text), small.embed_drawing(ids[:, :5])], 1)
        for n in range(5, 64):
            found.append(small.next_code(small.read(x, cache, start)[:, -1]))
            start += x.shape[1]
            x = small.embed_drawing(ids[:, n : n + 1], n)
    torch.testing.assert_close(torch.stack(found, 1), expected[:, 5:], atol=1e-4, rtol=1e-4)


def test_what_is_written_is_the_likeliest_where_the_temperature_is_zero(small: DALLE, text: Tensor) -> None:
    *_, ids = write(small, text, temperature=0)
    with torch.no_grad():
        _, logits = small(text, ids[:, :-1])
    assert torch.equal(logits.argmax(2), ids)


def test_drawings_follow_the_models_own_distribution(small: DALLE, text: Tensor) -> None:
    many = text[:1].expand(4000, -1)
    torch.manual_seed(0)
    first = next(write(small, many))[:, 0]
    with torch.no_grad():
        _, logits = small(text[:1], first[:0][None])
    p = logits[0, 0].softmax(0)
    assert (first.bincount(minlength=32) / 4000 - p).abs().max() < 4 * (p.max() / 4000).sqrt()


def test_it_goes_on_from_what_is_there(small: DALLE, text: Tensor) -> None:
    upper = torch.randint(32, (3, 40))
    steps = list(write(small, text, upper))
    assert len(steps) == 24 and steps[-1].shape == (3, 64)
    assert all(torch.equal(ids[:, :40], upper) for ids in steps)


def test_guidance_of_one_is_none_and_of_zero_forgets_the_caption(small: DALLE, text: Tensor) -> None:
    def drawn(prompt: Tensor, **knobs: float) -> Tensor:
        torch.manual_seed(0)
        *_, ids = write(small, prompt, **knobs)
        return ids

    assert torch.equal(drawn(text), drawn(text, guidance=1.0))
    assert torch.equal(drawn(text, guidance=0.0), drawn(torch.zeros_like(text)))


@pytest.mark.parametrize("p", [0.3, 0.9, 1.0])
def test_the_nucleus_is_the_smallest_set_that_reaches_p(p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 20) * 2
    plain, kept = logits.softmax(1), distribution(logits, top_p=p)
    torch.testing.assert_close(kept.sum(1), torch.ones(50))
    for row, rest in zip(plain, kept, strict=True):
        inside = row[rest > 0]
        assert inside.sum() >= p - 1e-5 and inside.sum() - inside.min() < p
        assert (row[rest == 0] <= inside.min()).all()
        torch.testing.assert_close(rest[rest > 0], inside / inside.sum())


def test_temperature_and_top_k() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    torch.testing.assert_close(distribution(logits), logits.softmax(0))
    torch.testing.assert_close(distribution(logits, temperature=0.5), (2 * logits).softmax(0))
    assert distribution(logits, temperature=0).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(distribution(logits, top_k=2), F.pad(logits[:2].softmax(0), (0, 2)))
    torch.testing.assert_close(distribution(logits, top_k=9), logits.softmax(0))


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"temperature": -0.1}, "temperature of -0.1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 2.0}, "top_p=2.0"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(small: DALLE, text: Tensor, knob: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(write(small, text, **knob))


@pytest.mark.parametrize(
    ("text", "ids", "message"),
    [
        (torch.full((1, 6), 40), None, "from 0 to 39, not 40"),
        (torch.full((1, 6), -1), None, "from 0 to 39, not -1"),
        (torch.zeros(1, 5, dtype=torch.int64), None, r"\(B, 6\)"),
        (torch.zeros(1, 6), None, "not torch.float32"),
        (torch.zeros(1, 6, dtype=torch.int64), torch.full((1, 3), 32), "from 0 to 31, not 32"),
        (torch.zeros(2, 6, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64), "1 drawings for 2 captions"),
        (torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 64, dtype=torch.int64), "at most 63"),
    ],
)
def test_integers_of_no_vocabulary_are_refused(small: DALLE, text: Tensor, ids: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(write(small, text, ids))


def test_a_prompt_is_read_as_the_tokenizer_does() -> None:
    reader = data.caption_tokenizer()
    captions = data.drawings("pairs").captions
    for row, caption in zip(read(captions).tolist(), captions, strict=True):
        pieces = [piece for piece in row if piece]
        assert row == pieces + [0] * (PLACES - len(pieces))
        assert reader.decode(pieces) == " " + caption.lower()


def test_odd_prompts() -> None:
    empty, spaces, unknown, greek, bytes_ = read(["", " ", "zxqv", "α", "\U0001f9ab"]).bool().sum(1).tolist()
    assert empty == 0 and spaces == 1
    assert unknown > 1 and greek == 1 + 2 and bytes_ == 1 + 4  # a space, then spelt, at worst byte by byte
    assert read([]).shape == (0, PLACES)
    with pytest.raises(ValueError, match=r"A prompt of \d+ pieces is too long, at most 24 fit"):
        read(["a flat drawing of a cat", "very " * 500 + "big cat"])


def test_a_drawing_can_be_written_for_any_prompt_that_fits() -> None:
    torch.manual_seed(0)
    model = DALLE(data.caption_tokenizer().get_vocab_size(), 32, d=16, depth=1, heads=2).eval()
    for prompts in (["", "zxqv", "\U0001f9ab"], []):
        *_, ids = write(model, read(prompts).cpu(), guidance=2.0, top_p=0.9)
        assert ids.shape == (len(prompts), 64) and ((ids >= 0) & (ids < 32)).all()


def test_an_untrained_model_knows_nothing(small: DALLE, text: Tensor) -> None:
    with torch.no_grad():
        pieces, codes = small(text, torch.randint(32, (3, 63)))
    assert pieces.shape == (3, 6, 40) and codes.shape == (3, 64, 32)
    for logits in (pieces, codes):
        nats = -logits.log_softmax(2).mean().item()
        assert nats == pytest.approx(math.log(logits.shape[2]), rel=0.1)
