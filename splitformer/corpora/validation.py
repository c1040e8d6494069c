"""Check the manifests of a split before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.qa import validate
from tqdm import tqdm

from splitformer.corpora.manifests import Skipped, audio_error, write_split
from splitformer.data.cut_index import SeenIds
from splitformer.data.manifests import ManifestError, Pair, count_items, read_pairs

TOLERANCE = 2e-3
"""Seconds by which a supervision may end after its recording: durations are rounded."""


def validate_split(
    recordings: str | Path, supervisions: str | Path, *, strict: bool = False
) -> tuple[int, float, Skipped]:
    """Check a split and rewrite its manifests without what cannot be used.

    These are skipped, each with a reason: recordings whose file is missing, empty, corrupt or not as the manifest says,
    or that have no supervision; repeated ids; supervisions without words or beyond the end of their recording; and
    whatever Lhotse's own `validate` rejects. Only the headers of the audio are read.

    Returns:
      the number of supervisions kept, their duration in seconds, and what was skipped.
    Raises:
      ManifestError: nothing usable is left; the supervisions are in another order than the recordings; something would
        be skipped, if `strict`. The manifests then stay as they were.
    """
    skipped = Skipped(strict)
    seconds = 0.0

    def usable_pairs() -> Iterator[Pair]:
        nonlocal seconds
        recording_ids, supervision_ids = SeenIds(), SeenIds()
        total, empty = count_items(recordings), True
        pairs = read_pairs(recordings, supervisions)
        for recording, group in tqdm(pairs, total=total, desc="validate", unit=" recordings"):
            error = _recording_error(recording, recording_ids)
            if error is None and not group:
                error = "the recording has no supervision"
            if error:
                skipped.add(recording.id, error)
                continue
            usable = []
            for segment in group:
                if error := _supervision_error(segment, recording, supervision_ids):
                    skipped.add(segment.id, error)
                else:
                    usable.append(segment)
                    seconds += segment.duration
            if usable:
                empty = False
                yield recording, usable
        if empty:
            raise ManifestError(f"{recordings}: no usable utterance among {total}")

    count = write_split(usable_pairs(), recordings, supervisions)
    return count, seconds, skipped


def _recording_error(recording: Recording, seen: SeenIds) -> str | None:
    if not seen.add(recording.id):
        return "an earlier recording has the same id"
    for source in recording.sources:
        if source.type != "file":
            continue
        if error := audio_error(Path(source.source)):
            return f"{source.source}: {error}"
        header = soundfile.info(source.source)
        stated = recording.sampling_rate, recording.num_samples
        if not recording.transforms and (header.samplerate, header.frames) != stated:
            return (
                f"{source.source} has {header.frames} samples at {header.samplerate} Hz, the manifest says "
                f"{stated[1]} at {stated[0]} Hz"
            )
    return _lhotse_error(recording)


def _supervision_error(segment: SupervisionSegment, recording: Recording, seen: SeenIds) -> str | None:
    if not seen.add(segment.id):
        return "an earlier supervision has the same id"
    if not (segment.text or "").strip():
        return "the transcript is empty"
    if segment.start < 0 or segment.end > recording.duration + TOLERANCE:
        return f"it spans {segment.start} to {segment.end} s, its recording {recording.id} has {recording.duration} s"
    return _lhotse_error(segment)


def _lhotse_error(item: Recording | SupervisionSegment) -> str | None:
    try:
        validate(item)
    except AssertionError as error:
        return f"Lhotse rejects it: {error}"
    return None
