#!/usr/bin/env python3
"""Speak a corpus with espeak-ng, from a specification of sentences and voices."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from splitformer.data.synthesis import load_spec, synthesise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="TOML file")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num-jobs", type=int, default=1, help="processes; the corpus does not depend on it")
    parser.add_argument("--limit-utterances", type=int, help="at most so many in each split")
    args = parser.parse_args()
    try:
        utterances = synthesise(
            load_spec(args.spec), args.output_dir, seed=args.seed, num_jobs=args.num_jobs, limit=args.limit_utterances
        )
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"synthesise: {error}")
    for split, count in Counter(each.split for each in utterances).items():
        speakers = {each.speaker.id for each in utterances if each.split == split}
        words = Counter(word for each in utterances if each.split == split for word in each.text.split())
        print(
            f"{args.output_dir / split}: {count} utterances, {len(speakers)} speakers, "
            f"{words.total()} words, {len(words)} different"
        )


if __name__ == "__main__":
    main()
