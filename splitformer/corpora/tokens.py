"""Make the tokenizer of a `lang_dir`: train sentencepiece, take an existing model, or import a foreign one."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as protobuf

from splitformer.config import BLANK, SOS_EOS, UNKNOWN
from splitformer.data.tokenizer import Tokenizer, load_sentencepiece
from splitformer.errors import UserError
from splitformer.files import atomic_write

ModelType = Literal["bpe", "char"]
Case = Literal["keep", "upper", "lower"]
CASES: dict[Case, Callable[[str], str]] = {"keep": str, "upper": str.upper, "lower": str.lower}


def train_tokenizer(
    text_path: str | Path, lang_dir: str | Path, model_type: ModelType, vocab_size: int | None = None
) -> None:
    """Train sentencepiece on `text_path` and write `bpe.model` and `tokens.txt` into `lang_dir`.

    The model covers every character of the text and keeps its spelling (no Unicode normalisation), so that decoded text
    is spelled as the transcripts are.

    Args:
      text_path: one transcript per line, UTF-8.
      vocab_size: number of tokens, including the three special ones. For "char", which has as many tokens as the text
        has characters, an upper limit, or None.
    Raises:
      UserError: the text has no words; vocab_size is below the number of characters or, for "bpe", above what the text
        supports. The message names the limit.
    """
    if vocab_size is None and model_type != "char":
        raise UserError(f"model type {model_type!r} needs a vocab_size")
    characters = {char for sentence in _sentences(text_path) for char in sentence} - {" "}
    if not characters:
        raise UserError(f"{text_path} has no words to train a tokenizer on")
    smallest = len(characters) + 4  # the three special tokens and sentencepiece's mark of a word's beginning
    if vocab_size is not None and vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: {text_path} has {len(characters)} different characters, "
            f"so at least {smallest} tokens are needed; raise vocab_size or clean the text"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(text_path),
            model_writer=model,
            model_type=model_type,
            vocab_size=smallest if model_type == "char" else vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",
            # control symbols: "<blk>" in a transcript never becomes a blank
            control_symbols=[BLANK, SOS_EOS],
            unk_id=2,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,  # longer lines would be dropped silently; no transcript has a megabyte
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if limit is None:
            raise UserError(f"sentencepiece cannot train on {text_path}: {error}") from error
        raise UserError(
            f"vocab_size {vocab_size} is too large for {text_path}: it supports at most {limit[1]} tokens; "
            f"set vocab_size to {limit[1]} or less"
        ) from None
    _write(model.getvalue(), lang_dir)


def take_tokenizer(model_path: str | Path, lang_dir: str | Path) -> None:
    """Copy a sentencepiece model of this project into `lang_dir`, with its `tokens.txt`. Raises UserError."""
    load_sentencepiece(Path(model_path))
    _write(Path(model_path).read_bytes(), lang_dir)


def import_tokenizer(
    model_path: str | Path, lang_dir: str | Path, num_units: int, blank_id: int = 0, case: Case = "keep"
) -> list[int | None]:
    """Write a foreign sentencepiece model, whose units a CTC model has, into `lang_dir` with this project's ids.

    The blank becomes 0, `<s>` 1, the unknown unit 2; the other units follow in their order. If a role has no unit, or
    that of the blank plays it too, a new unit is added. Control symbols stay such, and are spelled as nothing. Text is
    taken as it is, without the foreign model's normalisation.

    Args:
      num_units: number of units of the CTC model.
      blank_id: number of the foreign unit that is CTC's blank; its piece stands for nothing else.
      case: of the pieces; choose that of the transcripts.
    Returns:
      for each of our units its number in the foreign model, None for a new unit.
    Raises:
      UserError: the file is not a sentencepiece model or one of another size, the blank_id is not in it, or two pieces
        become one in this case.
    """
    model = protobuf.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(Path(model_path).read_bytes())
        foreign = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except (ValueError, RuntimeError, DecodeError) as error:
        raise UserError(f"{model_path} is not a sentencepiece model ({error})") from error
    size = len(model.pieces)
    if size != num_units:
        raise UserError(
            f"{model_path} has {size} units, the heads of the model have {num_units}: give the sentencepiece model "
            "with which it was trained"
        )
    if not 0 <= blank_id < size:
        raise UserError(f"blank {blank_id}: {model_path} has units 0 to {size - 1}")

    roles = [blank_id, foreign.bos_id(), foreign.unk_id()]
    rows = [role if role >= 0 and role not in roles[:i] else None for i, role in enumerate(roles)]
    rows += [i for i in range(size) if i not in rows]
    kinds = protobuf.ModelProto.SentencePiece  # type: ignore[attr-defined]
    pieces = []
    for number, row in enumerate(rows):
        piece = kinds() if row is None else kinds.FromString(model.pieces[row].SerializeToString())
        if number < 3:
            piece.piece = (BLANK, SOS_EOS, UNKNOWN)[number]
            piece.score = 0.0
            piece.type = kinds.UNKNOWN if number == 2 else kinds.CONTROL
        elif piece.type in (kinds.NORMAL, kinds.USER_DEFINED):
            piece.piece = CASES[case](piece.piece)
        pieces.append(piece)
    if twice := [piece for piece, count in Counter(p.piece for p in pieces).items() if count > 1]:
        raise UserError(f"{model_path}: in {case} case two pieces are {', '.join(twice[:5])}; keep the case")
    del model.pieces[:]
    model.pieces.extend(pieces)
    model.normalizer_spec.name, model.normalizer_spec.precompiled_charsmap = "identity", b""
    _write(model.SerializeToString(), lang_dir)
    return rows


def _sentences(text_path: str | Path) -> Iterator[str]:
    with open(text_path, encoding="utf-8") as file:
        for line in file:
            yield " ".join(line.split())


def _write(model: bytes, lang_dir: str | Path) -> None:
    """Write `bpe.model` and its `tokens.txt`."""
    lang_dir = Path(lang_dir)
    with atomic_write(lang_dir / "bpe.model", "wb") as file:
        file.write(model)
    with atomic_write(lang_dir / "tokens.txt") as file:
        for piece_id, piece in enumerate(Tokenizer(lang_dir).tokens):
            file.write(f"{piece} {piece_id}\n")
