"""Files: written as a whole or not at all, and read with errors that name them."""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from splitformer.errors import UserError


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, and rename it to `path` when it is completely on disk.

    Readers see the old file or the new one, never a part. On any failure, a full disk included, the temporary file is
    removed, the old file stays, and the error propagates.

    Args:
      path: file to write; missing parent folders are created.
      mode: "w" (text, UTF-8) or "wb" (bytes).
    Yields:
      the open temporary file.
    Raises:
      ValueError: for another mode.
      OSError: the file cannot be written.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode is {mode!r}; use 'w' (text) or 'wb' (bytes): files are replaced as a whole")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    # not the tempfile module, whose files other users cannot read: these follow the umask
    file = open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")  # noqa: SIM115
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` at the end of the block.

    A folder that is there is replaced. On any failure the temporary folder is removed and `path` stays as it was.
    Several processes may make the folder at once: each has a temporary folder, and the last one stays. The temporary
    folder is locked while its process lives, so that folders of killed processes are known, and removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    temporary, lock = _locked_folder(path)
    try:
        yield temporary
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove the temporary folders below `folder`, of targets called `name`, whose processes have ended.

    On a file system that cannot lock folders, none is removed.
    """
    import fcntl  # not on every system that the recogniser runs on

    pattern = name if name == "*" else glob.escape(name[:200])
    for left in folder.glob(f".{pattern}.*.tmp"):
        if not left.is_dir():
            continue
        with suppress(OSError):  # locked, or gone
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Make a temporary folder beside `path`; return it and the descriptor that holds its lock."""
    import fcntl

    while True:
        temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        try:
            lock = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if temporary.is_dir():  # else remove_abandoned saw it before the lock
            return temporary, lock
        os.close(lock)


def _replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`, whatever is there and whoever else does so at the same time."""
    while True:
        try:
            new.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        old = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
        with suppress(FileNotFoundError):
            path.rename(old)
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink()


def read_text(path: str | Path) -> str:
    """Return the text of a file, in UTF-8.

    Raises:
      UserError: the file is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
      UserError: the file is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it and create it again") from error
