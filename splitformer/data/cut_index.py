"""An index of training cuts by number, in arrays that are mapped into memory.

One streaming pass over the manifests drops cuts that cannot be trained on, and writes what training needs of the rest:
duration, labels, id, and where the features are. From then on any process can read any cut at once, without manifests,
JSON or a tokenizer. Cuts whose features Lhotse has to compute or cut out (audio on the fly, noise, mixed cuts, parts of
stored features) are kept as packed manifests.

An index is a hidden folder beside the data, named by a fingerprint of the data and of what decides which cuts are kept.
All runs share it, whatever their seeds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import struct
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.features.io import get_reader
from lhotse.utils import compute_num_frames
from tqdm import tqdm

from splitformer.config import Config
from splitformer.data.cut_features import extra_frames, fitted, supervised_frames
from splitformer.data.features import check_features
from splitformer.data.manifests import STORAGE_TYPES, check_safe, deserialize
from splitformer.data.tokenizer import Tokenizer
from splitformer.errors import UserError
from splitformer.files import atomic_folder
from splitformer.model.subsampling import FRAME_SHIFT, subsampled_lengths

log = logging.getLogger(__name__)
INDEX_FOLDER = ".cut-index"
"""Beside the data: the folder of all indexes of these data."""
VERSION = 4
"""Format of the index; an index of another version is left alone, and a new one is made."""
COLUMNS = {"duration": "d", "frames": "i", "extra": "b", "storage": "i", "num_labels": "i"}
"""Numbers of each cut -> their format in `struct`."""
TOLERANCE = 2e-3
"""Seconds by which a transcript may reach beyond its cut, as in Lhotse."""
PACKED = -1
"""Value of `storage` for cuts that are kept as packed manifests."""


class DataError(UserError):
    """Training data cannot be read."""


@dataclass
class ScanReport:
    """Summary of a pass over the training manifests."""

    kept: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """one cut id per reason"""

    def drop(self, cut_id: str, reason: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, cut_id)

    def __str__(self) -> str:
        lines = [f"{self.kept} utterances, {self.seconds / 3600:.2f} hours"]
        lines += [f"dropped {n}: {why} (such as {self.examples[why]})" for why, n in sorted(self.dropped.items())]
        return "\n  ".join(lines)


class Filter(Protocol):
    """Decides which cuts enter an index, and how."""

    signature: list[Any]
    """what the decisions depend on, for JSON"""
    stored: bool
    """take the stored features of a cut as they are, if they are those of the whole cut"""
    label_dtype: str
    """numpy's name of a type for labels"""

    def check(self, cut: Cut) -> tuple[str | None, Sequence[int]]:
        """Return the reason to drop `cut` (None: keep it) and its labels."""


class TrainingFilter:
    """Drops cuts that cannot be trained on."""

    def __init__(self, tokenizer: Tokenizer, config: Config, on_the_fly: bool = False) -> None:
        """`on_the_fly`: features will be computed from audio."""
        self.tokenizer, self.config, self.limits = tokenizer, config, config.data
        self.stored = not on_the_fly
        self.label_dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<i4"
        limits = [self.limits.min_utterance_seconds, self.limits.max_utterance_seconds]
        features = [config.data.features, config.model.num_mel_bins]
        self.signature = [tokenizer.fingerprint, limits, features if self.stored else "on the fly"]

    def check(self, cut: Cut) -> tuple[str | None, Sequence[int]]:
        """Return the reason to drop `cut` (None: keep it) and its labels.

        Raises:
          UserError: the stored features are not those of the configuration.
        """
        if not self.stored and not cut.has_recording:
            return "no audio to compute features from, as --on-the-fly does", ()
        if self.stored and not cut.has_features:
            return "no stored features: the fbank stage of prepare.sh makes them, or give --on-the-fly", ()
        if self.stored:
            check_features(cut, self.config)
        if len(cut.supervisions) != 1:
            return f"{len(cut.supervisions)} supervisions instead of one", ()
        text = (cut.supervisions[0].text or "").strip()
        if not text:
            return "empty transcript", ()
        if cut.duration < self.limits.min_utterance_seconds:
            return f"shorter than data.min_utterance_seconds = {self.limits.min_utterance_seconds}", ()
        if cut.duration > self.limits.max_utterance_seconds:
            return f"longer than data.max_utterance_seconds = {self.limits.max_utterance_seconds}", ()
        segment = cut.supervisions[0]
        if segment.start < -TOLERANCE or segment.end > cut.duration + TOLERANCE:
            return "transcript of more than the cut", ()
        if unknown := self.tokenizer.unknown_characters(text):
            return f"transcript has characters that the tokens lack: {' '.join(sorted(unknown))}", ()
        labels = self.tokenizer.encode(text)
        num_frames = compute_num_frames(cut.duration, FRAME_SHIFT, cut.sampling_rate)
        frames = int(subsampled_lengths(torch.tensor([cut.num_frames if cut.has_features else num_frames])))
        if frames < ctc_min_frames(labels):
            return "more labels than output frames", ()
        return None, labels


