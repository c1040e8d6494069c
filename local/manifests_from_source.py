#!/usr/bin/env python3
"""Write the manifests of a split of own data."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from splitformer.cli import command, conf
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.rules import SplitRule, TextRules, check_shares, source_pairs
from splitformer.corpora.sources import ReadOptions


@dataclass(frozen=True)
class Options:
    """Write the manifests of a split of own data."""

    source: Annotated[Path, conf.arg(name="from", metavar="SOURCE")]
    """own data, see new_corpus.sh --help"""
    split: Literal["train", "dev", "test"]
    recordings: Path
    """manifest to write"""
    supervisions: Path
    """manifest to write"""
    reading: conf.OmitArgPrefixes[ReadOptions]
    text: conf.OmitArgPrefixes[TextRules]
    division: conf.OmitArgPrefixes[SplitRule]
    limit_utterances: int | None = None
    """take at most so many utterances, evenly over the split"""
    strict: bool = False
    """utterances that would be left out are errors"""
    check_audio: Literal["all", "headers"] = "headers"
    """decode all audio, or only headers and ends of files"""


def run(options: Options) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    check_shares(options.division.dev_share, options.division.test_share)
    skipped = Skipped(options.strict)
    pairs = source_pairs(
        options.source,
        options.split,
        options.division,
        options.text,
        skipped,
        options.reading,
        limit=options.limit_utterances,
        decode=options.check_audio == "all",
    )
    count = write_split(pairs, options.recordings, options.supervisions)
    print(f"{options.supervisions}: {count} utterances written, {len(skipped)} of the source left out")


if __name__ == "__main__":
    sys.exit(command(run))
