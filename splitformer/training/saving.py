"""The folder of a run: its lock, and its checkpoints.

`epoch-N.pt` is saved at the end of epoch N; `epoch-N-step-S.pt` inside epoch N, after step S of the run. A file appears
whole or not at all. If one is damaged nevertheless, the run resumes from the one before. Older epochs serve averaging
alone, and lose the state of the optimizer, half of their size.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from splitformer.checkpoint import (
    CheckpointError,
    epoch_checkpoints,
    load_checkpoint,
    load_contents,
    save_checkpoint,
)
from splitformer.errors import UserError

log = logging.getLogger(__name__)

KEPT = 2
"""Number of checkpoints inside epochs that are kept."""
RESUMABLE_EPOCHS = 2
"""Number of epochs, the newest, whose checkpoints keep the state of the optimizer."""
TO_RESUME = "to resume, repeat the command (bin/train: with --resume)"


class LockError(UserError):
    """The exp_dir is in use by another run, or cannot be written to."""


@contextmanager
def locked(exp_dir: Path) -> Iterator[None]:
    """Create `exp_dir` if needed and keep other runs out of it while the context is open.

    The kernel releases the lock when the process ends, however it ends. The file `.lock` stays and names its owner.

    Raises:
      LockError: another process has the lock, or the folder cannot be written to.
    """
    path = exp_dir / ".lock"
    lock = FileLock(path, timeout=0)
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n", encoding="utf-8")
    except Timeout:
        owner = path.read_text(encoding="utf-8").strip() or "it has just started"
        raise LockError(
            f"{exp_dir} is in use by another run: {owner}. Wait for it to end, stop it, or choose another --exp-dir"
        ) from None
    except OSError as error:
        raise LockError(
            f"--exp-dir {exp_dir} cannot be written to ({error.strerror or error}): make it writable, or choose another"
        ) from error
    try:
        yield
    finally:
        lock.release()


def newest_first(exp_dir: Path, inside_epochs: bool = False) -> list[Path]:
    """Return the checkpoints of a run from the newest to the oldest, or only those `inside_epochs`."""
    found = []
    for path in exp_dir.glob("epoch-*.pt"):
        if match := re.fullmatch(r"epoch-(\d+)(-step-(\d+))?\.pt", path.name):
            found.append((int(match[1]), int(match[3]) if match[2] else math.inf, path))
    return [path for _, step, path in sorted(found, reverse=True) if step < math.inf or not inside_epochs]


def load_newest(exp_dir: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the path and the contents of the newest checkpoint to resume from; (None, {}) if there are none at all.

    Raises:
      CheckpointError: there are checkpoints, but none can be read, or those that can have no optimizer state.
    """
    found = newest_first(exp_dir)
    for path in found:
        try:
            contents = load_checkpoint(path)
            if "optimizer" in contents:
                return path, contents
            log.warning("%s has no optimizer state, which only the newest checkpoints have", path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    if found:
        raise CheckpointError(
            f"no checkpoint of {exp_dir} can be read and resumed from: delete epoch-*.pt there to start again, or "
            "start another run from the weights of one with --init-from"
        )
    return None, {}


def remove_leftovers(exp_dir: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote. Call it with the lock held."""
    for path in exp_dir.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_step(exp_dir: Path, epoch: int, step: int, contents: Mapping[str, Any]) -> bool:
    """Save a checkpoint inside an epoch, remove older ones of this kind, and return whether it could be saved.

    If it could not, the previous checkpoint stays and the run continues, because the next attempt may succeed.
    """
    path = exp_dir / f"epoch-{epoch}-step-{step}.pt"
    try:
        save_checkpoint(path, contents)
    except OSError as error:
        log.error("cannot save %s (%s); %s", path, error, _kept(exp_dir))
        return False
    _remove(newest_first(exp_dir, inside_epochs=True)[KEPT:])
    return True


def save_epoch(exp_dir: Path, epoch: int, contents: Mapping[str, Any], keep_epochs: int) -> None:
    """Save the checkpoint of an epoch's end; remove those inside epochs, and of older ones what averaging can spare.

    Args:
      keep_epochs: number of epochs before this one to keep.
    Raises:
      CheckpointError: the disk is full even after removing older checkpoints inside epochs.
    """
    path = exp_dir / f"epoch-{epoch}.pt"
    try:
        save_checkpoint(path, contents)
    except OSError as error:
        log.error("cannot save %s (%s); removing older checkpoints inside epochs and trying again", path, error)
        _remove(newest_first(exp_dir, inside_epochs=True)[1:])
        try:
            save_checkpoint(path, contents)
        except OSError as again:
            raise CheckpointError(
                f"cannot save {path} ({again}); {_kept(exp_dir)}. Free some space; {TO_RESUME}"
            ) from again
    _remove(newest_first(exp_dir, inside_epochs=True))
    epochs = epoch_checkpoints(exp_dir)
    _remove(epochs.pop(number) for number in list(epochs) if number < epoch - keep_epochs)
    if epoch - RESUMABLE_EPOCHS in epochs:
        _remove_optimizer(epochs[epoch - RESUMABLE_EPOCHS])


def _remove_optimizer(path: Path) -> None:
    """Write a checkpoint again without the state of the optimizer. If it cannot be, it stays as it is."""
    try:
        contents = load_contents(path)
        if contents.pop("optimizer", None) is not None:
            save_checkpoint(path, contents)
    except (CheckpointError, OSError) as error:
        log.warning("cannot remove the optimizer's state from %s (%s)", path, error)


def _kept(exp_dir: Path) -> str:
    newest = next(iter(newest_first(exp_dir)), None)
    return f"{newest.name} is kept" if newest else "there is no earlier one"


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)  # another rank may have removed it, if the memory of several runs out
