"""Lesson 10's [RET], losses and caches: frozen is frozen, cached is uncached, twins are left out, nothing leaks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from course_utils import pretrained
from course_utils.models.adapting import WORD_STD, Projector, Prompt, Told, answer_nats, fingerprint
from course_utils.models.fromage import (
    Fromage,
    Head,
    Kept,
    caption_nats,
    contrastive_loss,
    ending,
    in_a_row,
    info_nce,
    next_nats,
    ret_nats,
)
from course_utils.models.multimodal import clip_loss
from course_utils.training import train

D, V, LAYERS = 32, 50, (1, 2)
TEXTS = [[1, 7, 9, 4], [1], [1, 3], [1, 20, 21, 22, 23, 24, 25], [1, 8, 8, 30, 2]]


@pytest.fixture
def llm() -> LlamaForCausalLM:
    """A language model of 2 layers and 50 words, with the large weights that tell one text from another."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).eval().requires_grad_(False)


@pytest.fixture
def kept(llm: LlamaForCausalLM) -> Kept:
    return Kept(llm, TEXTS, batch=2)


@pytest.fixture
def prompt(llm: LlamaForCausalLM) -> Prompt:
    return Prompt(llm, llm.model.embed_tokens.weight[[1]])


@pytest.fixture
def model() -> Fromage:
    torch.manual_seed(0)
    return Fromage(features=10, k=2, d=D, q=8, layers=LAYERS, dropout=0.0)


@pytest.fixture
def told() -> Told:
    torch.manual_seed(0)
    ids = [[10, 11, 3], [12, 3], [13, 14, 15, 16, 3], [17, 3]]
    return Told(torch.randn(4, 2, 10), torch.arange(4), ids, [len(row) for row in ids])


def whole(llm: LlamaForCausalLM, vectors: Tensor) -> Tensor:
    """States of LAYERS side by side, (T, 2 d), of one sequence of vectors (T, d), read without a cache."""
    out = llm.model(inputs_embeds=vectors[None], output_hidden_states=True)
    return torch.cat([out.hidden_states[1][0], out.last_hidden_state[0]], -1)


# ------------------------------------------------------------------------------------------------------- frozen


class Rows(Dataset):
    def __init__(self, told: Told):
        self.told = told

    def __len__(self) -> int:
        return len(self.told)

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        return self.told[rows] | {"row": rows}


def test_frozen_is_frozen_with_weight_decay(llm: LlamaForCausalLM, model: Fromage, told: Told) -> None:
    kept, prompt, before = Kept(llm, TEXTS), Prompt(llm, llm.model.embed_tokens.weight[[1]]), fingerprint(llm)
    start, pairs = copy.deepcopy(model.state_dict()), kept.pairs.clone()

    def loss(model: Fromage, batch: dict[str, Tensor]) -> Tensor:
        states = kept.read(batch["row"], model.ret.expand(len(batch["row"]), 1, -1), model.layers)[:, 0]
        pictures, own = model.look(batch["features"]), torch.arange(len(states))
        contrast = contrastive_loss(
            model.ask(states), pictures, own, torch.eye(len(own), dtype=torch.bool), model.scale
        )
        ends = kept.first + kept.length - 1
        emission = ret_nats(model.emission(kept.states[ends]), kept.nats[ends], torch.ones(len(ends)))
        return contrast + emission + caption_nats(prompt, model, batch, join=True).mean()

    sizes = {"steps": 20, "batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.5, "warmup": 2, "precision": "no"}
    run = train(model, loss, Rows(told), device="cpu", **sizes)
    assert fingerprint(llm) == before and torch.equal(kept.pairs, pairs)
    assert all(weight.grad is None for weight in llm.parameters())
    assert all(not torch.equal(value, start[name]) for name, value in model.named_parameters())
    assert run.history[-1]["loss"] < run.history[0]["loss"]


def test_the_model_holds_nothing_of_the_language_model(model: Fromage) -> None:
    full = Fromage()
    assert sum(p.numel() for p in full.parameters()) < 8e6  # the table alone has 28 million
    assert full.look.linear.in_features == full.see.linear.in_features == Projector().linear.in_features
    assert full.row.shape == full.write.shape == (576,)
    assert not any(tuple(value.shape)[:1] == (49152,) for value in full.state_dict().values())
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "row", "write", "bias", "log_scale", "see", "ask", "look",
    }  # fmt: skip


