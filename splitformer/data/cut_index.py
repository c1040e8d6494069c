"""An index of training cuts by number: where each is in a file, its duration, and its number of labels.

One streaming pass over the manifests drops cuts that cannot be trained on. It writes the rest, uncompressed, beside an
array that is mapped into memory: 16 bytes per cut. From then on any process can read any cut at once, and a run that
resumes needs no second pass.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from lhotse.utils import compute_num_frames
from tqdm import tqdm

from splitformer.config import DataConfig
from splitformer.data.tokenizer import Tokenizer
from splitformer.errors import UserError
from splitformer.files import atomic_folder
from splitformer.model.subsampling import FRAME_SHIFT, subsampled_lengths

ENTRY = np.dtype([("offset", "<i8"), ("duration", "<f4"), ("tokens", "<i4")])
VERSION = 3
"""Format of the index; an index of another version is rebuilt."""


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
    """Decides which cuts enter an index."""

    signature: list[Any]
    """what the decisions depend on, for JSON"""

    def check(self, cut: Cut) -> tuple[str | None, int]:
        """Return the reason to drop `cut` (None: keep it) and its number of labels."""


class TrainingFilter:
    """Drops cuts that cannot be trained on."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, on_the_fly: bool = False) -> None:
        """`on_the_fly`: features will be computed from audio."""
        self.tokenizer = tokenizer
        self.config = config
        self.on_the_fly = on_the_fly
        limits = [config.min_utterance_seconds, config.max_utterance_seconds]
        self.signature = [tokenizer.tokens, limits, on_the_fly]

    def check(self, cut: Cut) -> tuple[str | None, int]:
        """Return the reason to drop `cut` (None: keep it) and its number of labels."""
        if self.on_the_fly and not cut.has_recording:
            return "no audio to compute features from, as --on-the-fly does", 0
        if not self.on_the_fly and not cut.has_features:
            return "no stored features: the fbank stage of prepare.sh makes them, or give --on-the-fly", 0
        if len(cut.supervisions) != 1:
            return f"{len(cut.supervisions)} supervisions instead of one", 0
        text = (cut.supervisions[0].text or "").strip()
        if not text:
            return "empty transcript", 0
        if cut.duration < self.config.min_utterance_seconds:
            return f"shorter than data.min_utterance_seconds = {self.config.min_utterance_seconds}", 0
        if cut.duration > self.config.max_utterance_seconds:
            return f"longer than data.max_utterance_seconds = {self.config.max_utterance_seconds}", 0
        if unknown := self.tokenizer.unknown_characters(text):
            return f"transcript has characters that the tokens lack: {' '.join(sorted(unknown))}", 0
        labels = self.tokenizer.encode(text)
        num_frames = compute_num_frames(cut.duration, FRAME_SHIFT, cut.sampling_rate)
        frames = int(subsampled_lengths(torch.tensor([cut.num_frames if cut.has_features else num_frames])))
        if frames < ctc_min_frames(labels):
            return "more labels than output frames", 0
        return None, len(labels)


def ctc_min_frames(labels: Sequence[int]) -> int:
    """Return the fewest frames of a CTC alignment: one per label, and a blank between two equal neighbours."""
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


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


class CutIndex:
    """Cuts by number, from 0, in the folder that `index_cuts` makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: np.ndarray = np.load(folder / "entries.npy", mmap_mode="r")

    def __reduce__(self) -> tuple[type[CutIndex], tuple[Path]]:
        return CutIndex, (self.folder,)  # another process maps the array, too, instead of getting a copy

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def durations(self) -> np.ndarray:
        """(K,) seconds."""
        return self.entries["duration"]

    @property
    def tokens(self) -> np.ndarray:
        """(K,) number of labels of each transcript."""
        return self.entries["tokens"]

    def __getitem__(self, number: int) -> Cut:
        with open(self.folder / "cuts.jsonl", "rb") as lines:
            lines.seek(int(self.entries["offset"][number]))
            return deserialize_item(json.loads(lines.readline()))


def index_cuts(
    cuts: CutSet, sources: Iterable[Path], keep: Filter, folder: Path, progress: bool = False
) -> tuple[CutIndex, ScanReport]:
    """Return the index of the cuts that `keep` keeps, and a summary. An up-to-date index in `folder` is reused.

    Args:
      cuts: read once, in their order.
      sources: the files that `cuts` come from; their names, sizes and times tell whether the index is up to date.
      progress: show a progress bar.
    """
    files = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    fingerprint = hashlib.sha256(json.dumps([VERSION, files, keep.signature]).encode()).hexdigest()
    report = _stored_report(folder, fingerprint)
    if report is None:
        try:
            with atomic_folder(folder) as temporary:
                report = _scan(cuts, keep, temporary, progress)
                text = json.dumps({"fingerprint": fingerprint, **vars(report)}, ensure_ascii=False)
                (temporary / "report.json").write_text(text, encoding="utf-8")
        except OSError:
            report = _stored_report(folder, fingerprint)  # another machine may have made the same index meanwhile
            if report is None:
                raise
    return CutIndex(folder), report


def _stored_report(folder: Path, fingerprint: str) -> ScanReport | None:
    """Return the report of the index in `folder`, if there is one with this fingerprint."""
    if not (folder / "report.json").is_file():
        return None
    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if stored.pop("fingerprint", None) != fingerprint:
        return None
    return ScanReport(**{**stored, "dropped": Counter(stored["dropped"])})


def _scan(cuts: CutSet, keep: Filter, folder: Path, progress: bool) -> ScanReport:
    report = ScanReport()
    ids = SeenIds()
    table_file = folder / "entries.bin"
    with open(folder / "cuts.jsonl", "wb") as lines, open(table_file, "wb") as table:
        for cut in tqdm(cuts, desc="scanning cuts", unit="cut", disable=None if progress else True, leave=False):
            reason, tokens = keep.check(cut)
            if reason is None and not ids.add(cut.id):
                reason = "an earlier cut has the same id"
            if reason is not None:
                report.drop(cut.id, reason)
                continue
            report.kept += 1
            report.seconds += cut.duration
            table.write(np.array((lines.tell(), cut.duration, tokens), dtype=ENTRY).tobytes())
            lines.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")
    entries = np.memmap(table_file, dtype=ENTRY, mode="r") if report.kept else np.empty(0, dtype=ENTRY)
    np.save(folder / "entries.npy", entries)
    table_file.unlink()
    return report
