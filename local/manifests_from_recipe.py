#!/usr/bin/env python3
"""Write the manifests of a split with one of Lhotse's recipes."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.recipes import recipe_pairs
from splitformer.errors import UserError


@dataclass(frozen=True)
class Options:
    """Write the manifests of a split with one of Lhotse's recipes."""

    recipe: str
    """NAME of lhotse.recipes.prepare_NAME"""
    corpus_dir: Path
    split: str
    """Lhotse's `dataset_part`"""
    recordings: Path
    """manifest to write"""
    supervisions: Path
    """manifest to write"""
    folder: str | None = None
    """where below the corpus its audio is (default: in a folder of the split's name)"""
    recipe_options: tuple[str, ...] = ()
    """NAME=VALUE, arguments of the recipe"""
    num_jobs: int = 1
    """processes"""
    limit_utterances: int | None = None
    """take at most so many utterances, evenly over the split"""
    strict: bool = False
    """unreadable audio is an error"""


def run(options: Options) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    if wrong := [option for option in options.recipe_options if "=" not in option]:
        raise UserError(f"--recipe-options {wrong[0]}: expected NAME=VALUE")
    skipped = Skipped(options.strict)
    pairs = recipe_pairs(
        options.recipe,
        options.corpus_dir,
        options.split,
        skipped,
        folder=options.folder,
        options=dict(option.split("=", 1) for option in options.recipe_options),
        num_jobs=options.num_jobs,
        limit=options.limit_utterances,
    )
    count = write_split(pairs, options.recordings, options.supervisions)
    print(f"{options.supervisions}: {count} utterances written, {len(skipped)} of the source left out")


if __name__ == "__main__":
    sys.exit(command(run))
