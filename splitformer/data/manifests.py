"""Read Lhotse manifests: as streams, and as data.

A split is a pair of manifests (`.jsonl` or `.jsonl.gz`), recordings and supervisions, in the same order: the
supervisions of a recording stand together, in the order of the recordings. Both files are read side by side, one
recording at a time, so memory does not grow with the corpus.

A manifest may come from anybody. Lhotse runs audio sources of the type `command` and paths that start with `pipe:` in a
shell, unpickles features stored as `memory_raw`, and fetches URLs. Items that would do so are refused before they are
deserialized.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from lhotse.cut import MonoCut
from lhotse.serialization import deserialize_item, load_jsonl, open_best

from splitformer.errors import UserError

Pair = tuple[Recording, list[SupervisionSegment]]
"""A recording and its supervisions."""
AUDIO_SOURCES = ("file", "memory", "shar")
STORAGE_TYPES = (
    "lilcom_chunky", "lilcom_files", "lilcom_hdf5", "chunked_lilcom_hdf5", "memory_lilcom",
    "numpy_files", "numpy_hdf5", "memory_npy", "shar", "tar_member",
)  # fmt: skip


class ManifestError(UserError):
    """A corpus or a manifest cannot be used as it is."""


class UnsafeManifest(ManifestError):
    """A manifest would run or fetch something."""


def use_soundfile() -> None:
    """Make Lhotse read audio by libsndfile, which also reads SPHERE; Lhotse's default would run sph2pipe.

    The environment variable LHOTSE_AUDIO_BACKEND takes precedence.
    """
    if "LHOTSE_AUDIO_BACKEND" not in os.environ:
        set_current_audio_backend(LibsndfileBackend())


class Manifest(Iterable[Any]):
    """The items of a manifest, deserialized one by one when they are iterated over."""

    def __init__(self, path: str | Path, stage: str = "manifests") -> None:
        """Raises ManifestError if there is no file; `stage` is the one of prepare.sh that writes it."""
        self.path = Path(path)
        if not self.path.is_file():
            raise ManifestError(f"there is no manifest {path}: run prepare.sh, whose {stage} stage writes it")

    def __iter__(self) -> Iterator[Any]:
        """Yield the items. Raises UnsafeManifest, and ManifestError for a file that is damaged or no manifest."""
        with _damage_named(self.path):
            for data in load_jsonl(self.path):
                yield deserialize(data, self.path)


def deserialize(data: Any, source: Path) -> Any:
    """Return the recording, supervision or cut that `data` of the file `source` describes. Raises UnsafeManifest."""
    check_safe(data, source)
    return deserialize_item(data)


def check_safe(data: dict[str, Any], source: Path) -> None:
    """Raise UnsafeManifest if `data` of the file `source` would run or fetch something."""
    if danger := _danger(data):
        raise UnsafeManifest(
            f"{source}: {data.get('id')} has {danger}. Nothing in a manifest is run or fetched here: store audio and "
            "features as files and refer to these"
        )


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, EOFError, OSError, zlib.error) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ManifestError(
            f"{path} is damaged, or no manifest of Lhotse in JSON lines ({reason}); give a manifest such as "
            "train_cuts.jsonl.gz, or remove it and run prepare.sh, which writes it again"
        ) from error


def _danger(data: Any) -> str | None:
    """Return what is unsafe in a part of a manifest, or None."""
    if isinstance(data, list):
        return next((danger for each in data if (danger := _danger(each))), None)
    if not isinstance(data, dict):
        return None
    if {"type", "channels", "source"} <= data.keys():
        if data["type"] not in AUDIO_SOURCES:
            return f"audio of the type {data['type']!r}, allowed are {', '.join(AUDIO_SOURCES)}"
        if _is_special(data["source"]):
            return f"audio in {data['source'][:60]!r}, which is no file"
    if "storage_type" in data:
        if data["storage_type"] not in STORAGE_TYPES:
            return f"features of the storage type {data['storage_type']!r}, allowed are {', '.join(STORAGE_TYPES)}"
        for key in ("storage_path", "storage_key"):
            if _is_special(data.get(key)):
                return f"features in {data[key][:60]!r}, which is no file"
    return _danger(list(data.values()))


def _is_special(place: Any) -> bool:
    """Whether Lhotse takes `place` for a command, a stream or a network address."""
    if not isinstance(place, str):
        return False
    return place == "-" or place.startswith("pipe:") or place.rstrip().endswith("|") or "://" in place


def read_supervisions(path: str | Path) -> Iterator[SupervisionSegment]:
    """Yield the supervisions of a manifest. Raises ManifestError."""
    return iter(Manifest(path))


def read_cuts(path: str | Path) -> CutSet:
    """Return the cuts of a manifest as a lazy CutSet. Raises ManifestError."""
    return CutSet(Manifest(path, "fbank"))


def count_items(path: str | Path) -> int:
    """Return the number of items (lines) in a manifest."""
    file_path = Manifest(path).path
    with _damage_named(file_path), open_best(file_path, "rb") as file:
        return sum(1 for line in file if line.strip())


def read_pairs(recordings: str | Path, supervisions: str | Path) -> Iterator[Pair]:
    """Yield every recording with its supervisions (none, one or several).

    Raises:
      ManifestError: a supervision's recording is missing, or the two manifests differ in order.
    """
    remaining = read_supervisions(supervisions)
    segment = next(remaining, None)
    for recording in Manifest(recordings):
        group = []
        while segment is not None and segment.recording_id == recording.id:
            group.append(segment)
            segment = next(remaining, None)
        yield recording, group
    if segment is not None:
        raise ManifestError(
            f"{supervisions}: supervision {segment.id!r} belongs to recording {segment.recording_id!r}, which "
            f"{recordings} lacks, or has at another place in the order"
        )


def cuts_from_manifests(recordings: str | Path, supervisions: str | Path) -> Iterator[MonoCut]:
    """Yield one cut per supervision, with the supervision's id."""
    for recording, group in read_pairs(recordings, supervisions):
        for segment in group:
            yield MonoCut(
                id=segment.id,
                start=segment.start,
                duration=segment.duration,
                channel=segment.channel if isinstance(segment.channel, int) else segment.channel[0],
                recording=recording,
                supervisions=[segment.with_offset(-segment.start)],
            )
