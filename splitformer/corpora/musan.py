"""Noise, music and babble under the training speech, as icefall mixes MUSAN in (arXiv 1510.08484).

Prepared, noise is a split like any other: recordings, and windows of some seconds in the place of supervisions. In
training, windows are drawn by number from an index, so that a batch reads those that it mixes in and no others.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lhotse import Recording, SupervisionSegment
from lhotse.recipes import prepare_musan

from splitformer.corpora.manifests import Skipped, spread
from splitformer.corpora.recipes import without_unreadable
from splitformer.data.manifests import ManifestError, Pair

MUSAN_PARTS = ("music", "noise", "speech")
WINDOW = 10.0
SHORTEST_WINDOW = 5.0
"""Seconds: icefall's local/compute_fbank_musan.py cuts MUSAN into windows of 10 and keeps those that are longer than 5.
A recording that is shorter as a whole, which icefall leaves out, is a window here."""


# ------------------------------------------------------------------------------------------- preparation


def musan_pairs(
    musan_dir: str | Path, skipped: Skipped, *, limit: int | None = None, strict: bool = False
) -> Iterable[Pair]:
    """The recordings of MUSAN, or of a folder in its layout, with their windows.

    Args:
      musan_dir: with folders music, noise and speech, or some of them.
      limit: at most so many recordings of each.
    Raises:
      ManifestError: none of the folders, or no recording in them; unreadable files, where `strict`.
    """
    musan_dir = Path(musan_dir)
    parts = [part for part in MUSAN_PARTS if (musan_dir / part).is_dir()]
    if not parts:
        raise ManifestError(f"{musan_dir} has none of the folders {', '.join(MUSAN_PARTS)}; give the folder `musan`")
    parts = [part for part in parts if next((musan_dir / part).rglob("*.wav"), None)]
    if not parts:
        raise ManifestError(f"{musan_dir}: there is no recording (.wav) in its folders")
    for part in parts:

        def prepare(folder: Path, part: str = part) -> dict[str, Any]:
            return prepare_musan(folder, parts=[part])[part]

        manifests, originals = without_unreadable(prepare, "musan", musan_dir, part, skipped, strict)
        recordings = sorted(manifests["recordings"], key=lambda recording: recording.id)
        for recording in spread(recordings, limit):
            for source in recording.sources:
                source.source = originals.get(source.source, source.source)
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
