#!/usr/bin/env python3
"""Compute the features of a split and write its cuts; run again after an interruption, it resumes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.fbank import compute_fbank
from splitformer.data.features import Extractor, FbankOptions


@dataclass(frozen=True)
class Options:
    """Compute the features of a split and write its cuts; run again after an interruption, it resumes."""

    recordings: Path
    supervisions: Path
    output_cuts: Path
    """cuts manifest to write, .jsonl or .jsonl.gz"""
    storage_dir: Path
    """folder for the features"""
    num_jobs: int = 1
    """processes"""
    fbank: Extractor = "lhotse"
    num_mel_bins: int = 80
    speed_perturb: bool = False
    """add copies at 0.9 and 1.1 times the speed"""
    strict: bool = False
    """unreadable audio is an error"""


def run(options: Options) -> None:
    summary = compute_fbank(
        options.recordings,
        options.supervisions,
        options.output_cuts,
        options.storage_dir,
        FbankOptions(options.fbank, options.num_mel_bins),
        num_jobs=options.num_jobs,
        speed_perturb=options.speed_perturb,
        strict=options.strict,
    )
    for cut, reason in summary.skipped.items():
        print(f"skipped {cut}: {reason}", file=sys.stderr)
    hours = summary.seconds / 3600
    print(f"{options.output_cuts}: {summary.num_cuts} cuts, {hours:.2f} hours, {len(summary.skipped)} skipped")


if __name__ == "__main__":
    sys.exit(command(run))
