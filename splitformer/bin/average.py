"""Average the weights over the last epochs of a training: EXP/epoch-N.pt to EXP/averaged.pt, ready to deploy.

    python -m splitformer.bin.average --exp-dir EXP [--epoch N] [--avg K]

The mean runs over every step of the K epochs that end with epoch N, not over K snapshots.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from splitformer.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from splitformer.config import Config
from splitformer.training.averaging import average_between, epoch_checkpoints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp-dir", type=Path, required=True)
    parser.add_argument("--epoch", type=int, help="last epoch of the average (default: the newest)")
    parser.add_argument("--avg", type=int, help="epochs to average (default: the conf's training.average_epochs)")
    args = parser.parse_args()
    try:
        average(args.exp_dir, args.epoch, args.avg)
    except (CheckpointError, ValueError) as error:
        print(f"average: {error}", file=sys.stderr)
        return 1
    return 0


def average(exp_dir: Path, epoch: int | None, avg: int | None) -> None:
    """Write `exp_dir/averaged.pt`."""
    found = epoch_checkpoints(exp_dir)
    if not found:
        raise CheckpointError(f"no epoch-N.pt in {exp_dir}: train first")
    epoch = epoch or max(found)
    last = load_checkpoint(_choose(found, epoch, exp_dir))
    avg = min(avg or Config.from_dict(last["config"]).training.average_epochs, epoch)
    if avg == epoch:  # from the first step on
        earlier, earlier_step = last["average"], 0
    else:
        first = load_checkpoint(_choose(found, epoch - avg, exp_dir))
        earlier, earlier_step = first["average"], first["average_step"]
    if last["average_step"] > earlier_step:
        model = average_between(earlier, earlier_step, last["average"], last["average_step"])
    else:  # fewer steps than training.average_period: there is no mean yet
        model = last["model"]
    save_checkpoint(
        exp_dir / "averaged.pt",
        {
            "model": model,
            "config": last["config"],
            "tokens": last["tokens"],
            "progress": last["progress"],
            "epoch": epoch,
            "avg": avg,
            "seed": last["seed"],
            "world_size": last["world_size"],
            "device": last["device"],
        },
    )
    print(f"{exp_dir / 'averaged.pt'}: epochs {epoch - avg + 1} to {epoch}")


def _choose(found: dict[int, Path], epoch: int, exp_dir: Path) -> Path:
    if epoch not in found:
        raise ValueError(f"{exp_dir} has no epoch-{epoch}.pt; there are epochs {', '.join(map(str, found))}")
    return found[epoch]


if __name__ == "__main__":
    sys.exit(main())