def test_the_row_is_no_part_of_the_tied_table(llm: LlamaForCausalLM, model: Fromage) -> None:
    table = llm.model.embed_tokens.weight
    assert llm.lm_head.weight is table and table.shape == (V, D)
    assert model.row.data_ptr() not in {weight.data_ptr() for weight in llm.parameters()}
    before = table.clone()
    with torch.no_grad():
        model.row += 1
        model.write += 1
    assert torch.equal(table, before)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_weight_decay_does_not_change_the_word_that_is_read(model: Fromage, factor: float) -> None:
    before = model.ret.detach().clone()
    assert before.std(unbiased=False).item() == pytest.approx(WORD_STD, rel=1e-3)
    with torch.no_grad():
        model.row *= factor
    torch.testing.assert_close(model.ret, before, atol=1e-4, rtol=1e-3)


def test_masked_gradients_and_weight_decay_change_frozen_rows() -> None:
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(V + 1, D))
    before, optimizer = table.detach().clone(), torch.optim.AdamW([table], lr=1e-2, weight_decay=0.1)
    table.square().sum().backward()
    table.grad[:-1] = 0
    optimizer.step()
    torch.testing.assert_close(table[:-1], before[:-1] * (1 - 1e-3))  # why [RET] has a parameter of its own


# ------------------------------------------------------------------------------------------------------- caches


def test_cached_is_uncached(llm: LlamaForCausalLM, kept: Kept) -> None:
    torch.manual_seed(0)
    rows, more = torch.tensor([3, 1, 0, 4, 2]), torch.randn(5, 3, D)
    found = kept.read(rows, more, LAYERS)
    assert found.shape == (5, 3, 2 * D)
    for row, vectors, states in zip(rows.tolist(), more, found, strict=True):
        words = llm.model.embed_tokens(torch.tensor(TEXTS[row]))
        expected = whole(llm, torch.cat([words, vectors]))[-3:]
        torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept.read(rows, more, LAYERS), found)  # what is kept was not disturbed


def test_the_gradient_of_ret_is_that_of_reading_all(llm: LlamaForCausalLM, kept: Kept) -> None:
    torch.manual_seed(0)
    word, rows = torch.randn(D, requires_grad=True), torch.tensor([0, 3, 4])
    (cached,) = torch.autograd.grad(kept.read(rows, word.expand(3, 1, -1), LAYERS).square().sum(), word)
    texts = [torch.cat([llm.model.embed_tokens(torch.tensor(TEXTS[i])), word[None]]) for i in rows.tolist()]
    (uncached,) = torch.autograd.grad(sum(whole(llm, text)[-1].square().sum() for text in texts), word)
    torch.testing.assert_close(cached, uncached, atol=1e-3, rtol=1e-3)


