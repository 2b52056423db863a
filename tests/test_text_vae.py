"""Lesson 03's sentence VAEs: no word sees itself, the canvas is its recursion, and what is shipped keeps its word."""

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import TensorDataset
from torchmetrics.functional.text import bleu_score

from course_utils import data, pretrained
from course_utils.models import text_vae
from course_utils.training import train

SMALL = {"d": 6, "width": 16, "hidden": 24}
BOTH = (text_vae.GenRNN, text_vae.AUTR)
SHIPPED = {"text_vae_genrnn": text_vae.GenRNN, "text_vae_autr": text_vae.AUTR}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return data.tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> Tensor:
    return text_vae.encode(tokenizer, data.sentences("test").texts[5:45])


@pytest.fixture(params=BOTH, ids=lambda kind: kind.__name__)
def model(request: pytest.FixtureRequest) -> text_vae.TextVAE:
    torch.manual_seed(0)
    return request.param(**SMALL).eval()


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> tuple[text_vae.TextVAE, dict]:
    _, card = pretrained.load_checkpoint(request.param)
    model, _ = pretrained.load_checkpoint(request.param, SHIPPED[request.param](**card["config"]))
    return model.eval().requires_grad_(False), card


# -------------------------------------------------------------------------------------------------- sentences


def test_encode_and_decode_are_inverse_and_every_row_ends(tokenizer: Tokenizer, rows: Tensor) -> None:
    assert text_vae.decode(tokenizer, rows) == [text.lower() for text in data.sentences("test").texts[5:45]]
    assert (rows == text_vae.END).sum(1).tolist() == [1] * 40
    assert rows.shape == (40, text_vae.SLOTS) and rows.dtype == torch.int64


@pytest.mark.parametrize("text", ["otorhinolaryngologists dance", "naïve ☃ 猫", "zzxqj"])
def test_no_word_is_unknown(tokenizer: Tokenizer, text: str) -> None:
    assert text_vae.decode(tokenizer, text_vae.encode(tokenizer, [text])) == [text]


@pytest.mark.parametrize(
    ("texts", "words"),
    [(["fine", ""], "Sentence 1 is empty"), (["  "], "is empty"), (["word " * 200], "tokens, and 23 fit")],
)
def test_a_wrong_sentence_is_refused_in_one_line(tokenizer: Tokenizer, texts: list[str], words: str) -> None:
    with pytest.raises(ValueError) as refused:
        text_vae.encode(tokenizer, texts)
    assert words in str(refused.value) and "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------------ models


def test_a_word_is_told_from_those_before_it(model: text_vae.TextVAE, rows: Tensor) -> None:
    """By gradient: the state at place l depends on no embedding of words l and after."""
    z = torch.randn(1, 6)
    shown = model.embed(rows[:1]).detach().requires_grad_()
    model.embed = Shown(model.embed, shown)
    for place in (0, 3, 8):
        (gradient,) = torch.autograd.grad(
            model.states(z, rows[:1])[0, place].sum(), shown, retain_graph=True, allow_unused=True
        )
        reached = torch.zeros(24) if gradient is None else gradient[0].abs().sum(1)
        assert not reached[place:].any()
        assert place == 0 or reached[place - 1] > 0


class Shown(torch.nn.Module):
    """Embeddings that lead back to the tensor `shown` (1, L, width), of whose tokens they are."""

    def __init__(self, embed: torch.nn.Embedding, shown: Tensor):
        super().__init__()
        self.table, self.weight, self.shown = embed.weight.detach(), embed.weight, shown

    def forward(self, tokens: Tensor) -> Tensor:
        lead = tokens.shape[1] - int((tokens[0] == text_vae.START).cumprod(0).sum())
        pad = self.table[tokens[:, : tokens.shape[1] - lead]]
        return torch.cat([pad, self.shown[:, :lead]], 1)


def test_the_canvas_is_what_its_strokes_leave() -> None:
    torch.manual_seed(0)
    model, z = text_vae.AUTR(**SMALL), 3 * torch.randn(5, 6)
    gates, contents = model.strokes(z)
    canvas = torch.zeros(5, text_vae.SLOTS, 16)
    for g, u in zip(gates.unbind(1), contents.unbind(1), strict=True):
        canvas = (1 - g)[..., None] * canvas + g[..., None] * u[:, None]
    torch.testing.assert_close(model.canvas(z), canvas, atol=1e-5, rtol=1e-5)
    assert gates.min() >= 0 and gates.sum(1).max() <= 1 + 1e-5