def ctc_min_frames(labels: Sequence[int]) -> int:
    """Return the fewest frames of a CTC alignment: one per label, and a blank between two equal neighbours."""
    return len(labels) + sum(a == b for a, b in pairwise(labels))


class SeenIds:
    """A set of strings that keeps 64-bit hashes in a table with open addressing.

    It takes 12 to 24 bytes per string, where a set of strings takes about 150. The chance that two of ten million
    strings have the same hash is 3 in a million (the birthday bound, n ** 2 / 2 ** 65).
    """

    def __init__(self) -> None:
        self._table = array("Q", [0]) * 1024
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, name: str) -> bool:
        """Add `name` and return whether it is new."""
        if 3 * self._count >= 2 * len(self._table):
            old, self._table = self._table, array("Q", [0]) * (2 * len(self._table))
            for key in filter(None, old):
                self._put(key)
        new = self._put(hash(name) & 0xFFFF_FFFF_FFFF_FFFF or 1)  # 0 marks a free slot
        self._count += new
        return new

    def _put(self, key: int) -> bool:
        table, mask = self._table, len(self._table) - 1  # the table's size is a power of two
        slot = key & mask
        while table[slot]:
            if table[slot] == key:
                return False
            slot = (slot + 1) & mask
        table[slot] = key
        return True


class StoredFeatures(NamedTuple):
    """Where the features of a whole cut are."""

    storage_type: str
    storage_path: str
    storage_key: str
    frames: int
    extra: bool
    """one frame more than Lhotse counts from the duration"""

    def load(self) -> np.ndarray:
        """Return the features (T, C); the reader of the storage may raise anything."""
        feats = get_reader(self.storage_type)(self.storage_path).read(self.storage_key, 0, self.frames)
        return fitted(feats, self.frames)


def stored_features(cut: Cut) -> StoredFeatures | None:
    """Return where the features of `cut` are, if they and the transcript are those of the whole cut; else None."""
    if not isinstance(cut, MonoCut) or not math.isclose(cut.start, cut.features.start):
        return None
    features = cut.features
    counted = compute_num_frames(cut.duration, features.frame_shift, features.sampling_rate)
    frames = counted + extra_frames(cut)
    whole = supervised_frames(cut, counted, frames, cut.frame_shift, cut.sampling_rate) == (0, frames)
    if not whole or cut.num_frames != counted:
        return None
    if features.storage_type not in STORAGE_TYPES or not isinstance(features.storage_key, str):
        return None
    return StoredFeatures(
        features.storage_type, str(features.storage_path), features.storage_key, frames, frames > counted
    )


