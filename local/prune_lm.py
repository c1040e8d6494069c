#!/usr/bin/env python3
"""Leave out of an ARPA file the n-grams that matter least (entropy pruning, Stolcke 1998), for a smaller graph."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.ngram import read_arpa, write_arpa
from splitformer.corpora.ngram_pruning import prune_ngrams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arpa", type=Path, required=True)
    parser.add_argument("--threshold", type=float, required=True, help="relative rise of the perplexity, such as 1e-7")
    parser.add_argument("--output", type=Path, required=True, help="ARPA file to write")
    args = parser.parse_args()
    try:
        model = read_arpa(args.arpa)
        pruned = prune_ngrams(model, args.threshold)
        write_arpa(pruned, args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"prune_lm: {error}")
    print(f"{args.arpa}: {len(model.log10_probs)} n-grams, {len(pruned.log10_probs)} of them kept in {args.output}")


if __name__ == "__main__":
    main()
