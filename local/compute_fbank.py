#!/usr/bin/env python3
"""Compute the features of a split and write its cuts; run again after an interruption, it resumes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitformer.cli import command
from splitformer.corpora.fbank import compute_fbank, make_share
from splitformer.data.features import Extractor, FbankOptions
from splitformer.errors import UserError


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
    executor: str = "local"
    """where the processes run: local, or dask:ADDRESS, the workers of a Dask scheduler that see the same files"""
    shard: str | None = None
    """I/N: compute the I-th of N shares of the features and write no cuts; the same command without it collects them"""


def run(options: Options) -> None:
    fbank = FbankOptions(options.fbank, options.num_mel_bins)
    common: dict[str, Any] = {"num_jobs": options.num_jobs, "speed_perturb": options.speed_perturb}
    common["strict"] = options.strict
    if options.shard:
        share = parse_share(options.shard)
        if options.executor != "local":
            raise UserError("--shard divides the work among processes that you start, --executor starts them: give one")
        count = make_share(options.recordings, options.supervisions, options.storage_dir, fbank, share, **common)
        print(f"{options.storage_dir}: share {options.shard}, {count} shards")
        return
    summary = compute_fbank(
        options.recordings,
        options.supervisions,
        options.output_cuts,
        options.storage_dir,
        fbank,
        executor=options.executor,
        **common,
    )
    for cut, reason in summary.skipped.items():
        print(f"skipped {cut}: {reason}", file=sys.stderr)
    hours = summary.seconds / 3600
    print(f"{options.output_cuts}: {summary.num_cuts} cuts, {hours:.2f} hours, {len(summary.skipped)} skipped")


def parse_share(text: str) -> tuple[int, int]:
    """Return (I, N) for "I/N"."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise UserError(f"--shard {text}: expected I/N with I from 1 to N, such as 3/8")
    return int(number), int(total)


if __name__ == "__main__":
    sys.exit(command(run))
