#!/usr/bin/env python3
"""Make the manifests of a split from own data: a table, a Kaldi data directory, audio and text, manifests of Lhotse."""

import argparse
import logging
import sys
from pathlib import Path

from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.rules import CASES, DIGITS, PUNCTUATIONS, SPLIT_KEYS, SplitRule, TextRules, source_pairs
from splitformer.corpora.sources import SPLITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="as of new_corpus.sh, see there")
    parser.add_argument("--split", choices=list(SPLITS), required=True)
    parser.add_argument("--split-by", choices=SPLIT_KEYS, default="utterance", help="what stays together")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--dev-share", type=float, default=0.1)
    parser.add_argument("--test-share", type=float, default=0.1)
    parser.add_argument("--case", choices=CASES, default="keep")
    parser.add_argument("--punctuation", choices=PUNCTUATIONS, default="keep")
    parser.add_argument("--digits", choices=DIGITS, default="keep", help="reject: leave out utterances with digits")
    parser.add_argument("--channel", type=int, default=0, help="of recordings with several, counted from 0")
    parser.add_argument("--audio-dir", type=Path, help="what relative paths of the source start from")
    parser.add_argument("--speakers", choices=("folders", "none"), help="of a folder: whether its folders are speakers")
    parser.add_argument("--limit-utterances", type=int, help="at most so many, evenly over the split")
    parser.add_argument("--recordings", type=Path, required=True, help="manifest to write")
    parser.add_argument("--supervisions", type=Path, required=True, help="manifest to write")
    parser.add_argument("--strict", action="store_true", help="whatever would be left out is fatal")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    skipped = Skipped(args.strict)
    pairs = source_pairs(
        args.source,
        args.split,
        SplitRule(args.split_by, args.split_seed, args.dev_share, args.test_share),
        TextRules(args.case, args.punctuation, args.digits),
        skipped,
        channel=args.channel,
        audio_dir=args.audio_dir,
        speakers_from_folders=None if args.speakers is None else args.speakers == "folders",
        limit=args.limit_utterances,
    )
    try:
        count = write_split(pairs, args.recordings, args.supervisions)
    except (ValueError, OSError) as error:
        sys.exit(f"manifests_from_source: {error}")
    print(f"{args.supervisions}: {count} utterances, {len(skipped)} skipped")


if __name__ == "__main__":
    main()