def test_what_is_kept_of_each_token(llm: LlamaForCausalLM, kept: Kept) -> None:
    assert kept.length.tolist() == [len(text) for text in TEXTS] and len(kept.states) == sum(map(len, TEXTS))
    assert kept.pairs.shape == (2, len(kept.states), 2, 2, D // 4)
    for row, text in enumerate(TEXTS):
        out = llm(input_ids=torch.tensor([text]))
        place = slice(int(kept.first[row]), int(kept.first[row] + kept.length[row]))
        torch.testing.assert_close(kept.nats[place], out.logits[0].logsumexp(1), atol=1e-4, rtol=1e-4)
    assert not kept.states.requires_grad


def test_how_texts_are_batched_does_not_matter(llm: LlamaForCausalLM, kept: Kept) -> None:
    for batch in (1, 64):
        other = Kept(llm, TEXTS, batch)
        torch.testing.assert_close(other.pairs, kept.pairs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other.states, kept.states, atol=1e-5, rtol=1e-4)


def test_ending_puts_ret_behind_the_words_and_looks_at_no_padding(kept: Kept) -> None:
    torch.manual_seed(0)
    lead, words, ret = torch.randn(2, 3, D), torch.randn(2, 4, D), torch.randn(D)
    vectors, place = ending(lead, words, torch.tensor([4, 2]), ret)
    assert vectors.shape == (2, 8, D) and place.tolist() == [7, 5]
    assert torch.equal(vectors[0, 7], ret) and torch.equal(vectors[1, 5], ret)
    assert torch.equal(vectors[:, :3], lead) and torch.equal(vectors[1, 3:5], words[1, :2])
    other = vectors.clone()
    other[1, 6:] = 9.0
    found = [kept.read(torch.tensor([0, 1]), x, LAYERS)[1, 5] for x in (vectors, other)]
    torch.testing.assert_close(*found)


# ---------------------------------------------------------------------------------------------------- contrastive


@pytest.mark.parametrize("n", [2, 5, 16])
def test_info_nce_in_closed_form(n: int) -> None:
    places, own, scale = torch.eye(n), torch.arange(n), 2.5
    for also in (torch.eye(n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)):  # the right one may be marked
        expected = math.log(1 + (n - 1) * math.exp(-scale))
        assert contrastive_loss(places, places, own, also, scale).item() == pytest.approx(expected, abs=1e-5)


def test_twins_are_left_out_in_closed_form() -> None:
    n, scale = 8, 2.5
    twins = torch.eye(n, dtype=torch.bool).roll(4, 1)
    places = F.normalize(torch.eye(n) + torch.eye(n).roll(4, 1), dim=1)  # a twin lies at the same place
    found = contrastive_loss(places, places, torch.arange(n), twins, scale).item()
    assert found == pytest.approx(math.log(1 + (n - 2) * math.exp(-scale)), abs=1e-5)
    wrong = contrastive_loss(places, places, torch.arange(n), torch.zeros_like(twins), scale).item()
    assert wrong == pytest.approx(math.log(2 + (n - 2) * math.exp(-scale)), abs=1e-5)


def test_the_contrastive_loss_is_lesson_04s_loss_without_twins() -> None:
    torch.manual_seed(0)
    queries, pictures = F.normalize(torch.randn(2, 6, 8), dim=2)
    none = torch.zeros(6, 6, dtype=torch.bool)
    found = contrastive_loss(queries, pictures, torch.arange(6), none, 7.0)
    torch.testing.assert_close(found, clip_loss(7.0 * pictures @ queries.T, torch.eye(6)))


def test_a_query_chooses_among_all_pictures_and_a_picture_among_the_queries() -> None:
    torch.manual_seed(0)
    queries, pictures, right = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(9, 8), dim=1), [4, 4, 7]
    also = torch.zeros(3, 9, dtype=torch.bool)
    also[0, 4] = also[1, 4] = also[2, 5] = True  # 0 and 1 want the same picture
    found, losses = contrastive_loss(queries, pictures, torch.tensor(right), also, 5.0), []
    for i, j in enumerate(right):
        wrong = [p for p in range(9) if p != j and not also[i, p]]
        row = 5.0 * queries[i] @ pictures[[j, *wrong]].T
        losses.append(-row.log_softmax(0)[0])
        others = [q for q in range(3) if q != i and not also[q, j]]
        column = 5.0 * pictures[j] @ queries[[i, *others]].T
        losses.append(-column.log_softmax(0)[0])
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_what_is_left_out_has_no_gradient() -> None:
    logits, also = torch.zeros(2, 4, requires_grad=True), torch.zeros(2, 4, dtype=torch.bool)
    also[0, 2] = True
    (gradient,) = torch.autograd.grad(info_nce(logits, torch.tensor([0, 1]), also), logits)
    assert gradient[0, 2] == 0 and (gradient[1] != 0).all() and gradient.isfinite().all()


