"""Checks of a split's manifests before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.qa import validate
from tqdm import tqdm

from splitformer.corpora.manifests import Skipped, audio_fault, write_split
from splitformer.data.manifests import ManifestError, Pair, count_items, read_pairs
from splitformer.data.cut_index import SeenIds

# Seconds by which a supervision may end after its recording: durations are rounded.
TOLERANCE = 2e-3


def validate_split(
    recordings: str | Path, supervisions: str | Path, *, strict: bool = False
) -> tuple[int, float, Skipped]:
    """Check a split and rewrite its manifests without what cannot be used.

    Left out, each named with its reason: recordings whose file is missing, empty, corrupt or not as the
    manifest says, or that have no supervision; ids that were there before; supervisions without words or
    reaching beyond their recording; whatever Lhotse's own `validate` rejects. Of the audio, the headers are
    read.

    Returns:
      number of supervisions kept, their duration in seconds, and what was skipped.
    Raises:
      ManifestError: nothing usable is left; supervisions in another order than the recordings; anything that
        would be skipped, where `strict`. The manifests then stay as they were.
    """
    skipped = Skipped()
    seconds = 0.0

    def usable_pairs() -> Iterator[Pair]:
        nonlocal seconds
        # a few bytes per utterance are all that stays in memory
        recording_ids, supervision_ids = SeenIds(), SeenIds()
        total = count_items(recordings)
        empty = True
        for recording, group in tqdm(
            read_pairs(recordings, supervisions), total=total, desc="validate", unit=" recordings"
        ):
            fault = _recording_fault(recording, recording_ids)
            if fault is None and not group:
                fault = "the recording has no supervision"
            if fault:
                skipped.add(recording.id, fault, strict)
                continue
            usable = []
            for segment in group:
                fault = _supervision_fault(segment, recording, supervision_ids)
                if fault:
                    skipped.add(segment.id, fault, strict)
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


def _recording_fault(recording: Recording, seen: SeenIds) -> str | None:
    if not seen.add(recording.id):
        return "a recording of the same id came before"
    for source in recording.sources:
        if source.type != "file":
            continue  # commands and URLs are read when their features are computed
        fault = audio_fault(Path(source.source))
        if fault:
            return f"{source.source}: {fault}"
        header = soundfile.info(source.source)
        if not recording.transforms and (header.samplerate, header.frames) != (
            recording.sampling_rate,
            recording.num_samples,
        ):
            return (
                f"{source.source} has {header.frames} samples at {header.samplerate} Hz, the manifest says "
                f"{recording.num_samples} at {recording.sampling_rate} Hz"
            )
    return _lhotse_fault(recording)


def _supervision_fault(segment: SupervisionSegment, recording: Recording, seen: SeenIds) -> str | None:
    if not seen.add(segment.id):
        return "a supervision of the same id came before"
    if not (segment.text or "").strip():
        return "the transcript is empty"
    if segment.start < 0 or segment.end > recording.duration + TOLERANCE:
        return f"it spans {segment.start} to {segment.end} s, its recording {recording.id} has {recording.duration} s"
    return _lhotse_fault(segment)


def _lhotse_fault(item: Recording | SupervisionSegment) -> str | None:
    try:
        validate(item)
    except AssertionError as error:
        return f"Lhotse rejects it: {error}"
    return None