class Ragged:
    """Sequences by number, mapped into memory: the values of all, one after another, and where each sequence ends."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.values, self.ends = _mapped(folder / name, dtype), _mapped(folder / f"{name}-ends", "<q")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.values[self.ends[number - 1] if number else 0 : self.ends[number]]

    def text(self, number: int) -> str:
        return self[number].tobytes().decode()


def _mapped(path: Path, dtype: str) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # slices of a memmap take longer


class CutIndex:
    """Cuts by number, from 0, in the folder that `index_cuts` makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.kind: str | None = about["kind"]
        """extractor of the stored features; None without any"""
        self.frame_shift: float = about["frame_shift"]
        self.num_features: int = about["num_features"]
        self._duration, self._frames, self._extra, self._storage, self._num_labels = (
            _mapped(folder / name, f"<{code}") for name, code in COLUMNS.items()
        )
        self._dictionary = (folder / "dictionary").read_bytes()
        self._labels = Ragged(folder, "labels", about["labels"])
        self._ids, self._places, self._storages = (Ragged(folder, name, "u1") for name in ("ids", "places", "storages"))

    def __reduce__(self) -> tuple[type[CutIndex], tuple[Path]]:
        return CutIndex, (self.folder,)  # another process maps the arrays, too, instead of getting copies

    def __len__(self) -> int:
        return len(self._duration)

    @property
    def durations(self) -> np.ndarray:
        """(K,) seconds, float32."""
        return self._duration.astype(np.float32)

    @property
    def tokens(self) -> np.ndarray:
        """(K,) number of labels of each transcript."""
        return self._num_labels

    def seconds(self, number: int) -> float:
        return float(self._duration[number])

    def cut_id(self, number: int) -> str:
        return self._ids.text(number)

    def labels(self, number: int) -> np.ndarray:
        """Return the labels (S,) of a transcript."""
        return self._labels[number]

    def stored(self, number: int) -> StoredFeatures | None:
        """Return where the features of a cut are, or None if `cut` has to be asked."""
        storage = int(self._storage[number])
        if storage == PACKED:
            return None
        kind, _, path = self._storages.text(storage).partition(" ")
        key = self._places.text(number)
        check_safe({"storage_type": kind, "storage_path": path, "storage_key": key}, self.folder)
        return StoredFeatures(kind, path, key, int(self._frames[number]), bool(self._extra[number]))

    def cut(self, number: int) -> Cut:
        """Return a cut that is kept as a packed manifest; its transcript is not kept."""
        unpack = zlib.decompressobj(zdict=self._dictionary)
        return deserialize(json.loads(unpack.decompress(self._places[number].tobytes())), self.folder)

    def missing_storage(self, sample: int = 100) -> str | None:
        """Return a file or folder of features, if it is gone and so are all others of a sample; else None."""
        chosen = np.linspace(0, len(self._storages) - 1, min(sample, len(self._storages))).astype(int)
        paths = [self._storages.text(int(number)).partition(" ")[2] for number in chosen]
        return None if any(Path(path).exists() for path in paths) else next(iter(paths), None)


def index_cuts(
    cuts: CutSet, sources: Iterable[Path], keep: Filter, root: Path, progress: bool = False
) -> tuple[CutIndex, ScanReport]:
    """Return the index of the cuts that `keep` keeps, and a summary.

    An index that is there is taken as it is. Otherwise one process makes it, and others that ask for it wait.

    Args:
      cuts: read once, in their order.
      sources: the files that `cuts` come from; their names, sizes and times tell whether an index is up to date.
      root: folder of all indexes of these data.
      progress: show a progress bar.
    Raises:
      DataError: there is no index, and `root` cannot be written to.
    """
    files = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    fingerprint = hashlib.sha256(json.dumps([VERSION, files, keep.signature]).encode()).hexdigest()[:32]
    folder = root / fingerprint
    report = _stored_report(folder)
    if report is None:
        with _locked(root, fingerprint):
            report = _stored_report(folder)  # another process may have made it meanwhile
            if report is None:
                with atomic_folder(folder) as temporary:
                    report = _scan(cuts, keep, temporary, files, progress)
                _remove_outdated(root)
    return CutIndex(folder), report


@contextmanager
def _locked(root: Path, fingerprint: str) -> Iterator[None]:
    """Keep other processes, on any machine that shares the file system, from making the same index."""
    lock = FileLock(root / f".{fingerprint}.lock", mode=0o666)
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process, which indexes the cuts in %s", root)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"the index of the training cuts cannot be written to {root} ({reason}): make that folder writable, or "
            "give --index-dir DIR, a folder for it"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _stored_report(folder: Path) -> ScanReport | None:
    """Return the report of the index in `folder`, if there is a complete one."""
    try:
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in about["sizes"].items()):
            return None
    except (OSError, ValueError):
        return None
    return ScanReport(**{**about["report"], "dropped": Counter(about["report"]["dropped"])})


