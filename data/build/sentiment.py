"""Train the judge of sentiment, which says whether a review is positive, and write its checkpoint and card.

    python data/build/sentiment.py

It learns from every second training review, which no model of the course learns from, and only from clear ones (mean
rating at or beyond 1). The weight of its penalty is chosen on the validation reviews. About 12 minutes on one core.
"""

import time

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from course_utils.data import reviews
from course_utils.evaluation import TextJudge, publish


def main() -> None:
    torch.manual_seed(0)
    judge, started, parts = TextJudge(), time.monotonic(), {}
    for split in ("train", "validation", "test"):
        part = reviews(split)
        rows = [i for i in range(split == "train", len(part), 1 + (split == "train")) if part.ratings[i].abs() >= 1]
        features = judge.read([part.texts[i] for i in rows])["features"].double().numpy()
        parts[split] = features, (part.ratings[rows] > 0).numpy()
        print(f"{split}: {len(rows):,} clear reviews", flush=True)
    x, y = parts["train"]
    scaler = StandardScaler().fit(x)
    fits = [LogisticRegression(C=C, max_iter=500).fit(scaler.transform(x), y) for C in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]

    def accuracy(fit: LogisticRegression, split: str) -> float:
        return fit.score(scaler.transform(parts[split][0]), parts[split][1])

    best = max(fits, key=lambda fit: accuracy(fit, "validation"))
    weight = best.coef_[0] / scaler.scale_
    tensors = {"weight": torch.tensor(weight[None]), "bias": torch.tensor(best.intercept_ - weight @ scaler.mean_)}
    metrics = {f"{split}/accuracy": accuracy(best, split) for split in ("validation", "test")}
    publish(
        "sentiment", {name: value.float() for name, value in tensors.items()}, lesson="03_text_vae_and_style",
        config={"layer": TextJudge.LAYER, "C": best.C}, steps=int(best.n_iter_[0]), seconds=time.monotonic() - started,
        device="cpu", seed=0, metrics=metrics, dtype=None,
    )  # fmt: skip
    print(metrics)


if __name__ == "__main__":
    main()
