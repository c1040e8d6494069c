"""Read own data: tables, folders of audio and text, Kaldi data directories, manifests of Lhotse and NeMo.

Nothing that a source names is run or fetched. Audio stays on disk; transcripts are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from splitformer.corpora.sources.base import FORMS, ReadOptions, SourceError, SourceRecording
from splitformer.corpora.sources.folders import read_folder
from splitformer.corpora.sources.kaldi import read_kaldi
from splitformer.corpora.sources.manifests import lhotse_manifests, read_lhotse
from splitformer.corpora.sources.table import TABLE_SUFFIXES, read_table


@dataclass(frozen=True)
class Source:
    """What a source contains.

    kind: its form, for people.
    num_missing: recordings ignored by `ReadOptions.skip_missing`.
    """

    kind: str
    recordings: list[SourceRecording]
    num_missing: int = 0


def read_source(source: str | Path, options: ReadOptions | None = None) -> Source:
    """Return the recordings of a source with their utterances; no audio is read.

    Args:
      source: see FORMS.
    Raises:
      SourceError: the source cannot be read, or contradicts itself.
    """
    options = options or ReadOptions()
    kind, recordings = _read(Path(source).absolute(), options)
    if not options.skip_missing:
        return Source(kind, recordings)
    present = [recording for recording in recordings if recording.path.is_file()]
    return Source(kind, present, len(recordings) - len(present))


def _read(source: Path, options: ReadOptions) -> tuple[str, list[SourceRecording]]:
    name = source.name.lower()
    if source.is_file() and name.endswith(TABLE_SUFFIXES):
        return "table", read_table(source, options)
    if not source.is_dir():
        problem = "is none of the forms that are read" if source.is_file() else "does not exist"
        raise SourceError(f"{source} {problem}.\n{FORMS}")
    if (source / "wav.scp").is_file():
        return "Kaldi", read_kaldi(source, options)
    if manifests := lhotse_manifests(source):
        return "Lhotse", [recording for path in manifests for recording in read_lhotse(path, options)]
    return read_folder(source, options)
