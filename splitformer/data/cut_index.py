"""The training cuts by number: where each stands in a file, how long it is, and how many labels it has.

One streaming pass over the manifests drops what cannot be trained on and writes what is left, uncompressed, beside an
array that is mapped into memory, not read: 16 bytes for each cut. From then on any cut can be had at once, by any
process; and a run that goes on needs no second pass.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
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
from splitformer.data.features import FRAME_SHIFT
from splitformer.data.seen import Seen
from splitformer.data.tokenizer import Tokenizer
from splitformer.errors import UserError
from splitformer.model.subsampling import subsampled_lengths

ENTRY = np.dtype([("offset", "<i8"), ("duration", "<f4"), ("tokens", "<i4")])
VERSION = 2
"""Of what is written; another version is made anew."""


class DataError(UserError):
    """Training data cannot be read; the message says what to do."""


@dataclass
class ScanReport:
    """What a pass over the training manifests found."""

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
    """Says which cuts enter an index."""

    signature: list[Any]
    """what its answers depend on, for JSON"""

    def check(self, cut: Cut) -> tuple[str | None, int]:
        """Why `cut` is dropped, None where it is kept; and its number of labels."""


class TrainingFilter:
    """Says why a cut must not be trained on."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, on_the_fly: bool = False) -> None:
        """`on_the_fly`: features will be computed from audio."""
        self.tokenizer = tokenizer
        self.config = config
        self.on_the_fly = on_the_fly
        limits = [config.min_utterance_seconds, config.max_utterance_seconds]
        self.signature = [tokenizer.tokens, limits, on_the_fly]

    def check(self, cut: Cut) -> tuple[str | None, int]:
        """Why `cut` is dropped, None where it is kept; and its number of labels."""
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
    """Fewest frames of a CTC alignment: one a label, and a blank between two equal neighbours."""
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


class CutIndex:
    """Cuts by number, from 0; made by `index_cuts`. Each process opens the file for itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: np.ndarray = np.load(folder / "entries.npy", mmap_mode="r")
        self._lines = None
        self._opened_by = 0

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def durations(self) -> np.ndarray:
        """(K,) seconds."""
        return self.entries["duration"]

    @property
    def tokens(self) -> np.ndarray:
        """(K,) labels of each transcript."""
        return self.entries["tokens"]

    def __getitem__(self, number: int) -> Cut:
        if self._lines is None or self._opened_by != os.getpid():  # a forked worker would share the file's position
            self._lines, self._opened_by = open(self.folder / "cuts.jsonl", "rb"), os.getpid()  # noqa: SIM115
        self._lines.seek(int(self.entries["offset"][number]))
        return deserialize_item(json.loads(self._lines.readline()))

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["folder"])


def index_cuts(
    cuts: CutSet, sources: Iterable[Path], keep: Filter, folder: Path, progress: bool = False
) -> tuple[CutIndex, ScanReport]:
    """The index of the cuts that `keep` keeps, in `folder`; an index there that was made from the same files is used.

    Args:
      cuts: read once, in their order.
      sources: the files that `cuts` come from; their names, sizes and times tell whether the index is up to date.
      progress: show a progress bar.
    """
    made_from = _fingerprint(sources, keep)
    report_file = folder / "report.json"
    if report_file.is_file():
        stored = json.loads(report_file.read_text(encoding="utf-8"))
        if stored.pop("made_from") == made_from:
            return CutIndex(folder), ScanReport(**{**stored, "dropped": Counter(stored["dropped"])})
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        report = _scan(cuts, keep, temporary, progress)
        text = json.dumps({"made_from": made_from, **vars(report)}, ensure_ascii=False)
        (temporary / "report.json").write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not report_file.is_file():  # or a process of another machine made the same in the meantime
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return CutIndex(folder), report


def _scan(cuts: CutSet, keep: Filter, folder: Path, progress: bool) -> ScanReport:
    report = ScanReport()
    ids = Seen()
    entries = folder / "entries.bin"
    with open(folder / "cuts.jsonl", "wb") as lines, open(entries, "wb") as table:
        for cut in tqdm(cuts, desc="scanning cuts", unit="cut", disable=None if progress else True, leave=False):
            reason, tokens = keep.check(cut)
            if reason is None and not ids.add(cut.id):
                reason = "a cut of the same id came before"
            if reason is not None:
                report.drop(cut.id, reason)
                continue
            report.kept += 1
            report.seconds += cut.duration
            table.write(np.array((lines.tell(), cut.duration, tokens), dtype=ENTRY).tobytes())
            lines.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")
    found = np.memmap(entries, dtype=ENTRY, mode="r") if report.kept else np.empty(0, dtype=ENTRY)
    np.save(folder / "entries.npy", found)
    entries.unlink()
    return report


def _fingerprint(sources: Iterable[Path], keep: Filter) -> str:
    """Of all that determines the index: files by name, size and time, and what the filter goes by."""
    files = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    content = json.dumps([VERSION, files, keep.signature])
    return hashlib.sha256(content.encode()).hexdigest()
