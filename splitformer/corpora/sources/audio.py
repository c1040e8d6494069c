"""Check the audio of a source: the headers and ends of files, or all of their samples."""

from __future__ import annotations

import multiprocessing
import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import soundfile
from lhotse import Recording

from splitformer.corpora.manifests import audio_error
from splitformer.corpora.sources.base import LeftOut, SourceRecording
from splitformer.data.manifests import use_soundfile
from splitformer.speech.audio import AUDIO_SUFFIXES, AudioError, Source, open_recording

END_SECONDS = 0.5
"""How much of the end of a file is decoded: a file that was cut off fails there."""
MAX_PROCESSES = 8


def check_audio(recordings: Sequence[SourceRecording], decode: bool = False) -> Iterator[Recording | LeftOut]:
    """Yield, for every recording in order, Lhotse's Recording, or why its audio cannot be used.

    Args:
      decode: decode all samples, not only those at the end.
    """
    if not recordings:
        return
    items = [replace(recording, utterances=[]) for recording in recordings]
    num_processes = min(os.cpu_count() or 1, MAX_PROCESSES, len(items))
    # the parent computes nothing that a fork could break
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("fork"), _silence)
    try:
        yield from pool.map(partial(_check, decode=decode), items, chunksize=min(16, 1 + len(items) // 64))
    finally:
        pool.shutdown(cancel_futures=True)


def _silence() -> None:
    """Discard what libraries print about MP3 files, damaged or not."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _check(recording: SourceRecording, decode: bool) -> Recording | LeftOut:
    if recording.error is not None:
        return recording.error
    use_soundfile()
    manifest = recording.manifest
    for path in [Path(part.source) for part in manifest.sources] if manifest else [recording.path]:
        try:
            _check_file(path, decode)
        except AudioError as error:
            return LeftOut("damaged audio" if path.exists() else "missing audio", f"{path}: {error}")
    return manifest or Recording.from_file(recording.path, recording_id=recording.id)


def _check_file(path: Path, decode: bool) -> None:
    if error := audio_error(path):
        if path.is_file() and path.stat().st_size:
            if path.suffix.lower() not in AUDIO_SUFFIXES:
                error = "libsndfile does not read this format"
            converted = path.with_suffix(".wav" if path.suffix == ".flac" else ".flac")
            error += f"; ffmpeg may convert it: ffmpeg -i {shlex.quote(str(path))} {shlex.quote(str(converted))}"
        raise AudioError(error)
    start = 0.0 if decode else max(0.0, soundfile.info(str(path)).duration - END_SECONDS)
    with open_recording(Source(str(path), path, start=start)) as audio:
        for _ in audio.blocks():
            pass
