#!/usr/bin/env python3
"""Print a conf file as it is resolved: defaults, base, file and overrides, as JSON with sorted keys."""

import argparse
import json
import sys
from pathlib import Path

from splitformer.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    try:
        print(json.dumps(load_config(args.config, args.set).to_dict(), indent=1, sort_keys=True))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
