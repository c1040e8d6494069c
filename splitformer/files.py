"""What the recipe writes down: records of decoding and training, and the one way in which files are written.

Standard library only, so that every other module may import it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` and move it to `path` once it is completely on disk.

    Readers see the old file or the new one, never a part. Where anything fails, a full disk included, the
    temporary file is removed, the old file stays as it was and the error goes on to the caller.

    Args:
      path: file to write; missing parent folders are made.
      mode: "w" (text, UTF-8) or "wb" (bytes).
    Yields:
      the open temporary file.
    Raises:
      ValueError: for another mode.
      OSError: where the file cannot be written.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode is {mode!r}; whole files are replaced: use 'w' (text) or 'wb' (bytes)")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    # not the tempfile module, whose files are unreadable for others: these keep the user's umask
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
    """Yield a temporary folder beside `path` and move it to `path` at the end of the block.

    A folder that is there is replaced. If anything fails, the temporary folder is removed and `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises ValueError that names the file where it is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it and make it again") from error
