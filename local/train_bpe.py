#!/usr/bin/env python3
"""Train the sentencepiece model of a lang_dir: bpe.model and tokens.txt."""

import argparse
import sys
from pathlib import Path

from splitformer.data.tokenizer import MODEL_TYPES, Tokenizer, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="training transcripts, one per line")
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="bpe")
    parser.add_argument("--vocab-size", type=int, help="number of tokens; with char an upper limit")
    args = parser.parse_args()
    try:
        train_tokenizer(args.text, args.lang_dir, args.model_type, args.vocab_size)
    except (ValueError, OSError) as error:
        sys.exit(f"train_bpe: {error}")
    print(f"{args.lang_dir / 'bpe.model'}: {Tokenizer(args.lang_dir).vocab_size} tokens ({args.model_type})")


if __name__ == "__main__":
    main()
