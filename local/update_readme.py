"""Bring the tables of README.md up to date with the RESULTS.md files that they come from."""

from __future__ import annotations

import argparse
from pathlib import Path

from splitformer.files import atomic_write
from splitformer.report.readme import refresh

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme", type=Path, nargs="?", default=Path("README.md"))
    readme = parser.parse_args().readme
    text = refresh(readme)
    with atomic_write(readme) as file:
        file.write(text)
