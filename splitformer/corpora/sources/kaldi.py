"""Read Kaldi data directories. Pipes in wav.scp are never run: the file that a known decoder reads is taken instead."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from splitformer.corpora.sources.base import ReadOptions, SourceError, SourceRecording, Utterance
from splitformer.corpora.sources.text import clean_id, read_lines, read_span

DECODERS = {
    "cat": "",
    "flac": r"-[cdsfF]+|--(stdout|decode|silent|totally-silent|force)",
    "sph2pipe": r"-p|-f \w+",
    "sox": r"-[qDR]|-V\d?|--no-dither|-t \w+|-b (16|24|32)|-e [\w-]+|-r (16000|16k)",
    "ffmpeg": r"-y|-vn|-nostdin|-hide_banner|-(v|loglevel|threads) \w+|-f \w+|-(acodec|c:a|codec:a) pcm_s\w+|-ar 16000",
}
"""{program: its options that leave the samples as they are}; 16 kHz is the rate that training resamples to anyway."""


def read_kaldi(folder: Path, options: ReadOptions) -> list[SourceRecording]:
    """Return the recordings of a Kaldi data directory.

    Raises:
      SourceError: a file is missing or malformed, files contradict each other, or audio is not in files.
    """
    if not (folder / "text").is_file():
        raise SourceError(f"{folder} has no file `text`: there are no transcripts to learn from")
    listed = "segments" if (folder / "segments").is_file() else "wav.scp"
    texts = _mapping(folder / "text", options, empty=True)
    speakers = _mapping(folder / "utt2spk", options) if (folder / "utt2spk").is_file() else {}
    entries = _mapping(folder / "wav.scp", options)
    recordings = {
        name: SourceRecording(where, clean_id(name), options.base(folder) / _file(name, where, entry))
        for name, (where, entry) in entries.items()
    }
    known = set()
    for name, (where, entry) in (_mapping(folder / listed, options) if listed == "segments" else entries).items():
        recording, start, end = name, None, None
        if listed == "segments":
            fields = entry.split()
            if len(fields) != 3:
                raise SourceError(f"{where}: a line of segments is `utterance recording start end`")
            if fields[0] not in recordings:
                raise SourceError(f"{where}: wav.scp has no recording {fields[0]!r}; add it or remove the line")
            recording = fields[0]
            start, end = read_span(where, fields[1], None if fields[2].startswith("-") else fields[2])
        where, text = texts.get(name, (where, ""))
        speaker = speakers[name][1] if name in speakers else None
        utterance = Utterance(where, clean_id(name), text, speaker, None, start, end)
        recordings[recording].utterances.append(utterance)
        known.add(name)
    for name, (where, _) in texts.items():
        if name not in known:
            raise SourceError(f"{where}: {listed} has no {name!r}; add it or remove the line (fix_data_dir.sh does)")
    for each in recordings.values():
        each.utterances.sort(key=lambda utterance: utterance.start or 0.0)
    return list(recordings.values())


def _mapping(path: Path, options: ReadOptions, empty: bool = False) -> dict[str, tuple[str, str]]:
    """Return {first field: (file:line, rest of the line)}; `empty` allows lines with one field."""
    found: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(read_lines(path, options.encoding), 1):
        name, *rest = re.split("[ \t]+", line.strip(), maxsplit=1)
        where = f"{path}:{number}"
        if name and not rest and not empty:
            raise SourceError(f"{where}: {name!r} stands alone; a line of {path.name} has two fields or more")
        if name in found:
            raise SourceError(f"{where}: {name!r} was already at {found[name][0]}; remove one of the lines")
        if name:
            found[name] = where, "".join(rest)
    if not found:
        raise SourceError(f"{path} is empty")
    return found


def _file(name: str, where: str, entry: str) -> str:
    """Return the audio file of an entry of wav.scp."""
    remedy = "Write the audio to files, for instance by Kaldi's wav-copy, and name these in wav.scp"
    if re.search(r"\.ark(:\d+)?$", entry):
        raise SourceError(f"{where}: recording {name!r} is in an archive ({entry}), which is not read. {remedy}")
    if not entry.startswith("|") and not entry.endswith("|"):
        return entry
    try:
        return file_of_pipe(entry)
    except ValueError as error:
        what = f"{where}: recording {name!r} is a pipe, which is not run: {entry[:200]!r}"
        raise SourceError(f"{what}: {error}. {remedy}") from error


def file_of_pipe(entry: str) -> str:
    """Return the file that a pipe such as `flac -c -d -s FILE |` decodes. Nothing is run.

    Raises:
      ValueError: an unknown program, or an argument that may change the audio.
    """
    lexer = shlex.shlex(entry.removesuffix("|"), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    program, *arguments = list(lexer) or [""]
    name = Path(program).name
    if name not in DECODERS:
        raise ValueError(f"only {', '.join(DECODERS)} with one file are known")
    files: list[str] = []
    while arguments:
        argument = arguments.pop(0)
        pair = f"{argument} {arguments[0]}" if arguments else argument
        early = argument in ("-r", "-b", "-e") and not files  # sox: options of the input file
        special = re.search(r"[$`]|^[|;&<>()]+$", argument)
        if re.fullmatch(DECODERS[name], argument) or (argument == "-" and files):
            continue
        if re.fullmatch(DECODERS[name], pair) and not early:
            arguments.pop(0)
        elif name == "ffmpeg" and argument == "-i" and arguments and not files:
            files.append(arguments.pop(0))
        elif name == "ffmpeg" or files or special or argument.startswith("-"):
            raise ValueError(f"{pair!r} may change the audio; take it out if it does not matter")
        else:
            files.append(argument)
    if not files:
        raise ValueError("it names no file")
    return files[0]
