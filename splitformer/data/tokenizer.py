"""Convert text to tokens and back with sentencepiece.

Token ids follow icefall: `<blk>` = 0 (the CTC blank), `<sos/eos>` = 1, `<unk>` = 2, then the pieces. A `lang_dir` holds
`bpe.model`, which this module reads, and `tokens.txt` (one `piece id` per line), which the k2 graphs and deployments
read. The file is called `bpe.model` for character models too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from splitformer.config import BLANK, SOS_EOS, UNKNOWN
from splitformer.errors import UserError


class Tokenizer:
    """Encodes text with the sentencepiece model `lang_dir/bpe.model`. Raises UserError as `load_sentencepiece`."""

    blank_id = 0
    unknown_id = 2

    def __init__(self, lang_dir: str | Path) -> None:
        path = Path(lang_dir) / "bpe.model"
        self._model = load_sentencepiece(path)
        self.vocab_size: int = self._model.get_piece_size()
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        """of the model: the same for tokenizers that encode alike"""

    @property
    def tokens(self) -> list[str]:
        """The pieces in the order of their ids."""
        return [self._model.id_to_piece(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; what the model cannot spell becomes `<unk>` (see unknown_characters)."""
        return self._model.encode(" ".join(text.split()))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. `<blk>` and `<sos/eos>` are dropped; `<unk>` becomes a word of its own."""
        return self._model.decode(list(ids))

    def unknown_characters(self, text: str) -> set[str]:
        """Return the characters of `text` for which the model has no token."""
        return {char for char in set("".join(text.split())) if self.unknown_id in self._model.encode(char)}


def load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a sentencepiece model.

    Raises:
      UserError: the file is missing or damaged, or its first ids are not `<blk>`, `<sos/eos>` and `<unk>`.
    """
    if not path.is_file():
        raise UserError(f"there is no tokenizer {path}; local/train_bpe.py makes it")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UserError(f"{path} is not a sentencepiece model ({error})") from error
    for piece_id, expected in enumerate((BLANK, SOS_EOS, UNKNOWN)):
        piece = model.id_to_piece(piece_id)
        if piece != expected:
            raise UserError(
                f"{path}: token {piece_id} is {piece!r}, expected {expected!r}; train the model with "
                "local/train_bpe.py, or import it with splitformer.bin.import_released"
            )
    return model
