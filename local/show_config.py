#!/usr/bin/env python3
"""Print a resolved conf as JSON with sorted keys, or one of its values."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.config import ConfigError, load_config


@dataclass(frozen=True)
class Options:
    """Print a conf file with its defaults, base and overrides applied."""

    config: Path
    """conf file (TOML)"""
    set: tuple[str, ...] = ()
    """override values of the conf, as SECTION.KEY=VALUE"""
    print: str | None = None
    """print only the value of SECTION.KEY, with items of a list separated by spaces"""


def run(options: Options) -> None:
    tables = load_config(options.config, options.set).to_dict()
    if options.print is None:
        print(json.dumps(tables, indent=1, sort_keys=True))
        return
    section, _, key = options.print.partition(".")
    if key not in tables.get(section, {}):
        raise ConfigError(f"--print {options.print}: there is no such key; sections are {', '.join(tables)}")
    value = tables[section][key]
    print(*value if isinstance(value, list) else [value])


if __name__ == "__main__":
    sys.exit(command(run))
