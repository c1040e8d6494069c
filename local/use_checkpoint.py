#!/usr/bin/env python3
"""Take a checkpoint that was made elsewhere into an experiment, if it is of the system that the conf describes."""

import argparse
import sys
from pathlib import Path

from splitformer.checkpoint import CheckpointError, adopt_checkpoint
from splitformer.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        adopt_checkpoint(args.checkpoint, load_config(args.config, args.set), args.output)
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"use_checkpoint: {error}")
    print(f"{args.output}: {args.checkpoint}")


if __name__ == "__main__":
    main()
