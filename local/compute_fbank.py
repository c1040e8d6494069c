#!/usr/bin/env python3
"""Compute the features of a split and write its cuts; called again after a fault, go on where it stopped."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.fbank import compute_fbank
from splitformer.data.features import EXTRACTORS, FbankOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--supervisions", type=Path, required=True)
    parser.add_argument("--output-cuts", type=Path, required=True, help="cuts manifest, .jsonl or .jsonl.gz")
    parser.add_argument("--storage-dir", type=Path, required=True, help="folder for the features")
    parser.add_argument("--num-jobs", type=int, default=1, help="processes")
    parser.add_argument("--fbank", choices=EXTRACTORS, default="lhotse")
    parser.add_argument("--num-mel-bins", type=int, default=80)
    parser.add_argument("--speed-perturb", action="store_true", help="add copies at 0.9 and 1.1 of the speed")
    parser.add_argument("--strict", action="store_true", help="unreadable audio is fatal")
    args = parser.parse_args()
    try:
        summary = compute_fbank(
            args.recordings,
            args.supervisions,
            args.output_cuts,
            args.storage_dir,
            FbankOptions(args.fbank, args.num_mel_bins),
            strict=args.strict,
            num_jobs=args.num_jobs,
            speed_perturb=args.speed_perturb,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"compute_fbank: {error}")
    for cut, reason in summary.skipped.items():
        print(f"skipped {cut}: {reason}", file=sys.stderr)
    print(
        f"{args.output_cuts}: {summary.num_cuts} cuts, {summary.seconds / 3600:.2f} hours, "
        f"{len(summary.skipped)} skipped"
    )


if __name__ == "__main__":
    main()
