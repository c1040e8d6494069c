#!/usr/bin/env python3
"""Make a lang_dir's bpe.model and tokens.txt: train the sentencepiece model, or take one that is there."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.tokens import MODEL_TYPES, take_tokenizer, train_tokenizer
from splitformer.data.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="training transcripts, one per line")
    source.add_argument("--bpe-model", type=Path, help="a bpe.model of this project, to take instead of training one")
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="bpe")
    parser.add_argument("--vocab-size", type=int, help="number of tokens; with char an upper limit")
    args = parser.parse_args()
    try:
        if args.bpe_model:
            take_tokenizer(args.bpe_model, args.lang_dir)
        else:
            train_tokenizer(args.text, args.lang_dir, args.model_type, args.vocab_size)
    except (ValueError, OSError) as error:
        sys.exit(f"train_bpe: {error}")
    origin = args.bpe_model or args.model_type
    print(f"{args.lang_dir / 'bpe.model'}: {Tokenizer(args.lang_dir).vocab_size} tokens ({origin})")


if __name__ == "__main__":
    main()