def _remove_outdated(root: Path) -> None:
    """Remove the indexes of files that have changed since."""
    for about in root.glob("*/index.json"):
        try:
            files = json.loads(about.read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError):
            continue
        states = ((Path(path), size, time) for path, size, time in files if Path(path).is_file())
        if any((path.stat().st_size, path.stat().st_mtime_ns) != (size, time) for path, size, time in states):
            shutil.rmtree(about.parent, ignore_errors=True)


class _RaggedWriter:
    def __init__(self, values: IO[bytes], ends: IO[bytes], dtype: str = "u1") -> None:
        self.values, self.ends, self.itemsize, self.end = values, ends, np.dtype(dtype).itemsize, 0

    def add(self, values: bytes) -> None:
        self.values.write(values)
        self.end += len(values) // self.itemsize
        self.ends.write(struct.pack("<q", self.end))


def _scan(cuts: CutSet, keep: Filter, folder: Path, files: Sequence[Any], progress: bool) -> ScanReport:
    report = ScanReport()
    ids = SeenIds()
    dictionary = b""
    storage = ("", PACKED)  # the last one, and its number
    features: dict[str, Any] = {"kind": None, "frame_shift": FRAME_SHIFT, "num_features": 0}
    with ExitStack() as stack:

        def new_file(name: str) -> IO[bytes]:
            return stack.enter_context(open(folder / name, "wb"))

        columns = [new_file(name) for name in COLUMNS]
        all_labels = _RaggedWriter(new_file("labels"), new_file("labels-ends"), keep.label_dtype)
        all_ids, places, storages = (
            _RaggedWriter(new_file(name), new_file(f"{name}-ends")) for name in ("ids", "places", "storages")
        )
        for cut in tqdm(cuts, desc="indexing cuts", unit="cut", disable=None if progress else True, leave=False):
            reason, labels = keep.check(cut)
            if reason is None and not ids.add(cut.id):
                reason = "an earlier cut has the same id"
            if reason is not None:
                report.drop(cut.id, reason)
                continue
            if features["kind"] is None and isinstance(cut, MonoCut) and cut.has_features:
                features = {"kind": cut.features.type, "frame_shift": cut.frame_shift, "num_features": cut.num_features}
            stored = stored_features(cut) if keep.stored else None
            if stored and (cut.features.type, cut.frame_shift) == (features["kind"], features["frame_shift"]):
                if storage[0] != (place := f"{stored.storage_type} {stored.storage_path}"):
                    storage = place, storage[1] + 1
                    storages.add(place.encode())
                places.add(stored.storage_key.encode())
                row = cut.duration, stored.frames, stored.extra, storage[1], len(labels)
            else:
                manifest = json.dumps(_without_transcripts(cut), ensure_ascii=False).encode()
                dictionary = dictionary or manifest
                pack = zlib.compressobj(level=9, zdict=dictionary)
                places.add(pack.compress(manifest) + pack.flush())
                row = cut.duration, 0, False, PACKED, len(labels)
            for column, code, value in zip(columns, COLUMNS.values(), row, strict=True):
                column.write(struct.pack(f"<{code}", value))
            all_labels.add(np.array(labels, dtype=keep.label_dtype).tobytes())
            all_ids.add(cut.id.encode())
            report.kept += 1
            report.seconds += cut.duration
    (folder / "dictionary").write_bytes(dictionary)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    about = {"files": files, "sizes": sizes, "report": vars(report), "labels": keep.label_dtype, **features}
    (folder / "index.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    return report


def _without_transcripts(cut: Cut) -> dict[str, Any]:
    """Return the manifest of a cut without what the index keeps elsewhere."""
    manifest = cut.to_dict()
    for supervision in manifest.get("supervisions", ()):
        for key in ("text", "alignment", "custom"):
            supervision.pop(key, None)
    return manifest