def test_what_is_written_is_what_is_likeliest_word_by_word(model: text_vae.TextVAE) -> None:
    z = torch.randn(4, 6)
    written = text_vae.write(model, z)
    logits = model.logits(model.states(z, written))
    logits[..., [text_vae.PAD, text_vae.START, text_vae.BLANK]] = -torch.inf
    assert torch.equal(logits.argmax(2), written)


def test_log_px_is_the_sum_over_words_without_padding(model: text_vae.TextVAE, rows: Tensor) -> None:
    z = torch.randn(len(rows), 6)
    log_p = model.logits(model.states(z, rows)).log_softmax(2).gather(2, rows[..., None])[..., 0]
    torch.testing.assert_close(model.log_px(rows, z), (log_p * (rows != text_vae.PAD)).sum(1), atol=1e-3, rtol=1e-4)


def test_the_kl_is_torchs_and_padding_changes_nothing(model: text_vae.TextVAE, rows: Tensor) -> None:
    mu, log_sigma = model.posterior(rows)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, log_sigma.exp()), normal(0.0, 1.0))
    torch.testing.assert_close(text_vae.terms(model, rows)[1], expected, atol=1e-5, rtol=1e-4)


def test_free_bits_leave_the_encoder_alone_below_them(model: text_vae.TextVAE, rows: Tensor) -> None:
    def gradient(free: float) -> Tensor:
        torch.manual_seed(0)
        loss = text_vae.negative_elbo(model, rows, beta=1.0, free=free) - text_vae.negative_elbo(model, rows, beta=0.0)
        torch.manual_seed(0)
        _, kl = text_vae.terms(model, rows)
        assert kl.mean(0).max() < 5
        return torch.autograd.grad(kl.mean(0).clamp(min=free).sum() + 0 * loss, model.to_posterior.weight)[0]

    assert not gradient(5.0).any() and gradient(0.0).any()


def test_a_negative_beta_is_refused(model: text_vae.TextVAE, rows: Tensor) -> None:
    with pytest.raises(ValueError, match=r"beta=-1\.0"):
        text_vae.negative_elbo(model, rows, beta=-1.0)


def test_a_step_stays_on_the_models_device(model: text_vae.TextVAE) -> None:
    meta = torch.device("meta")
    model = model.to(meta)
    tokens = torch.full((2, 24), 7, device=meta)
    states = model.states(torch.empty(2, 6, device=meta), tokens)
    mu, log_sigma = model.posterior(tokens)
    (model.logits(states).sum() + mu.sum() + log_sigma.sum()).backward()
    assert {p.grad.device for p in model.parameters() if p.grad is not None} == {meta}


def test_training_lowers_the_bound(model: text_vae.TextVAE, rows: Tensor) -> None:
    def loss(model: text_vae.TextVAE, batch: tuple[Tensor]) -> Tensor:
        return text_vae.negative_elbo(model, batch[0])

    run = train(model, loss, TensorDataset(rows), steps=30, batch_size=20, warmup=5, learning_rate=1e-2)
    losses = [row["loss"] for row in run.history]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5


# ---------------------------------------------------------------------------------------------- what is shipped


