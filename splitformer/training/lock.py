"""One run at a time in an exp_dir: a second one would delete and overwrite what the first is writing."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from splitformer.errors import UserError


class LockError(UserError):
    """The exp_dir cannot be had; the message says who has it, or why nothing can be written there."""


@contextmanager
def locked(exp_dir: Path) -> Iterator[None]:
    """Keep `exp_dir`, made where it is missing, to this process.

    The lock is the kernel's (flock) and ends with the process, however that ends: no stale lock is ever left. Its file,
    `.lock`, stays and says who had it last.

    Raises:
      LockError: another process has it, or the folder cannot be written to.
    """
    path = exp_dir / ".lock"
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise LockError(
            f"--exp-dir {exp_dir} cannot be written to ({error.strerror or error}): nothing of this run could be kept. "
            "Give another --exp-dir, or make it writable"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockError(
                f"{exp_dir} is in use by another run: {file.read().strip() or 'it has just started'}. Wait for its "
                "end, stop it, or choose another --exp-dir"
            ) from None
        file.seek(0)
        file.truncate()
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        file.flush()
        yield
