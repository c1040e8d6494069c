"""Lhotse manifests: read and written as streams, made by a Lhotse recipe or from a corpus in sphinx layout.

A split is a pair of files, recordings and supervisions (`.jsonl` or `.jsonl.gz`), in the same order: the
supervisions of a recording stand together, in the order of the recordings. So both are read side by side, one
recording at a time, and memory does not grow with the corpus.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from lhotse.cut import MonoCut

from splitformer.data.trust import Checked
from splitformer.errors import UserError

Pair = tuple[Recording, list[SupervisionSegment]]
"""A recording and its supervisions."""


class ManifestError(UserError):
    """A corpus or a manifest that cannot be used as it is; the message says what to do."""


def use_soundfile() -> None:
    """Let Lhotse read audio by libsndfile, which reads SPHERE too; Lhotse's own choice would run sph2pipe.

    The environment variable LHOTSE_AUDIO_BACKEND, where set, wins.
    """
    if "LHOTSE_AUDIO_BACKEND" not in os.environ:
        set_current_audio_backend(LibsndfileBackend())


def read_recordings(path: str | Path) -> Iterator[Recording]:
    """The recordings of a manifest, one by one. Raises FileNotFoundError and UnsafeManifest."""
    return iter(Checked(RecordingSet.from_jsonl_lazy(_existing(path)), path))


def read_supervisions(path: str | Path) -> Iterator[SupervisionSegment]:
    """The supervisions of a manifest, one by one. Raises FileNotFoundError and UnsafeManifest."""
    return iter(Checked(SupervisionSet.from_jsonl_lazy(_existing(path)), path))


def read_cuts(path: str | Path) -> CutSet:
    """The cuts of a manifest, as a lazy CutSet. Raises FileNotFoundError and UnsafeManifest, that while it is read."""
    return CutSet(Checked(CutSet.from_jsonl_lazy(_existing(path)), path))


def count_items(path: str | Path) -> int:
    """Number of items in a manifest (its lines)."""
    path = _existing(path)
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no manifest {path}; an earlier stage of prepare.sh makes it")
    return path


def read_pairs(recordings: str | Path, supervisions: str | Path) -> Iterator[Pair]:
    """Every recording with its supervisions (none, one or several).

    Raises:
      ManifestError: a supervision whose recording is absent, or which stands in another order.
    """
    waiting = read_supervisions(supervisions)
    next_one = next(waiting, None)
    for recording in read_recordings(recordings):
        group = []
        while next_one is not None and next_one.recording_id == recording.id:
            group.append(next_one)
            next_one = next(waiting, None)
        yield recording, group
    if next_one is not None:
        raise ManifestError(
            f"{supervisions}: supervision {next_one.id!r} belongs to recording {next_one.recording_id!r}, "
            f"which {recordings} does not have, or not in the same order as the supervisions"
        )


def cuts_from_manifests(recordings: str | Path, supervisions: str | Path) -> Iterator[MonoCut]:
    """One cut per supervision, named as the supervision."""
    for recording, group in read_pairs(recordings, supervisions):
        for segment in group:
            channel = segment.channel if isinstance(segment.channel, int) else segment.channel[0]
            yield MonoCut(
                id=segment.id,
                start=segment.start,
                duration=segment.duration,
                channel=channel,
                recording=recording,
                supervisions=[segment.with_offset(-segment.start)],
            )
