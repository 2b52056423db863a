"""Lesson 04's attention, contrastive losses, CLIP and sarcasm reader: equal to the libraries, and blind where due."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from course_utils import data, evaluation, pretrained
from course_utils.data import Drawings
from course_utils.models.multimodal import CLIP, FUSIONS, CrossAttention, MultimodalTransformer, clip_loss, siglip_loss
from course_utils.training import train

SMALL = {"widths": (6, 8, 12, 16), "depths": (1, 1, 1)}


@pytest.fixture
def small() -> CLIP:
    torch.manual_seed(0)
    return CLIP(d=16, **SMALL).eval()


@pytest.fixture(scope="module")
def minilm() -> pretrained.SentenceEncoder:
    return pretrained.load_minilm()


@pytest.fixture(scope="module")
def shipped() -> tuple[CLIP, dict]:
    model, card = pretrained.load_checkpoint("clip", CLIP())
    return model.eval().requires_grad_(False), card


# ---------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_the_librarys(heads: int) -> None:
    torch.manual_seed(0)
    layer, x1, x2 = CrossAttention(32, heads), torch.randn(2, 3, 32), torch.randn(2, 4, 32)
    there = torch.tensor([[True, True, True, True], [True, False, True, False]])
    h, attention = layer(x1, x2, there)
    q, k, v = (
        part(x).unflatten(-1, (heads, -1)).transpose(1, 2) for part, x in ((layer.q, x1), (layer.k, x2), (layer.v, x2))
    )
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
    torch.testing.assert_close(h, layer.out(mixed.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, heads, 3))
    assert not attention[1, ..., [1, 3]].any()


def test_a_word_sees_the_regions_that_are_there_and_no_other_word() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(16, 2)
    x1, x2 = torch.randn(1, 3, 16, requires_grad=True), torch.randn(1, 4, 16, requires_grad=True)
    h, _ = layer(x1, x2, torch.tensor([[True, True, False, True]]))
    words, regions = torch.autograd.grad(h[0, 1].sum(), (x1, x2))
    assert words[0].abs().sum(1).bool().tolist() == [False, True, False]
    assert regions[0].abs().sum(1).bool().tolist() == [True, True, False, True]


# ------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("ours", "config", "kind"), [(clip_loss, CLIPConfig, CLIPModel), (siglip_loss, SiglipConfig, SiglipModel)]
)
def test_the_losses_are_the_librarys_where_each_pair_is_alone(ours: Callable, config: type, kind: type) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = sizes | {"vocab_size": 20, "max_position_embeddings": 8, "projection_size": 16, "eos_token_id": 19}
    library = kind(config(text_config=words, vision_config=sizes | {"image_size": 16, "patch_size": 8})).eval()
    out = library(input_ids=torch.randint(3, 19, (5, 6)), pixel_values=torch.rand(5, 3, 16, 16), return_loss=True)
    bias = {} if ours is clip_loss else {"bias": 0.0}  # the library's logits hold it already
    torch.testing.assert_close(ours(out.logits_per_image, torch.eye(5, dtype=torch.bool), **bias), out.loss)


def test_a_drawing_of_the_same_concept_is_no_wrong_answer() -> None:
    """Two drawings of one concept, with the same words: the loss is least where both find both."""
    concept = torch.tensor([0, 0, 1, 2])
    same = concept[:, None] == concept
    perfect = torch.where(same, 20.0, -20.0)
    assert clip_loss(perfect, same) == pytest.approx(math.log(2) / 2, abs=1e-4)  # two of four have two right answers
    assert clip_loss(perfect, torch.eye(4, dtype=torch.bool)) == pytest.approx(math.log(2) / 2, abs=1e-4)
    torn = perfect.clone()
    torn[0, 1] = torn[1, 0] = -20.0  # as if they were wrong for each other
    assert clip_loss(torn, same) > 5 and clip_loss(torn, torch.eye(4, dtype=torch.bool)) < 1e-4


def test_a_drawing_made_of_two_is_called_both_to_its_shares() -> None:
    torch.manual_seed(0)
    logits, shares = torch.randn(3, 3), torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    of_drawing = sum(F.cross_entropy(logits[i], shares[i]) for i in range(3)) / 3
    of_words = sum(F.cross_entropy(logits[:, j], shares[:, j] / shares[:, j].sum()) for j in range(3)) / 3
    torch.testing.assert_close(clip_loss(logits, shares), (of_drawing + of_words) / 2)


def test_chance_costs_log_n_and_one_drawing_is_no_quiz() -> None:
    assert clip_loss(torch.zeros(7, 7), torch.eye(7, dtype=torch.bool)) == pytest.approx(math.log(7))
    with pytest.raises(ValueError, match="batch of 1 has nothing to confuse"):
        clip_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------------- CLIP


def test_no_drawing_sees_another_and_all_vectors_have_length_one(small: CLIP) -> None:
    images = torch.rand(3, 3, 64, 64, requires_grad=True)
    z = small.encode_image(images)
    (gradient,) = torch.autograd.grad(z[1].sum(), images)
    assert gradient.abs().sum((1, 2, 3)).bool().tolist() == [False, True, False]
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(small.encode_image(images[1:2])[0], z[1])  # a batch of one


def test_a_patch_token_joins_its_cell_and_its_quarter(small: CLIP) -> None:
    images = torch.rand(2, 3, 64, 64)
    middle, last = small.eyes(images)
    tokens, place = small.see(images)
    assert torch.equal(tokens, small.tokens(images)) and torch.equal(place, small.encode_image(images))
    tokens = tokens.unflatten(1, (4, 4))
    assert tokens.shape == (2, 4, 4, 12 + 16)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        expected = torch.cat([middle[:, :, row, column], last[:, :, row // 2, column // 2]], 1)
        assert torch.equal(tokens[:, row, column], expected)


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (3, 64, 64), (2, 3, 32, 32), (2, 1, 64, 64)])
def test_what_is_no_batch_of_drawings_is_refused(small: CLIP, shape: tuple[int, ...]) -> None:
    for function in (small.encode_image, small.tokens):
        with pytest.raises(ValueError, match=r"drawings \(B, 3, 64, 64\) with B at least 1"):
            function(torch.zeros(shape))


@pytest.mark.parametrize("words", ["a tulip", ["a tulip"], torch.zeros(0, 384), torch.zeros(384), torch.zeros(2, 256)])
def test_words_that_did_not_go_through_minilm_are_refused(small: CLIP, words: object) -> None:
    with pytest.raises(ValueError, match=r"MiniLM's embeddings \(B, 384\)"):
        small.encode_text(words)


def test_a_word_that_nobody_knows_still_has_a_place(small: CLIP, minilm: pretrained.SentenceEncoder) -> None:
    z = small.encode_text(minilm.encode(["zxqv blorf", "🦫", "a beaver"]))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    for wrong, kind in (("a beaver", TypeError), ([7], TypeError), ([None], TypeError), ([], ValueError)):
        with pytest.raises(kind):
            minilm.encode(wrong)


def test_a_step_stays_on_the_models_device(small: CLIP) -> None:
    meta = torch.device("meta")
    model = small.to(meta)
    logits = model.logits(
        model.encode_image(torch.empty(2, 3, 64, 64, device=meta)), model.encode_text(torch.empty(2, 384, device=meta))
    )
    clip_loss(logits, torch.ones(2, 2, dtype=torch.bool, device=meta)).backward()
    assert {p.grad.device for p in model.parameters()} == {meta}


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    words = F.normalize(torch.randn(1563, 384), dim=1)

    def loss(model: CLIP, batch: dict[str, Tensor]) -> Tensor:
        same = batch["concept"][:, None] == batch["concept"]
        return clip_loss(
            model.logits(model.encode_image(batch["image"]), model.encode_text(words[batch["concept"]])), same
        )

    few = data.drawings("fit").select(torch.arange(0, 5000, 80))
    run = train(CLIP(d=16, **SMALL), loss, few, steps=40, batch_size=32, warmup=5, learning_rate=5e-3)
    losses = [row["loss"] for row in run.history]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5


def test_cached_features_are_what_the_encoder_says(
    minilm: pretrained.SentenceEncoder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    texts = ["a beaver", "a lodge of sticks"]
    first = pretrained.cached_features(minilm, texts)
    torch.testing.assert_close(first, minilm.encode(texts))
    monkeypatch.setattr(minilm, "encode", lambda texts: pytest.fail("the cache was not used"))
    assert torch.equal(pretrained.cached_features(minilm, texts), first)


# ------------------------------------------------------------------------------------------------------ sarcasm


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_fusion_sees_what_it_may(fusion: str) -> None:
    torch.manual_seed(0)
    reader = MultimodalTransformer(fusion, d=16, words=12, face=10).eval()
    words, face = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 4, 10, requires_grad=True)
    there = torch.tensor([[True] * 5, [True, True, True, False, False]])
    logits, attention = reader(words, there, face)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert logits.shape == (2,)
    by_words, by_face = torch.autograd.grad(logits[1], (words, face), allow_unused=True)
    assert (by_words is not None and by_words[1].any()) == (fusion != "face")
    assert (by_face is not None and by_face[1].any()) == (fusion != "words")
    if fusion != "face":
        assert not by_words[0].any() and not by_words[1, 3:].any()  # no other pair, no padding


def test_the_sum_of_two_scores_cannot_contradict() -> None:
    """s(w) + s(f): the four logits of two sentences and two faces fulfil l(1,1) + l(2,2) = l(1,2) + l(2,1)."""
    torch.manual_seed(0)
    reader = MultimodalTransformer("sum", d=16, words=12, face=10).eval()
    words, face, there = torch.randn(2, 5, 12), torch.randn(2, 4, 10), torch.ones(4, 5, dtype=torch.bool)
    logits, _ = reader(words[[0, 0, 1, 1]], there, face[[0, 1, 0, 1]])
    torch.testing.assert_close(logits[0] + logits[3], logits[1] + logits[2])


def test_an_unknown_fusion_is_refused() -> None:
    with pytest.raises(ValueError, match='There is no fusion "middle"'):
        MultimodalTransformer("middle")


# ----------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def features(minilm: pretrained.SentenceEncoder) -> Tensor:
    """MiniLM's embeddings of all names and of all keywords, (2, 1563, 384)."""
    keywords = data.concepts()["keywords"].str.replace("|", ", ").tolist()
    return pretrained.cached_features(minilm, data.concepts()["phrase"].tolist() + keywords).unflatten(0, (2, -1))


