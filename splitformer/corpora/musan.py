"""Read MUSAN, or noise in its layout. Noise is a split like any other, with windows of some seconds as supervisions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lhotse import Recording, SupervisionSegment
from lhotse.recipes import prepare_musan

from splitformer.corpora.manifests import Skipped, spread
from splitformer.corpora.recipes import without_unreadable
from splitformer.data.manifests import ManifestError, Pair

PARTS = ("music", "noise", "speech")
WINDOW = 10.0
SHORTEST_WINDOW = 5.0
"""Seconds: icefall's local/compute_fbank_musan.py cuts MUSAN into windows of 10 s and keeps those longer than 5 s.
Shorter recordings, which icefall leaves out, are a window here."""


def musan_pairs(musan_dir: str | Path, skipped: Skipped, *, limit: int | None = None) -> Iterable[Pair]:
    """Yield the recordings of MUSAN, or of a folder in its layout, with their windows.

    Args:
      musan_dir: with some of the folders music, noise and speech.
      skipped: records unreadable files.
      limit: at most so many recordings of each folder.
    Raises:
      ManifestError: there is none of the folders, or no recording in them; unreadable files, if `skipped` is strict.
    """
    musan_dir = Path(musan_dir)
    parts = [part for part in PARTS if (musan_dir / part).is_dir()]
    if not parts:
        raise ManifestError(f"{musan_dir} has none of the folders {', '.join(PARTS)}; give the folder `musan`")
    parts = [part for part in parts if next((musan_dir / part).rglob("*.wav"), None)]
    if not parts:
        raise ManifestError(f"{musan_dir}: there is no recording (.wav) in its folders")
    for part in parts:

        def run(folder: Path, part: str = part) -> dict[str, Any]:
            return prepare_musan(folder, parts=[part])[part]

        manifests = without_unreadable(run, "musan", musan_dir, part, skipped)
        for recording in spread(sorted(manifests["recordings"], key=lambda recording: recording.id), limit):
            yield recording, _windows(recording)


def _windows(recording: Recording) -> list[SupervisionSegment]:
    whole, rest = divmod(recording.duration, WINDOW)
    spans = [(i * WINDOW, WINDOW) for i in range(int(whole))]
    if rest > SHORTEST_WINDOW or not spans:
        spans.append((whole * WINDOW, round(rest, 8)))
    return [
        SupervisionSegment(f"{recording.id}-{i:03d}", recording.id, start, duration, recording.channel_ids[0], "noise")
        for i, (start, duration) in enumerate(spans)
    ]
