"""Text to tokens and back, by sentencepiece.

Ids follow icefall: `<blk>` = 0 (the CTC blank), `<sos/eos>` = 1, `<unk>` = 2, then the pieces. A `lang_dir`
holds `bpe.model`, which this module reads, and `tokens.txt` (`piece id`, one a line), which the k2 graphs and
deployments read. The file is called `bpe.model` for characters too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from splitformer.config import BLANK, SOS_EOS, UNKNOWN


class Tokenizer:
    """Encodes with the sentencepiece model `lang_dir/bpe.model`.

    Raises FileNotFoundError without one, ValueError where its ids are not the ones of this project.
    """

    def __init__(self, lang_dir: str | Path):
        model = Path(lang_dir) / "bpe.model"
        if not model.is_file():
            raise FileNotFoundError(f"{model} does not exist; local/train_bpe.py makes it")
        self._model = _load(model)
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


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The model, with the ids of this project."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is no sentencepiece model ({error})") from error
    for piece_id, expected in enumerate((BLANK, SOS_EOS, UNKNOWN)):
        piece = model.id_to_piece(piece_id)
        if piece != expected:
            raise ValueError(
                f"{path}: token {piece_id} is {piece!r}, expected {expected!r}; train it with local/train_bpe.py, or "
                "import it with splitformer.bin.import_reference"
            )
    return model
