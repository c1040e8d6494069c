#!/usr/bin/env python3
"""Write the transcripts of some splits, one per line, in the manifests' order."""

import argparse
import sys
from pathlib import Path

from splitformer.data.manifests import read_supervisions
from splitformer.files import atomic_write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--supervisions", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    lines = words = 0
    try:
        with atomic_write(args.output) as file:
            for path in args.supervisions:
                for segment in read_supervisions(path):
                    text = " ".join((segment.text or "").split())
                    if text:
                        file.write(text + "\n")
                        lines += 1
                        words += len(text.split())
            if not lines:
                raise ValueError(f"no transcript in {', '.join(map(str, args.supervisions))}")
    except (ValueError, OSError) as error:
        sys.exit(f"export_text: {error}")
    print(f"{args.output}: {lines} lines, {words} words")


if __name__ == "__main__":
    main()
