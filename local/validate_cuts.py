#!/usr/bin/env python3
"""Check the manifests of a split and drop what cannot be used."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.validation import validate_split


@dataclass(frozen=True)
class Options:
    """Check the manifests of a split and drop what cannot be used."""

    recordings: Path
    supervisions: Path
    strict: bool = False
    """an error instead of dropping anything"""


def run(options: Options) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    count, seconds, skipped = validate_split(options.recordings, options.supervisions, strict=options.strict)
    hours = seconds / 3600
    print(f"{options.supervisions}: {count} utterances, {hours:.2f} hours after validation, {len(skipped)} removed")


if __name__ == "__main__":
    sys.exit(command(run))
