"""Import the authors' released weights and tokens as a checkpoint of this project."""

from __future__ import annotations

import sys

from splitformer.cli import command
from splitformer.export.released import ImportOptions, import_released


def run(options: ImportOptions) -> None:
    print(import_released(options))


if __name__ == "__main__":
    sys.exit(command(run))
