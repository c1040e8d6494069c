#!/usr/bin/env python3
"""Make the manifests of noise from a folder in MUSAN's layout: recordings, and windows in the place of supervisions."""

import argparse
import logging
import sys
from pathlib import Path

from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.musan import musan_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--musan-dir", type=Path, required=True, help="with folders music, noise and speech, or some")
    parser.add_argument("--limit-utterances", type=int, help="at most so many recordings of each")
    parser.add_argument("--recordings", type=Path, required=True, help="manifest to write")
    parser.add_argument("--supervisions", type=Path, required=True, help="manifest to write")
    parser.add_argument("--strict", action="store_true", help="unreadable audio is fatal")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    skipped = Skipped()
    pairs = musan_pairs(args.musan_dir, skipped, limit=args.limit_utterances, strict=args.strict)
    try:
        count = write_split(pairs, args.recordings, args.supervisions)
    except (ValueError, OSError) as error:
        sys.exit(f"manifests_from_musan: {error}")
    print(f"{args.supervisions}: {count} windows, {len(skipped)} recordings skipped")


if __name__ == "__main__":
    main()
