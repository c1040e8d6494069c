#!/usr/bin/env python3
"""Make words.txt, the lexicon and its FSTs L.pt and L_disambig.pt in a lang_dir that has a tokenizer."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.lexicon import prepare_lang
from splitformer.data.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="training transcripts, one per line")
    parser.add_argument("--extra-words", type=Path, help="further words of the lexicon, one per line")
    args = parser.parse_args()
    try:
        words: set[str] = set()
        for path in filter(None, (args.text, args.extra_words)):
            with open(path, encoding="utf-8") as file:
                words.update(word for line in file for word in line.split())
        lexicon = prepare_lang(args.lang_dir, words, Tokenizer(args.lang_dir).encode)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_lang: {error}")
    disambiguated = sum(spelling[-1].startswith("#") for _, spelling in lexicon)
    print(f"{args.lang_dir}: {len(lexicon)} words, {disambiguated} of them with a disambiguation symbol")


if __name__ == "__main__":
    main()
