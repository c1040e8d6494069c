#!/usr/bin/env python3
"""Write cuts and their features as Lhotse Shar: a few large files that may lie anywhere."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.shar import PACKINGS, export_shar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=Path, required=True, help="cuts manifest with features")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--packing", choices=PACKINGS, default="numpy", help="numpy: exact; lilcom: smaller, rounded")
    args = parser.parse_args()
    try:
        count = export_shar(args.cuts, args.output_dir, args.packing)
    except (ValueError, OSError) as error:
        sys.exit(f"export_shar: {error}")
    print(f"{args.output_dir}: {count} cuts")


if __name__ == "__main__":
    main()
