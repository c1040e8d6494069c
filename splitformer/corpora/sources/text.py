"""Text files of own data, and the names and numbers in them."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitformer.corpora.sources.base import SourceError, UnknownForm

SPLITS = {
    "train": ("train", "training"),
    "dev": ("dev", "devel", "development", "valid", "validation", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class EncodingError(SourceError):
    """A text file is not in the expected encoding."""


def read_lines(path: Path, encoding: str | None = None) -> list[str]:
    """Return the lines of a text file, packed (.gz) or not: UTF-8, UTF-16 with a byte order mark, or else `encoding`.

    Raises:
      EncodingError: it is in none of these.  SourceError: it cannot be read, or `encoding` is unknown.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    detected = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    wrong = 0
    for name in (detected, encoding or detected):
        try:
            text = data.decode(name)
            if "\0" not in text:
                return [line.rstrip("\r") for line in text.split("\n")]
            wrong = data.index(0)
        except UnicodeDecodeError as error:
            wrong = error.start
        except LookupError as error:
            raise SourceError(f"--encoding: {error}; give one such as cp1252, utf-16 or shift_jis") from error
    raise EncodingError(
        f"{path}:{data.count(bytes([10]), 0, wrong) + 1}: byte {data[wrong]:#04x} is not {encoding or 'UTF-8'} text. "
        "Text from Windows is often CP1252: --encoding cp1252 reads it, and iconv -f CP1252 -t UTF-8 converts it"
    )


def json_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file:line and the object of every line that is not empty. Raises SourceError."""
    for number, line in enumerate(read_lines(path, encoding), 1):
        try:
            item = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UnknownForm(f"{path}:{number}: this is not JSON ({error})") from error
        if not isinstance(item, dict):
            raise UnknownForm(f"{path}:{number}: expected a JSON object, as Lhotse and NeMo write it")
        if item:
            yield f"{path}:{number}", item


def clean_id(name: str) -> str:
    """Return `name` as an id, without slashes and whitespace."""
    return re.sub(r"\s+", "_", name.strip()).replace("/", "-")


def split_named(name: str) -> str | None:
    """Return train, dev or test if `name` is a usual name of that split, else None."""
    return next((split for split, names in SPLITS.items() if name.strip().lower() in names), None)


def split_in(name: str) -> str | None:
    """Return the split that a word in a file or folder name stands for, if any."""
    return next((split for word in re.split(r"[^a-zA-Z]+", name) if (split := split_named(word))), None)


Span = tuple[float | None, float | None]


def read_span(where: str, start: Any = None, end: Any = None, duration: Any = None) -> Span:
    """Return start and end in seconds, None for what is empty. Raises SourceError."""
    first, last, length = (_seconds(where, *each) for each in (("start", start), ("end", end), ("duration", duration)))
    if last is None and length is not None:
        last = (first or 0.0) + length
    if last is not None and last <= (first or 0.0):
        raise SourceError(f"{where}: it starts at {first or 0.0} s and ends at {last} s; the end must come later")
    return first, last


def _seconds(where: str, name: str, value: Any) -> float | None:
    try:
        number = None if value in (None, "") else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if number is not None and not 0 <= number < 1e9:
        raise SourceError(f"{where}: {name} is {value!r}; it must be a number of seconds from 0 up, such as 12.5")
    return number
