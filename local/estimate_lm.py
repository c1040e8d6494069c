#!/usr/bin/env python3
"""Estimate an n-gram language model (interpolated modified Kneser-Ney) and write it in the ARPA format."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.ngram import estimate_arpa, perplexity, read_sentences


@dataclass(frozen=True)
class Options:
    """Estimate an n-gram language model (interpolated modified Kneser-Ney) and write it in the ARPA format."""

    text: Path
    """training transcripts, one per line"""
    arpa: Path
    """file to write"""
    order: int = 3
    extra_words: Path | None = None
    """further words of the vocabulary, one per line"""
    dev_text: Path | None = None
    """print the perplexity of this text"""


def run(options: Options) -> None:
    extra_words = options.extra_words.read_text(encoding="utf-8").split() if options.extra_words else []
    model = estimate_arpa(options.text, options.arpa, options.order, extra_words)
    ngrams = [sum(len(ngram) == n for ngram in model.log10_probs) for n in range(1, options.order + 1)]
    print(f"{options.arpa}: {' + '.join(map(str, ngrams))} n-grams of order 1 to {options.order}")
    if options.dev_text:
        dev = perplexity(model, read_sentences(options.dev_text))
        print(
            f"{options.dev_text}: perplexity {dev.perplexity:.2f} "
            f"({dev.words} words, {dev.sentences} sentences, {dev.unknown} unknown words left out)"
        )


if __name__ == "__main__":
    sys.exit(command(run))
