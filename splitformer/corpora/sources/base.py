"""Options and results of the readers of own data."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from lhotse import Recording

from splitformer.data.manifests import ManifestError
from splitformer.speech.audio import AUDIO_SUFFIXES

# the second group is not read by libsndfile: such files are listed with a remedy
ALL_AUDIO = AUDIO_SUFFIXES | {".m4a", ".mp4", ".aac", ".wma", ".amr", ".webm", ".mkv", ".3gp", ".mka"}
FORMS = """\
SOURCE is one of
  - a table with a header (.tsv, .csv, .txt): columns audio (a path) and text, and optionally id, speaker,
    split (train, dev, test), start and end (seconds), channel
  - a folder of audio with a .txt or .lab file beside each recording; its folders are speakers
  - a Kaldi data directory: wav.scp, text, and optionally segments and utt2spk
  - a folder of Lhotse manifests: NAME_recordings_SPLIT.jsonl.gz and NAME_supervisions_SPLIT.jsonl.gz
  - a NeMo manifest (.json, .jsonl), or a folder of *manifest*.json
  - the folder of a corpus in the layout of LJSpeech (metadata.csv, wavs/), VCTK (txt/, wav48*/), Common Voice
    (clips/, train.tsv or validated.tsv) or with *.trans.txt files"""


class SourceError(ManifestError):
    """A source cannot be read; the message names file and line, and the remedy."""


class UnknownForm(SourceError):
    """The source is in none of the forms that are read."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}.\n{FORMS}")
        self.problem = problem


def absolute_path(path: Path) -> Path:
    """Return an absolute path without `..`. Symbolic links stay, unless removing `..` would lead elsewhere."""
    shortest = Path(os.path.abspath(path))
    same = not path.exists() or (shortest.exists() and shortest.samefile(path))
    return shortest if same else path.resolve()


class LeftOut(NamedTuple):
    """Why something is left out; reasons are counted by kind."""

    kind: str
    reason: str


@dataclass(frozen=True)
class ReadOptions:
    """How to read SOURCE."""

    audio_dir: Path | None = None
    """folder that relative paths start from (default: the folder of the file that has them)"""
    channel: int = 0
    """channel of recordings with several, counted from 0, unless SOURCE names one"""
    speakers: Literal["folders", "none"] | None = None
    """whether the folders of audio files are speakers (default: if there are two or more)"""
    encoding: str | None = None
    """encoding of text that is not UTF-8 or UTF-16, such as cp1252 for text from Windows"""
    audio_column: str | None = None
    """column of a table that holds the audio files, if its name is unusual"""
    text_column: str | None = None
    """column that holds the transcripts"""
    speaker_column: str | None = None
    """column that holds the speakers"""
    skip_missing: bool = False
    """ignore recordings whose file does not exist, such as those of a partial download"""

    def base(self, default: Path) -> Path:
        """Return the folder that relative paths start from."""
        return default if self.audio_dir is None else absolute_path(self.audio_dir)


@dataclass(frozen=True)
class Utterance:
    """One utterance, as a source describes it; None is what the source does not say.

    where: file and line.
    text: unchanged.
    split: "train", "dev" or "test".
    start, end: seconds in the recording.
    """

    where: str
    id: str
    text: str
    speaker: str | None = None
    split: str | None = None
    start: float | None = None
    end: float | None = None
    channel: int | None = None


@dataclass(frozen=True)
class SourceRecording:
    """One recording of a source, with its utterances.

    where: file and line that names it, or the audio file.
    error: why it cannot be used, if the reader knows.
    manifest: Lhotse's description of it, if the source has one.
    """

    where: str
    id: str
    path: Path
    utterances: list[Utterance] = field(default_factory=list)
    error: LeftOut | None = None
    manifest: Recording | None = None
