"""Train the course's two tokenizers, byte-pair encodings of text in lower case.

    python data/build/tokenizer.py

Writes `data/sentences/tokenizer.json` (lesson 03: 4,096 pieces, of sentences and reviews) and
`data/emoji/tokenizer.json` (lesson 06: 2,048 pieces, of the training drawings' captions). The lessons train the same
ones in a cell; the files keep them fixed, so that the shipped models fit whatever version of the library is installed.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from course_utils.data import drawings, reviews, sentences


def train(texts: list[str], pieces: int, special: list[str], path: Path) -> None:
    """Write to `path` a byte-pair encoding with this many pieces, the special ones first, then the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")


def build(folder: Path) -> None:
    """Write `sentences/tokenizer.json` and `emoji/tokenizer.json` into `folder`."""
    texts = sentences("train").texts + reviews("train").texts
    train(texts, 4096, ["<pad>", "<start>", "<end>", "<blank>"], folder / "sentences" / "tokenizer.json")
    train(drawings("train").captions, 2048, ["<none>"], folder / "emoji" / "tokenizer.json")


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent)
