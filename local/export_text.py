#!/usr/bin/env python3
"""Write the transcripts of some splits, one per line, in the manifests' order."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.data.manifests import ManifestError, read_supervisions
from splitformer.files import atomic_write


@dataclass(frozen=True)
class Options:
    """Write the transcripts of some splits, one per line, in the manifests' order."""

    supervisions: tuple[Path, ...]
    """manifests"""
    output: Path


def run(options: Options) -> None:
    lines = words = 0
    with atomic_write(options.output) as file:
        for path in options.supervisions:
            for segment in read_supervisions(path):
                if text := (segment.text or "").split():
                    file.write(" ".join(text) + "\n")
                    lines += 1
                    words += len(text)
        if not lines:
            raise ManifestError(f"no transcript in {', '.join(map(str, options.supervisions))}")
    print(f"{options.output}: {lines} lines, {words} words")


if __name__ == "__main__":
    sys.exit(command(run))
