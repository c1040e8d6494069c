"""Text to tokens and back, by sentencepiece.

Ids follow icefall: `<blk>` = 0 (the CTC blank), `<sos/eos>` = 1, `<unk>` = 2, then the pieces. A `lang_dir`
holds `bpe.model`, which this module reads, and `tokens.txt` (`piece id`, one a line), which the k2 graphs and
deployments read. The file is called `bpe.model` for characters too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from splitformer.results import atomic_write

BLANK, SOS_EOS, UNKNOWN = "<blk>", "<sos/eos>", "<unk>"
MODEL_TYPES = ("bpe", "char")


class Tokenizer:
    """Encodes with the sentencepiece model `lang_dir/bpe.model`.

    Raises FileNotFoundError without one, ValueError where its ids are not the ones of this project.
    """

    def __init__(self, lang_dir: str | Path):
        model = Path(lang_dir) / "bpe.model"
        if not model.is_file():
            raise FileNotFoundError(f"{model} does not exist; local/train_bpe.py makes it")
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        for piece_id, expected in enumerate((BLANK, SOS_EOS, UNKNOWN)):
            piece = self._model.id_to_piece(piece_id)
            if piece != expected:
                raise ValueError(
                    f"{model}: token {piece_id} is {piece!r}, expected {expected!r}; train it with local/train_bpe.py"
                )
        self.blank_id = 0
        self.unknown_id = 2
        self.vocab_size: int = self._model.get_piece_size()

    @property
    def tokens(self) -> list[str]:
        """The pieces in the order of their ids."""
        return [self._model.id_to_piece(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; what the model cannot spell becomes `<unk>` (see unknown_characters)."""
        return self._model.encode(" ".join(text.split()))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; `<blk>` and `<sos/eos>` give nothing, `<unk>` gives a word of its own."""
        return self._model.decode(list(ids))

    def unknown_characters(self, text: str) -> set[str]:
        """The characters of `text` for which the model has no token. Empty for text that it can spell."""
        return {char for char in set("".join(text.split())) if self.unknown_id in self._model.encode(char)}


def train_tokenizer(
    text_path: str | Path, lang_dir: str | Path, model_type: str, vocab_size: int | None = None
) -> None:
    """Train sentencepiece on `text_path` and write `bpe.model` and `tokens.txt` into `lang_dir`.

    The model covers every character of the text and leaves the spelling as it is (no Unicode folding): what
    is decoded is spelled as the transcripts are.

    Args:
      text_path: one transcript per line, UTF-8.
      model_type: "bpe" or "char".
      vocab_size: number of tokens including the three special ones. For "char" it is an upper limit:
        there are as many tokens as the text has characters, and None sets no limit.
    Raises:
      ValueError: text without words; vocab_size below the number of characters, or, for "bpe", above what the
        text supports; the message names the limit.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model type {model_type!r}: choose one of {', '.join(MODEL_TYPES)}")
    if vocab_size is None and model_type != "char":
        raise ValueError(f"model type {model_type!r} needs a vocab_size")
    with open(text_path, encoding="utf-8") as file:
        sentences = [" ".join(line.split()) for line in file]
    characters = set("".join(sentences)) - {" "}
    if not characters:
        raise ValueError(f"{text_path} holds no words to train a tokenizer on")
    smallest = len(characters) + 4  # the three special tokens and sentencepiece's mark of a word's beginning
    if vocab_size is not None and vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {text_path} has {len(characters)} different characters, "
            f"so at least {smallest} tokens are needed; raise vocab_size or clean the text"
        )

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=smallest if model_type == "char" else vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",
            # control symbols: a transcript that happens to contain "<blk>" never becomes a blank
            control_symbols=[BLANK, SOS_EOS],
            unk_id=2,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,  # longer lines are dropped silently; no transcript has a megabyte
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if limit is None:
            raise ValueError(f"sentencepiece cannot train on {text_path}: {error}") from error
        raise ValueError(
            f"vocab_size {vocab_size} is too large for {text_path}: it supports at most {limit[1]} tokens; "
            f"set vocab_size to {limit[1]} or less"
        ) from None

    lang_dir = Path(lang_dir)
    with atomic_write(lang_dir / "bpe.model", "wb") as file:
        file.write(model.getvalue())
    with atomic_write(lang_dir / "tokens.txt") as file:
        for piece_id, piece in enumerate(Tokenizer(lang_dir).tokens):
            file.write(f"{piece} {piece_id}\n")
