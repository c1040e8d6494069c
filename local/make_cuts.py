#!/usr/bin/env python3
"""Write the cuts of a split without features, for training that computes them as it goes."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.fbank import write_audio_cuts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--supervisions", type=Path, required=True)
    parser.add_argument("--output-cuts", type=Path, required=True, help="cuts manifest, .jsonl or .jsonl.gz")
    parser.add_argument("--speed-perturb", action="store_true", help="add copies at 0.9 and 1.1 of the speed")
    args = parser.parse_args()
    try:
        summary = write_audio_cuts(
            args.recordings, args.supervisions, args.output_cuts, speed_perturb=args.speed_perturb
        )
    except (ValueError, OSError) as error:
        sys.exit(f"make_cuts: {error}")
    print(f"{args.output_cuts}: {summary.num_cuts} cuts, {summary.seconds / 3600:.2f} hours")


if __name__ == "__main__":
    main()
