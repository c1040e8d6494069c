"""Sentencepiece models of other projects."""

from __future__ import annotations

import io

import sentencepiece

SENTENCES = ["the cat sat on the mat", "a dog ate the hat", "hello there cat dog"]

RELEASED = {"bos_id": 1, "eos_id": 2, "pad_id": 11, "unk_id": 12, "user_defined_symbols": ["@"]}
"""The layout of the released code's units: the blank `@`, `<s>`, `</s>`, and `<pad>`, `<unk>` in the middle."""


def foreign_tokens(path, options=RELEASED, sentences=SENTENCES, vocab_size=24):
    """Write a sentencepiece model of another project to `path` and return it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))
