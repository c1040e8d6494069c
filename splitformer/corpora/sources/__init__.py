"""Read own data: tables, folders of audio and text, Kaldi data directories, manifests of Lhotse and NeMo.

Nothing that a source names is run or fetched. Audio stays on disk; transcripts are in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from splitformer.corpora.sources.base import FORMS, ReadOptions, SourceError, SourceRecording
from splitformer.corpora.sources.folders import read_folder
from splitformer.corpora.sources.kaldi import read_kaldi
from splitformer.corpora.sources.manifests import lhotse_manifests, read_lhotse
from splitformer.corpora.sources.table import TABLE_SUFFIXES, read_table


class Source(NamedTuple):
    """What a source contains. kind: its form; num_missing: recordings that `skip_missing` ignores."""

    kind: str
    recordings: list[SourceRecording]
    num_missing: int = 0


def read_source(source: str | Path, options: ReadOptions | None = None) -> Source:
    """Return the recordings of a source (see FORMS) with their utterances. Raises SourceError. No audio is read."""
    options = options or ReadOptions()
    kind, recordings = _read(Path(source).absolute(), options)
    present = [each for each in recordings if not options.skip_missing or each.path.is_file()]
    return Source(kind, present, len(recordings) - len(present))


def _read(source: Path, options: ReadOptions) -> tuple[str, list[SourceRecording]]:
    if source.is_file() and source.name.lower().endswith(TABLE_SUFFIXES):
        return "table", read_table(source, options)
    if not source.is_dir():
        problem = "is none of the forms that are read" if source.is_file() else "does not exist"
        raise SourceError(f"{source} {problem}.\n{FORMS}")
    if (source / "wav.scp").is_file():
        return "Kaldi", read_kaldi(source, options)
    if manifests := lhotse_manifests(source):
        return "Lhotse", [recording for path in manifests for recording in read_lhotse(path, options)]
    return read_folder(source, options)
