"""Lhotse Shar: cuts and features in a few large files, for corpora that outgrow a file system.

Lhotse reads such shards from their beginning to their end, because a tar archive has no table of contents. Batches here
are drawn by number, so that table is made: while cuts are read, the manifest of each one's features is told where in
which archive they lie. An index keeps it (`cut_index`), and from then on any of them can be had at once.
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
"""Suffix of an archive's member -> Lhotse's reader of its content."""


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
            raise ValueError(f"{self.storage_path} ends before the {size} bytes at {offset}")
        return get_reader(FORMATS[suffix])().read(data, left_offset_frames, right_offset_frames)


class SharCuts(Iterable[Cut]):
    """The cuts of a Shar folder, whose features are read from where they lie in its archives."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ManifestError where the folder holds no cuts and features in the Shar format."""
        # absolute: an index of these cuts outlives this process
        self.folder = Path(folder).absolute()
        self.manifests = sorted(self.folder.glob("cuts*.jsonl*"))
        self.archives = sorted(self.folder.glob("features*.tar"))
        if not self.manifests or len(self.manifests) != len(self.archives):
            raise ManifestError(
                f"{folder} holds {len(self.manifests)} manifests cuts.*.jsonl.gz and {len(self.archives)} archives "
                "features.*.tar, and a Shar folder has as many of the one as of the other: ./prepare.sh --shar makes it"
            )

    @property
    def files(self) -> list[Path]:
        return [*self.manifests, *self.archives]

    def __iter__(self) -> Iterator[Cut]:
        for manifest, archive in zip(self.manifests, self.archives, strict=True):
            for cut, member in itertools.zip_longest(read_cuts(manifest), _members(archive)):
                cut_id, features = member or ("nothing", None)
                if cut is None or cut.id != cut_id:
                    wanted = cut.id if cut else "nothing"
                    raise ManifestError(
                        f"{archive} holds {cut_id} where {manifest.name} has {wanted}: the folder is incomplete or "
                        "mixed up; remove it and run ./prepare.sh --shar again"
                    )
                yield fastcopy(cut, features=features)


def _members(archive: Path) -> Iterator[tuple[str, Features | None]]:
    """Cut ids and the manifests of their features, None where a cut has none; as Lhotse has it, data come first."""
    try:
        with tarfile.open(archive, "r:") as tar:
            while (data := tar.next()) is not None:
                if (meta := tar.next()) is None:
                    raise ManifestError(f"{archive} ends with {data.name}, without its manifest")
                tar.members.clear()  # the archive's whole table, which is not needed twice
                path = Path(data.name)
                cut_id = str(path.parent / path.stem)
                if path.suffix == ".nodata":
                    yield cut_id, None
                    continue
                if path.suffix not in FORMATS:
                    raise ManifestError(f"{archive}: {path} is none of {', '.join(FORMATS)}")
                content = tar.extractfile(meta)
                features = deserialize_item(decode_json_line(content.read().decode("utf-8"))) if content else None
                if not isinstance(features, Features):
                    raise ManifestError(f"{archive}: {meta.name} is no manifest of features")
                features.storage_type, features.storage_path = TarMemberReader.name, str(archive)
                features.storage_key = f"{data.offset_data}:{data.size}:{path.suffix}"
                yield cut_id, features
    except tarfile.TarError as error:
        raise ManifestError(f"{archive} is damaged ({error}): remove it and run ./prepare.sh --shar again") from error
