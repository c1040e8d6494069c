"""Read own data: tables, folders of audio and text, Kaldi data directories, manifests of Lhotse and NeMo.

Nothing that a source names is run or fetched. Audio stays on disk; transcripts are in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from splitformer.corpora.sources.base import (
    FORMS,
    ReadOptions,
    SourceError,
    SourceRecording,
    UnknownForm,
    absolute_path,
)
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
    try:
        kind, groups = _read(absolute_path(Path(source)), options)
    except UnknownForm as error:
        if below := _readable_below(Path(source), options):
            raise SourceError(f"{error.problem}; did you mean {' or '.join(map(str, below[:3]))}?") from None
        raise
    recordings = [recording for group in groups for recording in _unique(group)]
    present = [each for each in recordings if not options.skip_missing or each.path.is_file()]
    return Source(kind, present, len(recordings) - len(present))


def _read(source: Path, options: ReadOptions) -> tuple[str, list[list[SourceRecording]]]:
    """Return the kind of a source, and groups of recordings whose ids must differ."""
    if source.is_file() and source.name.lower().endswith(TABLE_SUFFIXES):
        return "table", [read_table(source, options)]
    if not source.exists():
        raise SourceError(f"{source} does not exist")
    if not source.is_dir():
        raise UnknownForm(f"{source} is in no known form")
    if (source / "wav.scp").is_file():
        return "Kaldi", [read_kaldi(source, options)]
    if manifests := lhotse_manifests(source):
        return "Lhotse", [read_lhotse(path, options) for path in manifests]
    kind, recordings = read_folder(source, options)
    return kind, [recordings]


def _readable_below(source: Path, options: ReadOptions) -> list[Path]:
    """Return the folders in a folder that are in a known form, readable or not."""
    found = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else ():
        try:
            _read(folder, options)
        except (UnknownForm, OSError):
            continue
        except SourceError:
            pass  # a line has a mistake
        found.append(folder)
    return found


def _unique(recordings: list[SourceRecording]) -> list[SourceRecording]:
    """Return the recordings. Raises SourceError for ids that are there twice."""
    utterances = [("utterance", each.id, each.where) for recording in recordings for each in recording.utterances]
    first: dict[tuple[str, str], str] = {}
    for what, name, where in [*utterances, *(("recording", each.id, each.where) for each in recordings)]:
        if first.setdefault((what, name), where) is not where:
            raise SourceError(
                f"{where}: {what} {name!r} was already at {first[what, name]}; give them different ids (a table: by an "
                "id column), or rename files that differ only in their suffix or in a space"
            )
    return recordings
