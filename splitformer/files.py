"""Files: written as a whole or not at all, and read with errors that name them."""

from __future__ import annotations

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
def atomic_folder(path: str | Path, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` at the end of the block.

    A folder that is there is replaced. On any failure the temporary folder is removed and `path` stays as it was.

    Args:
      exclusive: no other process makes this folder now; temporary folders that killed processes left are removed.
    """
    path = Path(path)
    for killed in path.parent.glob(f".{path.name[:200]}.*.tmp") if exclusive else ():
        shutil.rmtree(killed, ignore_errors=True)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