def reconstructions(model: text_vae.TextVAE, tokenizer: Tokenizer, count: int = 400) -> tuple[list[str], list[str]]:
    texts = data.sentences("test").texts
    fitting = [text for text in texts if len(tokenizer.encode(text).ids) < text_vae.SLOTS]
    rows = text_vae.encode(tokenizer, fitting[:: len(fitting) // count])
    guesses = text_vae.decode(tokenizer, text_vae.write(model, model.posterior(rows)[0]))
    return guesses, text_vae.decode(tokenizer, rows)


def test_shipped_models_do_what_their_cards_say(shipped: tuple, tokenizer: Tokenizer) -> None:
    model, card = shipped
    guesses, truth = reconstructions(model, tokenizer)
    bleu = 100 * bleu_score(guesses, [[text] for text in truth]).item()
    assert bleu == pytest.approx(card["metrics"]["test/bleu"], abs=3)
    assert card["metrics"]["test/active_units"] > 0 and card["metrics"]["test/kl_nats"] >= 5
    assert len(set(guesses)) > 200


def test_both_models_had_the_same_budget_and_the_same_size() -> None:
    cards = [pretrained.load_checkpoint(name)[1] for name in SHIPPED]
    assert cards[0]["steps"] == cards[1]["steps"] and cards[0]["config"] == cards[1]["config"]
    sizes = [
        sum(p.numel() for p in kind(**card["config"]).parameters()) for kind, card in zip(BOTH, cards, strict=True)
    ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.05


def test_the_condition_moves_what_is_written(tokenizer: Tokenizer) -> None:
    _, card = pretrained.load_checkpoint("text_cvae")
    model, _ = pretrained.load_checkpoint("text_cvae", text_vae.GenRNN(**card["config"]))
    torch.manual_seed(0)
    z = torch.randn(20, card["config"]["d"])
    negative, positive = (
        text_vae.decode(tokenizer, text_vae.write(model.eval(), torch.cat([z, torch.eye(2)[[style] * 20]], 1)))
        for style in (0, 1)
    )
    assert sum(a != b for a, b in zip(negative, positive, strict=True)) > 15
    assert card["metrics"]["test/asked_positive"] > card["metrics"]["test/asked_negative"] + 0.1


# ---------------------------------------------------------------------------------------------- the style of words


@pytest.fixture(scope="module")
def minilm() -> pretrained.SentenceEncoder:
    return pretrained.load_minilm()


def test_words_are_replaced_in_place_and_nothing_else_moves() -> None:
    text = "Don't buy - it's awful, truly  awful (2 stars)."
    words = [word for word, _ in text_vae.word_spans(text)]
    assert words == ["Don't", "buy", "-", "it's", "awful", ",", "truly", "awful", "(", "2", "stars", ")", "."]
    assert all(text[start:end] == word for word, (start, end) in text_vae.word_spans(text))
    assert text_vae.replaced(text, {}) == text
    assert text_vae.replaced(text, {0: "do", 7: "lovely"}) == "Do buy - it's awful, truly  lovely (2 stars)."


def test_a_words_state_is_that_of_its_first_piece(minilm: pretrained.SentenceEncoder) -> None:
    texts = ["An underventilated plot.", "No."]
    states, there = text_vae.word_states(minilm.model, minilm.tokenizer, texts)
    assert there.tolist() == [[True] * 4, [True, True, False, False]]
    batch = minilm.tokenizer(texts, padding=True, return_tensors="pt")
    expected = minilm.model(**batch).last_hidden_state
    pieces = minilm.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    place = [1, pieces.index("under"), pieces.index("plot"), pieces.index(".")]
    torch.testing.assert_close(states[0], expected[0, place], atol=1e-5, rtol=1e-4)


def test_evidence_adds_up_and_what_is_no_word_says_nothing() -> None:
    torch.manual_seed(0)
    model, states = text_vae.Evidence().eval(), torch.randn(2, 5, 384)
    there = torch.tensor([[True] * 5, [True, True, False, False, False]])
    e = model(states, there)
    assert not e[1, 2:].any() and e[:, :2].all()
    torch.testing.assert_close(model(states[1:, :2], there[1:, :2]).sum(), e[1].sum())


def test_the_shipped_evidence_tells_unseen_reviews(minilm: pretrained.SentenceEncoder) -> None:
    evidence, card = pretrained.load_checkpoint("text_style", text_vae.Evidence())
    encoder = pretrained.load_minilm().model
    encoder.encoder.layer = encoder.encoder.layer[:3]
    reviews = data.reviews("test")
    rows = [i for i in range(len(reviews)) if reviews.ratings[i].abs() >= 1][::4]
    states = text_vae.word_states(encoder, minilm.tokenizer, [reviews.texts[i] for i in rows])
    right = ((evidence.eval()(*states).sum(1) > 0) == (reviews.ratings[rows] > 0)).float().mean().item()
    assert right == pytest.approx(card["metrics"]["test/accuracy"], abs=0.01)


def test_the_editor_beats_the_rule_in_style_and_fluency() -> None:
    metrics = pretrained.load_checkpoint("text_style")[1]["metrics"]
    assert metrics["test/transfer:edit"] > metrics["test/transfer:swap"] + 0.2
    assert metrics["test/perplexity:edit"] < metrics["test/perplexity:swap"]
    assert metrics["test/content:edit"] > metrics["test/content:nearest"] + 0.2
