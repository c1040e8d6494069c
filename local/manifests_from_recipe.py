#!/usr/bin/env python3
"""Make the manifests of a split by one of Lhotse's recipes."""

import argparse
import logging
import sys
from pathlib import Path

from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.recipes import recipe_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="NAME of lhotse.recipes.prepare_NAME")
    parser.add_argument("--corpus-dir", type=Path, required=True)
    parser.add_argument("--split", required=True, help="Lhotse's `dataset_part`")
    parser.add_argument("--folder", help="where below CORPUS_DIR its audio lies (default: a folder of its name)")
    parser.add_argument("--recipe-options", nargs="*", default=[], metavar="NAME=VALUE", help="passed to the recipe")
    parser.add_argument("--num-jobs", type=int, default=1)
    parser.add_argument("--limit-utterances", type=int, help="at most so many, evenly over the split")
    parser.add_argument("--recordings", type=Path, required=True, help="manifest to write")
    parser.add_argument("--supervisions", type=Path, required=True, help="manifest to write")
    parser.add_argument("--strict", action="store_true", help="unreadable audio is fatal")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    skipped = Skipped()
    pairs = recipe_pairs(
        args.recipe,
        args.corpus_dir,
        args.split,
        skipped,
        folder=args.folder,
        options=dict(option.split("=", 1) for option in args.recipe_options),
        num_jobs=args.num_jobs,
        limit=args.limit_utterances,
        strict=args.strict,
    )
    try:
        count = write_split(pairs, args.recordings, args.supervisions)
    except (ValueError, OSError) as error:
        sys.exit(f"manifests_from_recipe: {error}")
    print(f"{args.supervisions}: {count} utterances, {len(skipped)} skipped")


if __name__ == "__main__":
    main()
