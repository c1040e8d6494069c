"""Read Lhotse Shar: cuts and their features in a few large files.

Lhotse reads shards from beginning to end, because a tar archive has no table of contents. Batches here are drawn by
number, which needs random access. So while the cuts are read, each one's features manifest gets the place of its array
in the archive; the cut index keeps it (`data.cut_index`), and from then on any array can be read at once.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from lhotse import Features
from lhotse.cut import Cut
from lhotse.features.io import FeaturesReader, get_reader, register_reader
from lhotse.serialization import decode_json_line, deserialize_item
from lhotse.utils import fastcopy

from splitformer.data.manifests import ManifestError, read_cuts

FORMATS = {".llc": "memory_lilcom", ".npy": "memory_npy"}
"""Suffix of an archive member -> Lhotse's reader of its content."""


@register_reader
class TarMemberReader(FeaturesReader):
    """Reads an array at its place in a tar archive; the key is `offset:size:suffix`."""

    name = "tar_member"

    def __init__(self, storage_path: str | Path) -> None:
        self.storage_path = storage_path

    def read(self, key: str, left_offset_frames: int = 0, right_offset_frames: int | None = None) -> np.ndarray:
        offset, size, suffix = key.split(":")
        with open(self.storage_path, "rb") as file:
            file.seek(int(offset))
            data = file.read(int(size))
        if len(data) < int(size):
            raise ManifestError(f"{self.storage_path} ends before the {size} bytes at {offset}")
        return get_reader(FORMATS[suffix])().read(data, left_offset_frames, right_offset_frames)


class SharCuts(Iterable[Cut]):
    """The cuts of a Shar folder; their features are read from their place in the archives."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ManifestError if the folder does not hold cuts and features in the Shar format."""
        self.folder = Path(folder).absolute()  # an index of these cuts outlives this process
        self.manifests = sorted(self.folder.glob("cuts*.jsonl*"))
        self.archives = sorted(self.folder.glob("features*.tar"))
        if not self.manifests or len(self.manifests) != len(self.archives):
            raise ManifestError(
                f"{folder} holds {len(self.manifests)} manifests cuts.*.jsonl.gz and {len(self.archives)} archives "
                "features.*.tar; a Shar folder has equal numbers of both: ./prepare.sh --shar makes it"
            )

    @property
    def files(self) -> list[Path]:
        return [*self.manifests, *self.archives]

    def __iter__(self) -> Iterator[Cut]:
        """Yield the cuts. Raises ManifestError if an archive is damaged or does not fit its manifest."""
        for manifest, archive in zip(self.manifests, self.archives, strict=True):
            for cut, member in itertools.zip_longest(read_cuts(manifest), _members(archive)):
                cut_id, features = member or ("nothing", None)
                if cut is None or cut.id != cut_id:
                    raise ManifestError(
                        f"{archive} holds {cut_id} where {manifest.name} has {cut.id if cut else 'nothing'}: the "
                        "folder is incomplete or mixed up; remove it and run ./prepare.sh --shar again"
                    )
                yield fastcopy(cut, features=features)


def _members(archive: Path) -> Iterator[tuple[str, Features | None]]:
    """Yield cut ids and their features manifests, None for a cut without features.

    As Lhotse writes it, each array is followed by its manifest.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            for data, manifest in itertools.zip_longest(*[iter(tar)] * 2):
                if manifest is None:
                    raise ManifestError(f"{archive} ends with {data.name}, without its manifest")
                cut_id, dot, suffix = data.name.rpartition(".")  # not a path: an id may have any characters
                suffix = dot + suffix
                if suffix == ".nodata":
                    yield cut_id, None
                    continue
                if suffix not in FORMATS:
                    raise ManifestError(f"{archive}: {data.name} is none of {', '.join(FORMATS)}")
                content = tar.extractfile(manifest)
                features = deserialize_item(decode_json_line(content.read().decode("utf-8"))) if content else None
                if not isinstance(features, Features):
                    raise ManifestError(f"{archive}: {manifest.name} is not a features manifest")
                features.storage_type, features.storage_path = TarMemberReader.name, str(archive)
                features.storage_key = f"{data.offset_data}:{data.size}:{suffix}"
                yield cut_id, features
    except tarfile.TarError as error:
        raise ManifestError(f"{archive} is damaged ({error}): remove it and run ./prepare.sh --shar again") from error
