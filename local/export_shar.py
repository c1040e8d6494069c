#!/usr/bin/env python3
"""Write cuts and their features as Lhotse Shar, a few large files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.shar import Packing, export_shar


@dataclass(frozen=True)
class Options:
    """Write cuts and their features as Lhotse Shar, a few large files."""

    cuts: Path
    """cuts manifest with features"""
    output_dir: Path
    packing: Packing = "numpy"
    """numpy: exact; lilcom: a third of the size, rounded"""


def run(options: Options) -> None:
    count = export_shar(options.cuts, options.output_dir, options.packing)
    print(f"{options.output_dir}: {count} cuts")


if __name__ == "__main__":
    sys.exit(command(run))
