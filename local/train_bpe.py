#!/usr/bin/env python3
"""Write a lang_dir's bpe.model and tokens.txt: train a sentencepiece model, or take an existing one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.tokens import ModelType, take_tokenizer, train_tokenizer
from splitformer.data.tokenizer import Tokenizer
from splitformer.errors import UserError


@dataclass(frozen=True)
class Options:
    """Write a lang_dir's bpe.model and tokens.txt: train a sentencepiece model, or take an existing one."""

    lang_dir: Path
    text: Path | None = None
    """training transcripts, one per line"""
    bpe_model: Path | None = None
    """a bpe.model of this project, to take instead of training one"""
    model_type: ModelType = "bpe"
    vocab_size: int | None = None
    """number of tokens; for char an upper limit"""


def run(options: Options) -> None:
    if options.bpe_model and not options.text:
        take_tokenizer(options.bpe_model, options.lang_dir)
    elif options.text and not options.bpe_model:
        train_tokenizer(options.text, options.lang_dir, options.model_type, options.vocab_size)
    else:
        raise UserError("give either --text or --bpe-model")
    origin = options.bpe_model or options.model_type
    print(f"{options.lang_dir / 'bpe.model'}: {Tokenizer(options.lang_dir).vocab_size} tokens ({origin})")


if __name__ == "__main__":
    sys.exit(command(run))
