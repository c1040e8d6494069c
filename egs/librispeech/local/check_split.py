#!/usr/bin/env python3
"""Check that a folder of LibriSpeech holds every utterance of its split."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.data.manifests import ManifestError

UTTERANCES = {
    "dev-clean": 2703,
    "dev-other": 2864,
    "test-clean": 2620,
    "test-other": 2939,
    "train-clean-100": 28539,
    "train-clean-360": 104014,
    "train-other-500": 148688,
    "dev-clean-2": 1089,
    "train-clean-5": 1519,
}
"""{split: its utterances}, of OpenSLR 12 and 31"""


@dataclass(frozen=True)
class Options:
    """Check that a folder SPLIT/SPEAKER/CHAPTER/ holds every utterance of its split."""

    folder: Path
    """folder whose name is that of the split"""
    allow_incomplete: bool = False
    """report what is missing, and accept it"""
    allow_fewer_speakers: bool = False
    """accept a folder without some of the speakers, if what is there has all its files"""


def run(options: Options) -> None:
    speakers, utterances, missing = survey(options.folder)
    if not utterances:
        raise ManifestError(f"{options.folder} has no utterance: no FLAC file that a *.trans.txt beside it names")
    known = UTTERANCES.get(options.folder.name, utterances)
    problem = ""
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        problem = f"{len(missing)} files are missing: {shown}"
    elif utterances < known:
        problem = f"it has {utterances} of {known} utterances, of {speakers} speakers"
    remedy = "remove the folder, so that it is unpacked again, or copy it again; --allow-incomplete takes it as it is"
    if problem and not options.allow_incomplete and (missing or not options.allow_fewer_speakers):
        raise ManifestError(f"{options.folder} is incomplete: {problem}; {remedy}")
    print(f"{options.folder}: {utterances} utterances of {speakers} speakers" + (f"; {problem}" if problem else ""))


def survey(folder: Path) -> tuple[int, int, list[str]]:
    """Return the number of speakers, the number of utterances with audio and text, and the files that are missing."""
    speakers, utterances = set(), 0
    missing: list[str] = []
    for chapter in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        names = {path.name for path in chapter.iterdir()}
        audio = {name for name in names if name.endswith(".flac")}
        transcripts = [name for name in names if name.endswith(".trans.txt")]
        if not transcripts:
            speaker = chapter.parent.name
            missing.append(f"{chapter.relative_to(folder)}/{speaker}-{chapter.name}.trans.txt")
            continue
        lines = [line for name in transcripts for line in (chapter / name).read_text(encoding="utf-8").splitlines()]
        named = {f"{line.split(maxsplit=1)[0]}.flac" for line in lines if line.strip()}
        missing += [f"{chapter.relative_to(folder)}/{name}" for name in sorted(named - audio)]
        utterances += len(named & audio)
        speakers.add(chapter.parent.name)
    return len(speakers), utterances, missing


if __name__ == "__main__":
    sys.exit(command(run))
