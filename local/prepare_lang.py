#!/usr/bin/env python3
"""Write words.txt, the lexicon and its FSTs L.pt and L_disambig.pt into a lang_dir that has a tokenizer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.lexicon import prepare_lang
from splitformer.corpora.ngram import read_sentences
from splitformer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """Write words.txt, the lexicon and its FSTs L.pt and L_disambig.pt into a lang_dir that has a tokenizer."""

    lang_dir: Path
    text: Path
    """training transcripts, one per line"""
    extra_words: Path | None = None
    """further words of the lexicon, one per line"""


def run(options: Options) -> None:
    files = filter(None, (options.text, options.extra_words))
    words = {word for path in files for sentence in read_sentences(path) for word in sentence}
    lexicon = prepare_lang(options.lang_dir, words, Tokenizer(options.lang_dir).encode)
    disambiguated = sum(spelling[-1].startswith("#") for _, spelling in lexicon)
    print(f"{options.lang_dir}: {len(lexicon)} words, {disambiguated} of them with a disambiguation symbol")


if __name__ == "__main__":
    sys.exit(command(run))
