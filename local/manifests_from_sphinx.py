#!/usr/bin/env python3
"""Make the manifests of a split from a corpus in CMU sphinx's layout: a list of files and a transcription."""

import argparse
import logging
import sys
from pathlib import Path

from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.sphinx import sphinx_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fileids", type=Path, required=True, help="one path per line, without suffix")
    parser.add_argument("--transcription", type=Path, required=True, help="lines `<s> TEXT </s> (utterance)`")
    parser.add_argument("--audio-dir", type=Path, required=True, help="what the paths are relative to")
    parser.add_argument("--suffix", default=".sph", help="of the audio files (default: .sph)")
    parser.add_argument("--speakers", nargs="*", default=[], help="take these only (the folders' names)")
    parser.add_argument("--exclude-speakers", nargs="*", default=[], help="take all but these")
    parser.add_argument("--limit-utterances", type=int, help="at most so many, evenly over the list")
    parser.add_argument("--recordings", type=Path, required=True, help="manifest to write")
    parser.add_argument("--supervisions", type=Path, required=True, help="manifest to write")
    parser.add_argument("--strict", action="store_true", help="unreadable audio is fatal")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    skipped = Skipped()
    pairs = sphinx_pairs(
        args.fileids,
        args.transcription,
        args.audio_dir,
        skipped,
        suffix=args.suffix,
        speakers=args.speakers,
        exclude_speakers=args.exclude_speakers,
        limit=args.limit_utterances,
        strict=args.strict,
    )
    try:
        count = write_split(pairs, args.recordings, args.supervisions)
    except (ValueError, OSError) as error:
        sys.exit(f"manifests_from_sphinx: {error}")
    print(f"{args.supervisions}: {count} utterances, {len(skipped)} skipped")


if __name__ == "__main__":
    main()
