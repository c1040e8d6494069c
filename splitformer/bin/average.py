"""Average the weights over the last epochs of a training run: EXP/epoch-N.pt to EXP/averaged.pt."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.checkpoint import averaged, save_checkpoint
from splitformer.cli import command


@dataclass(frozen=True)
class Options:
    """Average the weights over all steps of the last epochs of a training run."""

    exp_dir: Path
    """folder with epoch-N.pt"""
    epoch: int | None = None
    """last epoch of the average (default: the newest)"""
    avg: int | None = None
    """number of epochs (default: training.average_epochs; training keeps that many and one more)"""
    output: Path | None = None
    """checkpoint to write (default: EXP_DIR/averaged.pt)"""


def run(options: Options) -> None:
    contents = averaged(options.exp_dir, options.epoch, options.avg)
    output = options.output or options.exp_dir / "averaged.pt"
    save_checkpoint(output, contents)
    print(f"{output}: epochs {contents['epoch'] - contents['avg'] + 1} to {contents['epoch']}")


if __name__ == "__main__":
    sys.exit(command(run))
