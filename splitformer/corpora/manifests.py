"""Lhotse manifests: read and written as streams, made by a Lhotse recipe or from a corpus in sphinx layout.

A split is a pair of files, recordings and supervisions (`.jsonl` or `.jsonl.gz`), in the same order: the
supervisions of a recording stand together, in the order of the recordings. So both are read side by side, one
recording at a time, and memory does not grow with the corpus.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lhotse import Recording, SupervisionSegment

from splitformer.data.manifests import ManifestError
from splitformer.files import atomic_write


@dataclass
class Skipped:
    """What was left out, and why: `reasons` maps an id or a file to a reason."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str, strict: bool) -> None:
        """Note and log that `name` is left out. Raises ManifestError where `strict`."""
        if strict:
            raise ManifestError(f"{name}: {reason} (--strict is given; else it would be skipped)")
        logging.warning("skipped %s: %s", name, reason)
        self.reasons[name] = reason

    def __len__(self) -> int:
        return len(self.reasons)


@contextmanager
def manifest_writer(path: str | Path) -> Iterator[Any]:
    """Yield a function that appends one Lhotse item (anything with `to_dict`) to the manifest `path`.

    The file appears when it is complete (see results.atomic_write), and the same items give the same bytes.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ManifestError(f"{path}: a manifest's name ends in .jsonl or .jsonl.gz")
    with atomic_write(path, "wb") as raw:
        # no name and no time in the gzip header: they would make equal manifests differ
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
        text = io.TextIOWrapper(packed, encoding="utf-8", write_through=True)
        yield lambda item: text.write(json.dumps(item.to_dict(), ensure_ascii=False) + "\n")
        text.flush()
        text.detach()
        if packed is not raw:
            packed.close()


def write_split(
    pairs: Iterable[tuple[Recording, list[SupervisionSegment]]],
    recordings: str | Path,
    supervisions: str | Path,
) -> int:
    """Write both manifests of a split; return the number of supervisions."""
    count = 0
    with manifest_writer(recordings) as write_recording, manifest_writer(supervisions) as write_supervision:
        for recording, group in pairs:
            write_recording(recording)
            for segment in group:
                write_supervision(segment)
                count += 1
    return count


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` of the items, evenly spaced, in order; all of them where limit is None."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ManifestError(f"a limit of {limit} utterances leaves none; give 1 or more")
    return [items[i * len(items) // limit] for i in range(limit)]


def audio_fault(path: Path) -> str | None:
    """Why the header of an audio file cannot be used, or None where it can: reads no samples."""
    import soundfile  # here: the readers of ready-made manifests do without

    if not path.is_file():
        return "the audio file does not exist"
    if path.stat().st_size == 0:
        return "the audio file is empty"
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        return f"the audio file is corrupt ({error})"
    if info.frames <= 0:
        return "the audio file has no samples"
    return None
