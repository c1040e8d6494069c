#!/usr/bin/env python3
"""Bring an archive from a folder or a URL, check it, and unpack it."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.archives import fetch, unpack_gzip, unpack_tar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="where to download the archive where it is absent")
    parser.add_argument("--archive", type=Path, required=True, help="the file; taken as it is where it exists")
    parser.add_argument("--md5", help="its checksum")
    parser.add_argument("--member", help="the folder of a tar archive to unpack; without it, a gzip file is unpacked")
    parser.add_argument("--unpack", type=Path, help="folder or file that the content becomes (default: none)")
    args = parser.parse_args()
    try:
        archive = fetch(args.url, args.archive, args.md5)
        if args.unpack is None:
            print(archive)
        elif args.member:
            count = unpack_tar(archive, args.member, args.unpack)
            print(f"{args.unpack}: {count} files from {archive}")
        else:
            unpack_gzip(archive, args.unpack)
            print(f"{args.unpack}: from {archive}")
    except (ValueError, OSError) as error:
        sys.exit(f"fetch_archive: {error}")


if __name__ == "__main__":
    main()
