#!/usr/bin/env python3
"""Estimate an n-gram language model (interpolated modified Kneser-Ney) and write it in the ARPA format."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.ngram import estimate_arpa, perplexity, read_sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="training transcripts, one per line")
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--arpa", type=Path, required=True, help="file to write")
    parser.add_argument("--extra-words", type=Path, help="further words of the vocabulary, one per line")
    parser.add_argument("--dev-text", type=Path, help="print the perplexity of this text")
    args = parser.parse_args()
    try:
        extra_words = args.extra_words.read_text(encoding="utf-8").split() if args.extra_words else []
        model = estimate_arpa(args.text, args.arpa, args.order, extra_words)
        ngrams = [sum(len(ngram) == n for ngram in model.log10_probs) for n in range(1, args.order + 1)]
        print(f"{args.arpa}: {' + '.join(map(str, ngrams))} n-grams of order 1 to {args.order}")
        if args.dev_text:
            dev = perplexity(model, read_sentences(args.dev_text))
            print(
                f"{args.dev_text}: perplexity {dev.perplexity:.2f} "
                f"({dev.words} words, {dev.sentences} sentences, {dev.unknown} unknown words left out)"
            )
    except (ValueError, OSError) as error:
        sys.exit(f"estimate_lm: {error}")


if __name__ == "__main__":
    main()