def seen_by(model: CLIP, part: Drawings) -> Tensor:
    return torch.cat([model.encode_image(part[rows]["image"]) for rows in torch.arange(len(part)).split(100)])


def test_clip_finds_what_its_card_says(shipped: tuple, features: Tensor) -> None:
    model, card = shipped
    for split in ("pairs", "concepts"):
        part = data.drawings(split)
        among = torch.arange(1563) if split == "pairs" else part.concept.unique()
        scores = seen_by(model, part) @ model.encode_text(features[0, among]).T
        for k in (1, 5):
            found = evaluation.recall(scores, part.concept[:, None] == among, k)
            assert found == pytest.approx(card["metrics"][f"{split}/recall@{k}"], abs=0.01)


def test_the_sarcasm_reader_needs_both(shipped: tuple, features: Tensor) -> None:
    """On test sentences with test faces, anew; and the card says what one modality alone can do."""
    eyes, _ = shipped
    reader, card = pretrained.load_checkpoint("sarcasm", MultimodalTransformer())
    accuracy = {fusion: card["metrics"][f"test/accuracy:{fusion}"] for fusion in FUSIONS}
    assert max(accuracy["words"], accuracy["face"]) <= 0.55
    reviews, faces = data.reviews("test"), data.faces()
    clear = (reviews.ratings.abs() >= 2).nonzero()[::8, 0]
    rated = faces[faces["split"] == "test"]
    llm, tokenizer = pretrained.load_llm()
    tokens = tokenizer([reviews.texts[row] for row in clear.tolist()], padding=True, return_tensors="pt")
    llm.model.layers, there = llm.model.layers[:22], tokens["attention_mask"].bool()
    with torch.no_grad():
        words = llm.model(**tokens)[0]
        images = torch.stack([data.emoji(name, "noto") for name in rated["name"]])
        tokens, place = eyes.see(images)
        called = eyes.logits(place, eyes.encode_text(features[0])).softmax(1) @ features.mean(0)
        seen = torch.cat([tokens, called[:, None].expand(-1, 16, -1)], 2)
        logits = torch.stack([reader.eval()(words, there, face.expand(len(words), -1, -1))[0] for face in seen], 1)
    truth = (reviews.ratings[clear] > 0)[:, None] != torch.tensor(rated["valence"].to_numpy() > 0)
    right = ((logits > 0) == truth).float().mean().item()
    assert right == pytest.approx(accuracy["crossmodal"], abs=0.08)


# ------------------------------------------------------------------------------------------------------- recall


def test_recall_counts_queries_with_a_right_answer_among_the_best() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8]])
    right = torch.tensor([[False, True, True], [True, False, False]])
    assert [evaluation.recall(scores, right, k) for k in (1, 2, 3)] == [0.0, 0.5, 1.0]


def test_recall_refuses_what_it_cannot_count() -> None:
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k} is not one of 1 to 3"):
            evaluation.recall(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), k)
    with pytest.raises(ValueError, match="Query 1 has no right answer"):
        evaluation.recall(torch.zeros(2, 3), torch.tensor([[True, True, True], [False, False, False]]), 1)
