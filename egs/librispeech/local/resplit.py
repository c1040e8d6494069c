#!/usr/bin/env python3
"""Write the manifests of some speakers of LibriSpeech's splits, as one split."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.manifests import Skipped, spread, write_split
from splitformer.corpora.recipes import recipe_pairs
from splitformer.data.manifests import ManifestError


@dataclass(frozen=True)
class Options:
    """Write the manifests of some speakers of LibriSpeech's splits, as one split."""

    corpus_dir: Path
    """folder of the splits"""
    sources: tuple[str, ...]
    """splits to read"""
    recordings: Path
    """manifest to write"""
    supervisions: Path
    """manifest to write"""
    speakers: tuple[str, ...] = ()
    """take these speakers only"""
    exclude_speakers: tuple[str, ...] = ()
    """take all speakers but these"""
    num_jobs: int = 1
    """threads"""
    limit_utterances: int | None = None
    """take at most so many utterances, evenly over the speakers"""
    strict: bool = False
    """unreadable audio is an error"""


def run(options: Options) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    skipped = Skipped(options.strict)
    pairs, counts = [], []
    for source in options.sources:
        chosen = [
            (recording, segments)
            for recording, segments in recipe_pairs(
                "librispeech", options.corpus_dir, source, skipped, num_jobs=options.num_jobs
            )
            if is_chosen(recording.id.partition("-")[0], options)
        ]
        pairs += chosen
        counts.append(f"{len(chosen)} of {source}")
    if not pairs:
        raise ManifestError(f"{options.corpus_dir}: none of the speakers {', '.join(options.speakers)} is in "
                            f"{', '.join(options.sources)}")  # fmt: skip
    count = write_split(spread(pairs, options.limit_utterances), options.recordings, options.supervisions)
    speakers = len({recording.id.partition("-")[0] for recording, _ in pairs})
    print(f"{options.supervisions}: {count} utterances ({', '.join(counts)}; {speakers} speakers), "
          f"{len(skipped)} skipped")  # fmt: skip


def is_chosen(speaker: str, options: Options) -> bool:
    return speaker not in options.exclude_speakers and (not options.speakers or speaker in options.speakers)


if __name__ == "__main__":
    sys.exit(command(run))
