#!/usr/bin/env python3
"""Write the manifests of a split from the layout of CMU Sphinx's trainers: a list of files and a transcription."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lhotse import Recording, SupervisionSegment

from splitformer.cli import command
from splitformer.corpora.manifests import Skipped, audio_fault, spread, write_split
from splitformer.data.manifests import ManifestError, Pair, use_soundfile


@dataclass(frozen=True)
class Options:
    """Write the manifests of a split from the layout of CMU Sphinx's trainers."""

    fileids: Path
    """list of files: one path a line, without suffix"""
    transcription: Path
    """lines `<s> TEXT </s> (utterance)`"""
    audio_dir: Path
    """folder that the paths are relative to"""
    recordings: Path
    """manifest to write"""
    supervisions: Path
    """manifest to write"""
    suffix: str = ".sph"
    """suffix of the audio files"""
    speakers: tuple[str, ...] = ()
    """take these speakers only, named by their folders"""
    exclude_speakers: tuple[str, ...] = ()
    """take all speakers but these"""
    limit_utterances: int | None = None
    """take at most so many utterances, evenly over the list"""
    strict: bool = False
    """unreadable audio is an error"""


def run(options: Options) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    skipped = Skipped()
    pairs = sphinx_pairs(
        options.fileids,
        options.transcription,
        options.audio_dir,
        skipped,
        suffix=options.suffix,
        speakers=options.speakers,
        exclude_speakers=options.exclude_speakers,
        limit=options.limit_utterances,
        strict=options.strict,
    )
    count = write_split(pairs, options.recordings, options.supervisions)
    print(f"{options.supervisions}: {count} utterances, {len(skipped)} skipped")


_MARKS = re.compile(r"^\s*(?:<s>)?\s*(?P<text>.*?)\s*(?:</s>)?\s*\((?P<id>[^()\s]+)\)\s*$")


def sphinx_pairs(
    fileids: str | Path,
    transcription: str | Path,
    audio_dir: str | Path,
    skipped: Skipped,
    *,
    suffix: str = ".sph",
    speakers: Collection[str] = (),
    exclude_speakers: Collection[str] = (),
    limit: int | None = None,
    strict: bool = False,
) -> Iterator[Pair]:
    """The utterances of a corpus as CMU sphinx trainers keep it.

    Args:
      fileids: one path per line, relative to `audio_dir` and without suffix; the last folder names the
        speaker and the file the utterance.
      transcription: one line per utterance, `<s> TEXT </s> (utterance)`, the marks being optional.
      skipped: where utterances without a transcript or with unreadable audio are noted.
      speakers: where given, the only speakers taken.
      exclude_speakers: speakers that are left out.
      limit: at most so many utterances, taken evenly over the list.
    Raises:
      ManifestError: a line that is no transcription, unknown speakers, no utterance at all; anything that is
        skipped, where `strict`.
    """
    use_soundfile()
    texts = _sphinx_texts(Path(transcription))
    paths = [Path(line) for line in Path(fileids).read_text(encoding="utf-8").split()]
    known = {path.parent.name for path in paths}
    unknown = sorted((set(speakers) | set(exclude_speakers)) - known)
    if unknown:
        raise ManifestError(f"{fileids} has no speakers {unknown}; it has {', '.join(sorted(known))}")
    chosen = [
        path
        for path in paths
        if (not speakers or path.parent.name in speakers) and path.parent.name not in exclude_speakers
    ]
    if not chosen:
        raise ManifestError(f"{fileids}: no utterance is left of {len(paths)}; check the choice of speakers")
    for path in spread(chosen, limit):
        audio, utterance = Path(audio_dir) / f"{path}{suffix}", path.name
        if not texts.get(utterance):
            skipped.add(utterance, f"it has no transcript in {transcription}", strict)
            continue
        reason = audio_fault(audio)
        if reason:
            skipped.add(str(audio), reason, strict)
            continue
        recording = Recording.from_file(audio, recording_id=utterance)
        segment = SupervisionSegment(
            id=utterance,
            recording_id=utterance,
            start=0.0,
            duration=recording.duration,
            channel=0,
            text=texts[utterance],
            speaker=path.parent.name,
        )
        yield recording, [segment]


def _sphinx_texts(transcription: Path) -> dict[str, str]:
    """Utterance -> text."""
    texts: dict[str, str] = {}
    for number, line in enumerate(transcription.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        match = _MARKS.match(line)
        if match is None:
            raise ManifestError(f"{transcription}:{number}: {line!r} is not `<s> TEXT </s> (utterance)`")
        if match["id"] in texts:
            raise ManifestError(f"{transcription}:{number}: utterance {match['id']!r} is there twice")
        texts[match["id"]] = " ".join(match["text"].split())
    return texts


if __name__ == "__main__":
    sys.exit(command(run))
