#!/usr/bin/env python3
"""Copy a checkpoint from elsewhere into an experiment, after checking that it has the model of the conf."""

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.checkpoint import adopt_checkpoint
from splitformer.cli import command
from splitformer.config import load_config


@dataclass(frozen=True)
class Options:
    """Copy a checkpoint if it has the model that a conf describes."""

    checkpoint: Path
    """checkpoint of bin/average or bin/import_released"""
    config: Path
    """conf file (TOML)"""
    output: Path
    """file to write"""
    set: tuple[str, ...] = ()
    """override values of the conf, as SECTION.KEY=VALUE"""


def run(options: Options) -> None:
    adopt_checkpoint(options.checkpoint, load_config(options.config, options.set), options.output)
    print(f"{options.output}: {options.checkpoint}")


if __name__ == "__main__":
    sys.exit(command(run))
