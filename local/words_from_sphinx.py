#!/usr/bin/env python3
"""Print the words of a dictionary in CMU sphinx's format, one per line."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.sphinx import sphinx_words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dictionary", type=Path, required=True, help="lines `WORD PHONE ...`")
    args = parser.parse_args()
    try:
        print("\n".join(sphinx_words(args.dictionary)))
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    main()
