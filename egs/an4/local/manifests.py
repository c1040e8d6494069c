#!/usr/bin/env python3
"""Write the manifests of a split from the layout of CMU Sphinx's trainers: a list of files and a transcription."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lhotse import Recording, SupervisionSegment

from splitformer.cli import command
from splitformer.corpora.manifests import Skipped, audio_error, spread, write_split
from splitformer.data.manifests import ManifestError, Pair, use_soundfile

TRANSCRIPT = re.compile(r"^\s*(?:<s>)?\s*(?P<text>.*?)\s*(?:</s>)?\s*\((?P<id>[^()\s]+)\)\s*$")


@dataclass(frozen=True)
class Options:
    """Write the manifests of a split from the layout of CMU Sphinx's trainers."""

    fileids: Path
    """list of files: one path per line, without suffix; the last folder names the speaker, the file the utterance"""
    transcription: Path
    """lines `<s> TEXT </s> (utterance)`; the marks are optional"""
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
    skipped = Skipped(options.strict)
    count = write_split(sphinx_pairs(options, skipped), options.recordings, options.supervisions)
    print(f"{options.supervisions}: {count} utterances written, {len(skipped)} of the source left out")


def sphinx_pairs(options: Options, skipped: Skipped) -> Iterator[Pair]:
    """Yield the utterances.

    Args:
      skipped: records utterances without a transcript or with unreadable audio.
    Raises:
      ManifestError: a malformed line, unknown speakers, no utterance at all; anything skipped, if `skipped` is strict.
    """
    use_soundfile()
    texts = _read_transcription(options.transcription)
    paths = [Path(line) for line in options.fileids.read_text(encoding="utf-8").split()]
    known = {path.parent.name for path in paths}
    wanted, excluded = set(options.speakers), set(options.exclude_speakers)
    unknown = sorted((wanted | excluded) - known)
    if unknown:
        raise ManifestError(f"{options.fileids} has no speakers {unknown}; it has {', '.join(sorted(known))}")
    chosen = [path for path in paths if path.parent.name in (wanted or known) - excluded]
    if not chosen:
        raise ManifestError(f"{options.fileids}: no utterance is left of {len(paths)}; check the choice of speakers")
    for path in spread(chosen, options.limit_utterances):
        audio, utterance = options.audio_dir / f"{path}{options.suffix}", path.name
        if not texts.get(utterance):
            skipped.add(utterance, f"it has no transcript in {options.transcription}")
            continue
        if error := audio_error(audio):
            skipped.add(str(audio), error)
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


def _read_transcription(transcription: Path) -> dict[str, str]:
    """Return {utterance: text}."""
    texts: dict[str, str] = {}
    for number, line in enumerate(transcription.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        match = TRANSCRIPT.match(line)
        if match is None:
            raise ManifestError(f"{transcription}:{number}: {line!r} is not `<s> TEXT </s> (utterance)`")
        if match["id"] in texts:
            raise ManifestError(f"{transcription}:{number}: utterance {match['id']!r} is there twice")
        texts[match["id"]] = " ".join(match["text"].split())
    return texts


if __name__ == "__main__":
    sys.exit(command(run))
