"""Train the tokenizer of lesson 03: byte-pair encoding with 4,096 tokens, on sentences and reviews in lower case.

    python data/build/tokenizer.py

Writes `data/sentences/tokenizer.json`. Lesson 03 trains the same one in a cell; this file keeps it fixed, so that the
shipped models fit whatever version of the library is installed.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from course_utils.data import reviews, sentences


def build(folder: Path) -> None:
    """Write `tokenizer.json` into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<pad>", "<start>", "<end>", "<blank>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences("train").texts + reviews("train").texts, trainer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent / "sentences")
