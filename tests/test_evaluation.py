"""The judge, the kernel distance and the scoreboard."""

import json

import pytest
import torch

from course_utils import data, evaluation, pretrained, runtime


@pytest.fixture(scope="module")
def judge() -> tuple[evaluation.Judge, dict]:
    return evaluation.load_judge()


@pytest.mark.parametrize("split", ["pairs", "concepts"])
def test_the_card_tells_what_the_judge_does(judge: tuple, split: str) -> None:
    accuracy = evaluation.judge_accuracy(judge[0], data.drawings(split))
    card = {name: value for name, value in judge[1]["metrics"].items() if name.startswith(f"{split}/")}
    assert card
    for name, value in card.items():
        assert accuracy[name.removeprefix(f"{split}/judge_")] == pytest.approx(value, abs=0.006), name


def test_the_judge_is_frozen_and_a_batch_changes_nothing(judge: tuple) -> None:
    assert not any(parameter.requires_grad for parameter in judge[0].parameters()) and not judge[0].training
    images = data.drawings("pairs")[torch.arange(3)]["image"]
    alone, together = judge[0](images[1:2])["concept"], judge[0](images)["concept"][1:2]
    torch.testing.assert_close(alone, together, atol=1e-3, rtol=1e-3)


def test_the_judge_runs_on_another_device() -> None:
    logits = evaluation.Judge().to("meta")(torch.empty(2, 3, 64, 64, device="meta"))
    assert {name: tuple(value.shape) for name, value in logits.items()} == {
        "concept": (2, 1563),
        "category": (2, 9),
        "style": (2, 4),
    }


def test_accuracy_counts(monkeypatch) -> None:
    """A judge that always answers concept 7, category 0, style 1 is right exactly where they are."""

    class Stubborn(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            def one_hot(n: int, k: int) -> torch.Tensor:
                return torch.eye(n)[k].expand(len(images), n)

            return {"concept": one_hot(1563, 7), "category": one_hot(9, 0), "style": one_hot(4, 1)}

    rows = torch.tensor([4 * 7, 4 * 7 + 1, 4 * 8 + 1, 4 * 1000 + 2])
    drawings = data.all_drawings().select(rows)
    accuracy = evaluation.judge_accuracy(Stubborn(), drawings, batch_size=3)
    assert accuracy["concept_top1"] == 0.5 and accuracy["style"] == 0.5
    assert accuracy["category"] == (drawings.category == 0).float().mean().item()


def test_kid_orders_sets_of_drawings() -> None:
    images = data.all_drawings().images[::16].float() / 255  # 3d drawings of every fourth concept
    same = evaluation.kid_lite0(images[0::2][:60], images[1::2][:60])
    noisy = evaluation.kid_lite0(images[0::2][:60], (images[1::2][:60] + 0.3 * torch.randn(60, 3, 64, 64)).clamp(0, 1))
    assert abs(same) < 0.1 * noisy
    again = evaluation.kid_lite0(images[0::2][:60], images[1::2][:60])
    assert same == pytest.approx(again, abs=1e-4)  # how a chip splits a sum may change its last bits


def test_kid_is_the_unbiased_estimate_of_its_formula() -> None:
    real, made = torch.rand(2, 12, 3, 64, 64)
    lite0 = pretrained.load_lite0()
    x, y = lite0(real).double(), lite0(made).double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 1280 + 1) ** 3

    def off_diagonal(k: torch.Tensor) -> torch.Tensor:
        return (k.sum() - k.trace()) / (12 * 11)

    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert evaluation.kid_lite0(real, made) == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)


def test_scoreboard_is_made_from_the_cards() -> None:
    stored = json.loads((data.DATA / "scoreboard.json").read_text())
    assert stored == json.loads(json.dumps(evaluation.scoreboard_rows()))
    cards = {path.parent.name: json.loads(path.read_text()) for path in pretrained.CHECKPOINTS.glob("*/card.json")}
    assert {row["name"] for row in stored} == set(cards)
    for row in stored:
        metrics = cards[row["name"]]["metrics"]
        assert {name: row[name] for name in metrics} == metrics
    table = evaluation.scoreboard()
    assert set(table.index) == set(cards)
    judged = f"{cards['judge']['metrics']['pairs/judge_style']:.3f}"
    assert table.loc["judge", ("held-out pairs", "style")] == judged
    assert table.loc["gmm", ("held-out pairs", "style")] == ""