def test_a_heads_places_have_length_one() -> None:
    torch.manual_seed(0)
    head, x = Head(12, 5).eval(), 100 * torch.randn(7, 12) + 30
    head.measure(x)
    torch.testing.assert_close(head(x).norm(dim=1), torch.ones(7))
    torch.testing.assert_close(head.scaled(x).mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    assert head(x.bfloat16()).dtype == torch.float32 and set(head.state_dict()) == {
        "mean", "scale", "linear.weight", "linear.bias",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- emission


def test_one_more_word_is_a_logistic_regression() -> None:
    torch.manual_seed(0)
    logits, z = torch.randn(6, V), torch.randn(6)
    nats = logits.logsumexp(1)
    is_ret = next_nats(logits, z, torch.full((6,), V)).mean()
    torch.testing.assert_close(ret_nats(z, nats, torch.ones(6)), is_ret)
    ids = torch.randint(V, (6,))
    more = next_nats(logits, z, ids) - F.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(ret_nats(z, nats, torch.zeros(6)), more.mean())


def test_the_logit_of_ret_is_not_rounded_by_autocast(model: Fromage) -> None:
    torch.manual_seed(0)
    states = torch.randn(6, D).bfloat16()
    with torch.no_grad():
        model.write.copy_(torch.randn(D))
        model.bias += 30  # of the size of the log of the sum over the vocabulary
    plain = model.emission(states)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.emission(states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain)


def test_texts_that_do_not_end_in_ret_teach_when_not_to_say_it() -> None:
    torch.manual_seed(0)
    states, nats, due = torch.randn(40, D), torch.full((40,), 4.0), torch.arange(40) < 20
    states[:, 1] += 6  # what all states of a language model have in common
    states[:20, 0] += 4
    for with_others in (True, False):
        rows = slice(None) if with_others else slice(20)
        write, bias = torch.zeros(D, requires_grad=True), torch.full((), 4.0, requires_grad=True)
        optimizer = torch.optim.SGD([write, bias], lr=0.05)
        for _ in range(500):
            optimizer.zero_grad()
            ret_nats(states[rows] @ write + bias, nats[rows], due[rows]).backward()
            optimizer.step()
        said = (states @ write + bias > nats)[20:].float().mean()
        assert said < 0.2 if with_others else said > 0.8


# ------------------------------------------------------------------------------------------------------- captions


def test_captions_cost_what_the_language_model_says(prompt: Prompt, model: Fromage, told: Told) -> None:
    batch = told[torch.arange(4)]
    model.bias.data -= 1e4  # [RET] is impossible, so the vocabulary is lesson 09's
    found = caption_nats(prompt, model, batch)
    expected = answer_nats(prompt, model.see(batch["features"]), batch["ids"], batch["said"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    model.bias.data += 1e4 + 2
    assert (caption_nats(prompt, model, batch) > found).all()


def test_in_a_row_moves_padding_to_the_end() -> None:
    ids = torch.tensor([[5, 6, 0], [7, 0, 0], [8, 9, 4], [3, 0, 0]])
    vectors, said, real = ids[..., None].float().expand(-1, -1, 2), ids > 5, ids > 0
    vectors, ids, said, real = in_a_row(vectors, ids, said, real)
    assert ids.tolist() == [[5, 6, 7, 0, 0, 0], [8, 9, 4, 3, 0, 0]]
    assert torch.equal(vectors[..., 0].long(), ids) and torch.equal(real, ids > 0) and torch.equal(said, ids > 5)


def test_joined_examples_cost_what_one_sequence_costs(prompt: Prompt, model: Fromage, told: Told) -> None:
    batch = told[torch.arange(4)]
    found, expected = caption_nats(prompt, model, batch, join=True), []
    for pair in ((0, 1), (2, 3)):
        vectors, ids, is_said = [prompt.before], [torch.zeros(1, dtype=torch.long)], [torch.zeros(1, dtype=torch.bool)]
        for i in pair:
            words = batch["ids"][i, : batch["length"][i]]
            vectors += [model.see(batch["features"][i : i + 1])[0], prompt.embed(words)]
            ids += [torch.zeros(2, dtype=torch.long), words]
            is_said += [torch.zeros(2, dtype=torch.bool), torch.ones(len(words), dtype=torch.bool)]
        states = prompt.llm.model(inputs_embeds=torch.cat(vectors)[None]).last_hidden_state[0, :-1]
        said = torch.cat(is_said)[1:]
        logits = prompt.llm.lm_head(states[said])
        expected.append(next_nats(logits, model.emission(states[said]), torch.cat(ids)[1:][said]))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_joined_examples_do_not_leak(prompt: Prompt, model: Fromage, told: Told) -> None:
    batch = {key: value.clone() for key, value in told[torch.tensor([0, 2])].items()}
    batch["features"].requires_grad_(True)
    first = int(batch["length"][0])
    alone, joined = (caption_nats(prompt, model, batch, join) for join in (False, True))
    torch.testing.assert_close(joined[:first], alone[:first], atol=1e-4, rtol=1e-4)
    (of_first,) = torch.autograd.grad(joined[:first].sum(), batch["features"], retain_graph=True)
    (of_second,) = torch.autograd.grad(joined[first:].sum(), batch["features"])
    assert of_first[0].abs().sum() > 0 and (of_first[1] == 0).all()
    assert (of_second.abs().sum(1) > 0).all()  # the second may look back
    other = {key: value.detach().clone() for key, value in batch.items()}
    other["ids"][1, 1] = 40
    changed = caption_nats(prompt, model, other, join=True)
    torch.testing.assert_close(changed[: first + 1], joined[: first + 1])  # up to the token before the changed one
    assert not torch.allclose(changed[first + 1 :], joined[first + 1 :])


def test_padding_does_not_matter(prompt: Prompt, model: Fromage, told: Told) -> None:
    batch = {key: value.clone() for key, value in told[torch.arange(4)].items()}
    for join in (False, True):
        found = caption_nats(prompt, model, batch, join)
        padded = batch | {"ids": batch["ids"].masked_fill(~batch["said"], 33)}
        torch.testing.assert_close(caption_nats(prompt, model, padded, join), found)


# ------------------------------------------------------------------------------------------------------ shipped


def test_the_shipped_model_does_what_its_card_says() -> None:
    _, card = pretrained.load_checkpoint("fromage", Fromage())
    _, clip = pretrained.load_checkpoint("clip")
    score = card["metrics"]
    assert score["pairs/drawing_recall@1"] >= 0.9 * clip["metrics"]["pairs/drawing_recall@1"]
    assert score["pairs/drawing_recall@1"] > score["pairs/drawing_recall@1:least_squares"]
    assert score["pairs/style_recall@5"] >= 0.7
    assert max(score[f"pairs/style_recall@5:{who}"] for who in ("no_picture", "other_picture")) <= 0.1
    assert 0 <= score["validation/style_recall@5"] <= 1  # what was tuned was tuned there
    assert score["test/ret_caption"] > 0.8 > 0.3 > score["test/ret_sentence"]
