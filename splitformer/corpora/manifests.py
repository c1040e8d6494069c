"""Write Lhotse manifests, and what the readers of corpora have in common."""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import soundfile

from splitformer.data.manifests import ManifestError, Pair
from splitformer.files import atomic_write

Item = TypeVar("Item")


@dataclass
class Skipped:
    """The utterances or files that were left out."""

    strict: bool = False
    """raise instead of skipping"""
    reasons: dict[str, str] = field(default_factory=dict)
    """{id or file: reason}"""

    def add(self, name: str, reason: str) -> None:
        """Record and log that `name` is left out. Raises ManifestError if `strict`."""
        if self.strict:
            raise ManifestError(f"{name}: {reason} (it would be skipped without --strict)")
        logging.warning("skipped %s: %s", name, reason)
        self.reasons[name] = reason

    def __len__(self) -> int:
        return len(self.reasons)


@contextmanager
def manifest_writer(path: str | Path) -> Iterator[Callable[[Any], object]]:
    """Yield a function that appends one Lhotse item (anything with `to_dict`) to the manifest `path`.

    The file appears when it is complete (see atomic_write), and the same items give the same bytes.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ManifestError(f"{path}: a manifest's name ends in .jsonl or .jsonl.gz")
    with atomic_write(path, "wb") as raw:
        # without name and time in the gzip header, which would make equal manifests differ
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
        text = io.TextIOWrapper(packed, encoding="utf-8", write_through=True)
        yield lambda item: text.write(json.dumps(item.to_dict(), ensure_ascii=False) + "\n")
        text.flush()
        text.detach()
        if packed is not raw:
            packed.close()


def write_split(pairs: Iterable[Pair], recordings: str | Path, supervisions: str | Path) -> int:
    """Write both manifests of a split and return the number of supervisions."""
    count = 0
    with manifest_writer(recordings) as write_recording, manifest_writer(supervisions) as write_supervision:
        for recording, group in pairs:
            write_recording(recording)
            for segment in group:
                write_supervision(segment)
                count += 1
    return count


def spread(items: list[Item], limit: int | None) -> list[Item]:
    """Return at most `limit` of the items, evenly spaced and in order; all of them if `limit` is None."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ManifestError(f"a limit of {limit} utterances leaves none; give 1 or more")
    return [items[i * len(items) // limit] for i in range(limit)]


def audio_error(path: Path) -> str | None:
    """Return why the header of an audio file cannot be used, or None. No samples are read."""
    if not path.is_file():
        return "the audio file does not exist"
    if path.stat().st_size == 0:
        return "the audio file is empty"
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        return f"the audio file is corrupt ({error})"
    return "the audio file has no samples" if info.frames <= 0 else None
