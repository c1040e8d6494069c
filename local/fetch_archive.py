#!/usr/bin/env python3
"""Download an archive, or take it from a folder, check it, and unpack it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.corpora.archives import fetch, unpack_gzip, unpack_tar


@dataclass(frozen=True)
class Options:
    """Download an archive, or take it from a folder, check it, and unpack it."""

    url: str
    """where to download the archive from if there is no file"""
    archive: Path
    """the file; one that is there is taken as it is"""
    md5: str | None = None
    """checksum"""
    member: str | None = None
    """folder of a tar archive to unpack; without it, a gzip file is unpacked"""
    unpack: Path | None = None
    """folder or file to unpack to (default: do not unpack)"""


def run(options: Options) -> None:
    archive = fetch(options.url, options.archive, options.md5)
    if options.unpack is None:
        print(archive)
    elif options.member:
        count = unpack_tar(archive, options.member, options.unpack)
        print(f"{options.unpack}: {count} files from {archive}")
    else:
        unpack_gzip(archive, options.unpack)
        print(f"{options.unpack}: from {archive}")


if __name__ == "__main__":
    sys.exit(command(run))
