"""Manifests are data: what would make Lhotse run a program, unpickle or fetch something is refused.

Lhotse takes an audio source of the type `command` for a shell command, a path that starts with `pipe:` for another, and
unpickles features that are stored as `memory_raw`; a Kaldi archive's name may be a command, too. A manifest that comes
from elsewhere is a text file like any other to the one who trains on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from lhotse import Features, Recording, SupervisionSegment
from lhotse.array import Array, TemporalArray
from lhotse.cut import Cut, MixedCut

from splitformer.errors import UserError

AUDIO_SOURCES = ("file", "memory", "shar")
STORAGE_TYPES = (
    "lilcom_chunky", "lilcom_files", "lilcom_hdf5", "chunked_lilcom_hdf5", "memory_lilcom",
    "numpy_files", "numpy_hdf5", "memory_npy", "shar",
)  # fmt: skip
Item = TypeVar("Item", Recording, SupervisionSegment, Cut)


class UnsafeManifest(UserError):
    """A manifest that would run or fetch something; the message names the item and the remedy."""


class Checked(Iterable[Item]):
    """The items of a manifest, one by one, each looked at before anything of it is read."""

    def __init__(self, items: Iterable[Item], name: object) -> None:
        """`name` of the manifest, for messages."""
        self.items, self.name = items, name

    def __iter__(self) -> Iterator[Item]:
        """Raises UnsafeManifest, see the module."""
        for item in self.items:
            if problem := _problem(item):
                raise UnsafeManifest(
                    f"{self.name}: {item.id} {problem}. Manifests are data here, and nothing in them is run or "
                    "fetched: store audio and features as files and refer to these"
                )
            yield item


def _problem(item: object) -> str | None:
    """Why `item` is not to be read, if it is not."""
    if isinstance(item, Recording):
        for source in item.sources:
            if source.type not in AUDIO_SOURCES:
                return f"has audio of the type {source.type!r}, allowed are {', '.join(AUDIO_SOURCES)}"
            if isinstance(source.source, str) and _is_special(source.source):
                return f"has audio in {source.source[:60]!r}, which is no file"
        return None
    if isinstance(item, TemporalArray):
        item = item.array
    if isinstance(item, (Features, Array)):
        if item.storage_type not in STORAGE_TYPES:
            return f"has features of the storage type {item.storage_type!r}, allowed are {', '.join(STORAGE_TYPES)}"
        for place in (item.storage_path, item.storage_key):
            if isinstance(place, str) and _is_special(place):
                return f"has features in {place[:60]!r}, which is no file"
        return None
    return next((problem for part in _parts(item) if (problem := _problem(part))), None)


def _parts(item: object) -> Iterator[object]:
    """What a cut or a supervision is made of, as far as it can be read from somewhere."""
    if isinstance(item, MixedCut):
        yield from (track.cut for track in item.tracks)
        return
    for name in ("recording", "features"):
        if getattr(item, name, None) is not None:
            yield getattr(item, name)
    yield from getattr(item, "supervisions", None) or ()
    custom = getattr(item, "custom", None)
    yield from custom.values() if isinstance(custom, dict) else ()


def _is_special(place: str) -> bool:
    """What Lhotse takes for a command, a stream or a network address."""
    return place == "-" or place.startswith("pipe:") or place.rstrip().endswith("|") or "://" in place
