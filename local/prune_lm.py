#!/usr/bin/env python3
"""Remove the n-grams that matter least from an ARPA file (entropy pruning, Stolcke 1998), for a smaller graph."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.ngram import read_arpa, write_arpa
from splitformer.corpora.ngram_pruning import prune_ngrams


@dataclass(frozen=True)
class Options:
    """Remove the n-grams that matter least from an ARPA file (entropy pruning, Stolcke 1998), for a smaller graph."""

    arpa: Path
    threshold: float
    """relative increase of the perplexity below which an n-gram is removed, such as 1e-7"""
    output: Path
    """ARPA file to write"""


def run(options: Options) -> None:
    model = read_arpa(options.arpa)
    pruned = prune_ngrams(model, options.threshold)
    write_arpa(pruned, options.output)
    before, after = len(model.log10_probs), len(pruned.log10_probs)
    print(f"{options.arpa}: {before} n-grams, {after} of them kept in {options.output}")


if __name__ == "__main__":
    sys.exit(command(run))