def test_the_readme_shows_the_scoreboard_of_the_cards() -> None:
    readme = (runtime.ROOT / "README.md").read_text()
    assert evaluation.with_scoreboard(readme) == readme, "python -m course_utils scoreboard"
    board = readme.split("<!-- scoreboard -->")[1].split("<!-- end of the scoreboard -->")[0]
    heads, _, *lines = board.strip().splitlines()
    column = [head.strip() for head in heads.split("|")].index("pairs style")
    shown = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in lines}
    for name, style in shown.items():
        measured = pretrained.load_checkpoint(name)[1]["metrics"].get("pairs/judge_style")
        assert style == ("" if measured is None else f"{measured:.3f}")
    with pytest.raises(ValueError, match=r"README.md must hold"):
        evaluation.with_scoreboard("# No marks")


def test_psnr_is_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    truth = data.drawings("pairs")[torch.arange(5)]["image"]
    noisy = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    for one, other, value in zip(noisy, truth, evaluation.psnr(noisy, truth), strict=True):
        torch.testing.assert_close(value, peak_signal_noise_ratio(one, other, data_range=1.0))


def test_judge_pictures_compares_with_what_is_wanted(judge: tuple) -> None:
    batch = data.drawings("fit")[torch.arange(20)]
    right = evaluation.judge_pictures(judge[0], batch["image"], batch, batch_size=7)
    wrong = evaluation.judge_pictures(judge[0], batch["image"], batch | {"style": (batch["style"] + 1) % 4})
    assert right["style"] > 0.9 and right["concept_top1"] > 0.9 and wrong["style"] < 0.1
    assert wrong["concept_top1"] == right["concept_top1"]


def test_publish_rewrites_the_scoreboard(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(evaluation, "DATA", tmp_path)
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path / "checkpoints")
    facts = {"config": {}, "steps": 1, "seconds": 2.0, "device": "cpu", "seed": 0}
    for name, lesson in (("second", "02"), ("first", "01")):
        evaluation.publish(name, {"w": torch.ones(2, 3)}, lesson=lesson, metrics={"pairs/psnr": 20.0}, **facts)
    rows = json.loads((tmp_path / "scoreboard.json").read_text())
    assert [(row["name"], row["parameters"], row["pairs/psnr"]) for row in rows] == [
        ("first", 6, 20.0),
        ("second", 6, 20.0),
    ]


# ------------------------------------------------------------------------------------------- the judge of sentiment


@pytest.fixture(scope="module")
def text_judge() -> tuple[evaluation.TextJudge, dict]:
    return evaluation.load_text_judge()


def test_the_card_tells_what_the_text_judge_does(text_judge: tuple) -> None:
    judge, card = text_judge
    reviews = data.reviews("test")
    rows = [i for i in range(len(reviews)) if reviews.ratings[i].abs() >= 1][::8]
    right = (judge([reviews.texts[i] for i in rows])["positive"] > 0.5) == (reviews.ratings[rows] > 0)
    error = (0.1 * 0.9 / len(rows)) ** 0.5
    assert right.float().mean().item() == pytest.approx(card["metrics"]["test/accuracy"], abs=3 * error)


def test_the_text_judge_reads_each_text_by_itself(text_judge: tuple) -> None:
    texts = ["A warm, funny film.", "Dreadful.", "The battery dies after an hour, and nobody at the shop cares at all."]
    together = text_judge[0](texts)
    for row, text in enumerate(texts):
        for name, value in text_judge[0]([text]).items():
            assert value[0].item() == pytest.approx(together[name][row].item(), abs=0.25, rel=0.03), name
    assert together["positive"][0] > 0.5 > together["positive"][1]


def test_its_nats_are_the_language_models_own_loss(text_judge: tuple) -> None:
    text = "The old man walked slowly down the street."
    model, tokenizer = text_judge[0].language_model, text_judge[0].tokenizer
    tokens = torch.tensor([tokenizer(tokenizer.unk_token + text)["input_ids"]])
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    found = text_judge[0]([text])
    assert found["tokens"].item() == tokens.shape[1] - 1
    assert evaluation.perplexity(found["nats"], found["tokens"]) == pytest.approx(
        torch.tensor(loss).exp().item(), rel=0.05
    )


@pytest.mark.parametrize("texts", [[], ["fine", " "]])
def test_the_text_judge_refuses_what_it_cannot_read(text_judge: tuple, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one word"):
        text_judge[0](texts)
