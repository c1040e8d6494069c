"""The checkpoints of a run: one at the end of each epoch, and the newest few of those made inside epochs.

`epoch-N.pt` is the end of epoch N; `epoch-N-step-S.pt` lies inside epoch N, after step S of the run. A file appears
whole or not at all; where one is damaged all the same, the run goes on from the one before.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitformer.checkpoint import CheckpointError, epoch_checkpoints, load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

KEPT = 2
"""checkpoints inside epochs that are kept"""


def step_checkpoints(exp_dir: Path) -> dict[int, Path]:
    """{S: exp_dir/epoch-N-step-S.pt}, rising."""
    found = {}
    for path in exp_dir.glob("epoch-*-step-*.pt"):
        if match := re.fullmatch(r"epoch-\d+-step-(\d+)\.pt", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest_first(exp_dir: Path) -> list[Path]:
    """All checkpoints of a run, from the one that is farthest on."""
    places = {(epoch, math.inf): path for epoch, path in epoch_checkpoints(exp_dir).items()}
    places |= {(int(path.name.split("-")[1]), float(step)): path for step, path in step_checkpoints(exp_dir).items()}
    return [places[place] for place in sorted(places, reverse=True)]


def load_newest(exp_dir: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint that can be read, and where it lies; (None, {}) where the run has none yet.

    Raises:
      CheckpointError: there are checkpoints, and none can be read.
    """
    found = newest_first(exp_dir)
    for path in found:
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s; going back to the one before", error)
    if found:
        raise CheckpointError(f"no checkpoint of {exp_dir} can be read: delete epoch-*.pt there to start anew")
    return None, {}


def remove_leftovers(exp_dir: Path) -> None:
    """Remove what a run that was killed while it wrote has left: nobody else writes here."""
    for path in exp_dir.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_step(exp_dir: Path, epoch: int, step: int, contents: Mapping[str, Any]) -> bool:
    """Save the state inside an epoch and remove all but the newest of its kind; False where that could not be.

    A full disk does not end the run: the checkpoint before stays, and the next attempt may succeed.
    """
    path = exp_dir / f"epoch-{epoch}-step-{step}.pt"
    try:
        save_checkpoint(path, contents)
    except OSError as error:
        before = next(iter(newest_first(exp_dir)), None)
        log.error("cannot save %s (%s); %s", path, error, f"{before.name} is kept" if before else "there is none yet")
        return False
    for old in list(step_checkpoints(exp_dir).values())[:-KEPT]:
        old.unlink()
    return True


def save_epoch(exp_dir: Path, epoch: int, contents: Mapping[str, Any], keep_epochs: int) -> None:
    """Save the end of an epoch, and remove what is not needed any more: those inside epochs, and old epochs.

    Args:
      keep_epochs: those before this one that averaging needs.
    Raises:
      CheckpointError: the disk is full, even without the checkpoints inside epochs.
    """
    path = exp_dir / f"epoch-{epoch}.pt"
    try:
        save_checkpoint(path, contents)
    except OSError as error:
        log.error("cannot save %s (%s); removing older checkpoints inside epochs and trying again", path, error)
        for old in list(step_checkpoints(exp_dir).values())[:-1]:
            old.unlink()
        try:
            save_checkpoint(path, contents)
        except OSError as again:
            before = next(iter(newest_first(exp_dir)), None)
            raise CheckpointError(
                f"cannot save {path} ({again}); {before.name if before else 'nothing'} is kept. Free some space and "
                "start again with --resume"
            ) from again
    for old in step_checkpoints(exp_dir).values():
        old.unlink()
    for old_epoch, old in epoch_checkpoints(exp_dir).items():
        if old_epoch < epoch - keep_epochs:
            old.unlink()
