#!/usr/bin/env python3
"""Check the manifests of a split and drop, or with --strict refuse, what cannot be used."""

import argparse
import logging
import sys
from pathlib import Path

from splitformer.corpora.validation import validate_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--supervisions", type=Path, required=True)
    parser.add_argument("--strict", action="store_true", help="whatever would be dropped is fatal")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        count, seconds, skipped = validate_split(args.recordings, args.supervisions, strict=args.strict)
    except (ValueError, OSError) as error:
        sys.exit(f"validate_cuts: {error}")
    print(f"{args.supervisions}: {count} utterances, {seconds / 3600:.2f} hours, {len(skipped)} skipped")


if __name__ == "__main__":
    main()
