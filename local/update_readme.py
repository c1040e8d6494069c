#!/usr/bin/env python3
"""Update the tables of README.md from the RESULTS.md files that they name."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.files import atomic_write
from splitformer.report.readme import refresh


@dataclass(frozen=True)
class Options:
    """Update the tables of README.md from the RESULTS.md files that they name."""

    readme: Path = Path("README.md")
    """file to update"""


def run(options: Options) -> None:
    text = refresh(options.readme)
    with atomic_write(options.readme) as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(command(run))
