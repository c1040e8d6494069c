#!/usr/bin/env python3
"""Write the manifests of noise from a folder in MUSAN's layout: recordings, and windows of them as supervisions."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.recipes import musan_pairs


@dataclass(frozen=True)
class Options:
    """Write the manifests of noise from a folder in MUSAN's layout: recordings, and windows of them as supervisions."""

    musan_dir: Path
    """with some of the folders music, noise and speech"""
    recordings: Path
    """manifest to write"""
    supervisions: Path
    """manifest to write"""
    limit_utterances: int | None = None
    """take at most so many recordings of each folder"""
    strict: bool = False
    """unreadable audio is an error"""


def run(options: Options) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    skipped = Skipped(options.strict)
    pairs = musan_pairs(options.musan_dir, skipped, limit=options.limit_utterances)
    count = write_split(pairs, options.recordings, options.supervisions)
    print(f"{options.supervisions}: {count} windows, {len(skipped)} recordings skipped")


if __name__ == "__main__":
    sys.exit(command(run))
