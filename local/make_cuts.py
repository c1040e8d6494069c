#!/usr/bin/env python3
"""Write the cuts of a split without features, for training that computes them on the fly."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.fbank import write_audio_cuts


@dataclass(frozen=True)
class Options:
    """Write the cuts of a split without features, for training that computes them on the fly."""

    recordings: Path
    supervisions: Path
    output_cuts: Path
    """cuts manifest to write, .jsonl or .jsonl.gz"""
    speed_perturb: bool = False
    """add copies at 0.9 and 1.1 times the speed"""


def run(options: Options) -> None:
    files = options.recordings, options.supervisions, options.output_cuts
    summary = write_audio_cuts(*files, speed_perturb=options.speed_perturb)
    print(f"{options.output_cuts}: {summary.num_cuts} cuts, {summary.seconds / 3600:.2f} hours")


if __name__ == "__main__":
    sys.exit(command(run))
