#!/usr/bin/env python3
"""Print a conf file as it is resolved: defaults, base, file and overrides, as JSON with sorted keys; or one value."""

import argparse
import json
import sys
from pathlib import Path

from splitformer.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--print", metavar="SECTION.KEY", help="this value alone, items of a list by spaces")
    args = parser.parse_args()
    try:
        tables = load_config(args.config, args.set).to_dict()
        if args.print is None:
            print(json.dumps(tables, indent=1, sort_keys=True))
        else:
            section, _, key = args.print.partition(".")
            value = tables[section][key]
            print(*value if isinstance(value, list) else [value])
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
