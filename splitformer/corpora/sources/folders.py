"""Read folders of audio: with a text file beside each recording, or in the layout of well-known corpora."""

from __future__ import annotations

import re
from pathlib import Path

import lhotse.recipes

from splitformer.corpora.recipes import files_below
from splitformer.corpora.sources.base import (
    ALL_AUDIO,
    LeftOut,
    ReadOptions,
    SourceError,
    SourceRecording,
    UnknownForm,
    Utterance,
)
from splitformer.corpora.sources.table import group_rows, read_table, table_rows
from splitformer.corpora.sources.text import EncodingError, clean_id, read_lines, split_in, split_named
from splitformer.speech.audio import AUDIO_SUFFIXES

Transcripts = dict[Path, tuple[str, Path | None]]
"""{audio file: (id, file with its transcript)}"""


def read_folder(folder: Path, options: ReadOptions) -> tuple[str, list[SourceRecording]]:
    """Return the name of a folder's layout, and its recordings. Raises UnknownForm, SourceError."""
    files = sorted(path for path in files_below(folder) if not path.name.startswith("._"))  # macOS adds those
    audio = [path for path in files if path.suffix.lower() in ALL_AUDIO]
    beside: Transcripts = {}
    for path in audio:
        texts = (path.with_suffix(suffix) for suffix in (".txt", ".lab"))
        name = clean_id(path.relative_to(folder).with_suffix("").as_posix())
        beside[path] = name, next((text for text in texts if text.is_file()), None)
    if any(text for _, text in beside.values()):
        return "folder", _with_transcripts(folder, beside, options)
    if vctk := _vctk_transcripts(folder, audio):
        return "VCTK", _with_transcripts(folder, vctk, options)
    if trans := [path for path in files if path.name.endswith(".trans.txt")]:
        return "trans.txt", _read_trans(folder, trans, beside, options)
    clips = [path for path in files if path.parent == folder and path.name in ("train.tsv", "dev.tsv", "test.tsv")]
    if (folder / "clips").is_dir() and (clips or (folder / "validated.tsv").is_file()):
        return "Common Voice", _read_splits(clips or [folder / "validated.tsv"], folder / "clips", options)
    if (folder / "metadata.csv").is_file():
        return "metadata.csv", read_table(folder / "metadata.csv", options)
    if nemo := sorted(folder.glob("*manifest*.json*")):
        return "NeMo", _read_splits(nemo, folder, options)
    raise UnknownForm(_problem(folder, audio))


def _problem(folder: Path, audio: list[Path]) -> str:
    reason = f"{folder} has no audio files ({', '.join(sorted(AUDIO_SUFFIXES))})"
    if audio:
        text = audio[0].with_suffix(".txt").name
        reason = f"{folder} has {len(audio)} audio files and no transcript: put {text} beside {audio[0].name}"
    names = {re.sub("[^a-z0-9]", "", path.name.lower()) for path in (folder, *folder.iterdir())}
    recipes = [name.removeprefix("prepare_") for name in dir(lhotse.recipes) if name.startswith("prepare_")]
    known = [each for each in recipes if len(each) > 4 and any(each.replace("_", "") in name for name in names)]
    if known:
        reason += f". Lhotse has a recipe for {max(known, key=len)!r}: docs/new_corpus.md says how to use it"
    return reason


def _with_transcripts(folder: Path, transcripts: Transcripts, options: ReadOptions) -> list[SourceRecording]:
    """Return the recordings of audio files.

    Folders train, dev and test are splits if every file is below one of them. The folders of the files are speakers,
    if there are two or more, or if `options.speakers` says so.
    """
    parts = {path: path.relative_to(folder).parts for path in transcripts}
    has_splits = all(len(each) > 1 and split_named(each[0]) for each in parts.values())
    depth = 2 if has_splits else 1
    by_folder = len({each[-2] for each in parts.values() if len(each) > depth}) >= 2
    if options.speakers is not None:
        by_folder = options.speakers == "folders"
    recordings = []
    for path, (name, transcript) in transcripts.items():
        split = split_named(parts[path][0]) if has_splits else None
        speaker = parts[path][-2] if by_folder and len(parts[path]) > depth else None
        utterances, error = [], None
        if transcript is None:
            error = LeftOut("no transcript", f"there is no {path.with_suffix('.txt').name} (or .lab) beside it")
        else:
            try:
                text = " ".join(line.strip() for line in read_lines(transcript, options.encoding)).rstrip()
            except EncodingError as problem:
                text, error = "", LeftOut("encoding", str(problem))
            utterances = [Utterance(f"{transcript}:1", name, text, speaker, split)]
        recordings.append(SourceRecording(str(path), name, path, utterances, error))
    return recordings


def _vctk_transcripts(folder: Path, audio: list[Path]) -> Transcripts:
    """Return txt/SPEAKER/ID.txt for wav48*/SPEAKER/ID.*, or for ID_mic1.*; microphone 2 only where 1 is missing."""
    texts = {path.stem: path for path in (folder / "txt").rglob("*.txt")}
    first: dict[str, Path] = {}
    for path in audio if texts else []:
        if path.relative_to(folder).parts[0].startswith("wav48"):
            first.setdefault(re.sub("_mic[12]$", "", path.stem), path)
    return {path: (clean_id(name), texts.get(name)) for name, path in first.items()}


def _read_trans(folder: Path, trans: list[Path], audio: Transcripts, options: ReadOptions) -> list[SourceRecording]:
    """Return the recordings of *.trans.txt files, whose lines are `ID text` for ID.flac (or .wav, ...) beside them.

    The part of an ID before the first dash is the speaker, and folders such as train-clean-100 are splits.
    """
    rows = []
    found = {path.with_suffix(""): path for path in audio}
    for file in trans:
        split = next((each for part in file.relative_to(folder).parts[:-1] if (each := split_in(part))), "")
        for number, line in enumerate(read_lines(file, options.encoding), 1):
            name, _, text = line.strip().partition(" ")
            if name:
                if "/" in name:
                    raise SourceError(f"{file}:{number}: {name!r} is not an utterance id: it contains a slash")
                path = found.pop(file.with_name(name), file.with_name(f"{name}.flac"))
                speaker = name.partition("-")[0] if "-" in name else ""
                row = {"audio": str(path), "text": text, "id": name, "split": split, "speaker": speaker}
                rows.append((f"{file}:{number}", row))
    error = LeftOut("no transcript", "no *.trans.txt beside it names it")
    rest = [SourceRecording(str(path), audio[path][0], path, [], error) for path in found.values()]
    return group_rows(rows, folder) + rest


def _read_splits(tables: list[Path], base: Path, options: ReadOptions) -> list[SourceRecording]:
    """Return the recordings of several tables, such as train.tsv or dev_manifest.json, whose names say the split."""
    rows = [
        (where, {"split": split_in(table.name) or "", **row})
        for table in tables
        for where, row in table_rows(table, options)
    ]
    return group_rows(rows, options.base(base))
