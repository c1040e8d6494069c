"""The recordings to transcribe: files, folders, lists of recordings, standard input.

Names are data: files are opened, and names are never run or expanded. Entries of lists whose audio a command or a
download would produce are refused.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitformer.speech.audio import AUDIO_SUFFIXES, AudioError, Source

STANDARD_INPUT = "-"
LIST_SUFFIXES = (".jsonl", ".jsonl.gz")


def find_sources(arguments: Sequence[str]) -> Iterator[Source | AudioError]:
    """Yield the recordings that the arguments of a command name, in their order, and errors in place of unusable ones.

    A folder names the audio files in it and its subfolders, found by their suffixes and sorted; a `.jsonl` or
    `.jsonl.gz` file one recording a line; `-` standard input; anything else is a file of any name.
    """
    for argument in arguments:
        if argument == STANDARD_INPUT:
            yield Source(argument, sys.stdin.buffer)
        elif os.path.isdir(argument):
            yield from _from_folder(argument)
        elif argument.endswith(LIST_SUFFIXES):
            yield from _from_list(Path(argument))
        else:
            yield Source(argument, Path(argument))


def _from_folder(folder: str) -> Iterator[Source | AudioError]:
    unreadable: list[OSError] = []
    audio = [
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=unreadable.append)
        for name in names
        if Path(name).suffix.lower() in AUDIO_SUFFIXES
    ]
    for error in unreadable:
        yield AudioError(f"{error.filename}: {error.strerror or error}")
    if not audio and not unreadable:
        yield AudioError(f"{folder}: the folder has no audio files ({', '.join(sorted(AUDIO_SUFFIXES))})")
    for path in sorted(audio):
        yield Source(str(path), path)


def _from_list(path: Path) -> Iterator[Source | AudioError]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield _from_line(json.loads(line), path.parent)
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
                        yield AudioError(f"{path}:{number}: no recording in this line: {reason}")
    except (OSError, EOFError) as error:
        yield AudioError(f"{path}: the list cannot be read: {getattr(error, 'strerror', None) or error}")
        return
    if not number:
        yield AudioError(f"{path}: the list is empty")


def _from_line(line: Any, folder: Path) -> Source:
    """Return the source for {"audio": path}, NeMo's {"audio_filepath": path}, or a recording or cut of Lhotse."""
    if not isinstance(line, Mapping):
        raise AudioError(f'a line is a JSON object such as {{"audio": "a.wav"}}, this is a {type(line).__name__}')
    if "sources" in line:
        return Source(str(line["id"]), _path(_file_of(line, None), folder))
    channel = line.get("channel")
    if isinstance(channel, list) and len(channel) == 1:
        [channel] = channel
    if channel is not None and not (isinstance(channel, int) and channel >= 0):
        raise AudioError(f"its channel {channel!r} is not a channel number; they are counted from 0")
    start, duration = _seconds(line, "start") or _seconds(line, "offset") or 0.0, _seconds(line, "duration")
    if "recording" in line:
        audio = _file_of(line["recording"], channel)
    elif "audio" in line or "audio_filepath" in line:
        audio = line.get("audio", line.get("audio_filepath"))
    else:
        raise AudioError(
            f"it has {', '.join(map(str, line)) or 'nothing'}; expected audio or audio_filepath, or a recording or cut "
            "of Lhotse (mixed cuts are not read)"
        )
    name = audio if line.get("id") is None else str(line["id"])
    return Source(name, _path(audio, folder), start=start, duration=duration, channel=channel)


def _file_of(recording: Mapping[str, Any], channel: int | None) -> Any:
    """Return the path of a Lhotse recording, or of one of its channels."""
    if recording.get("transforms"):
        raise AudioError("its audio is to be transformed, which is not supported; give it without transforms")
    sources = [each for each in recording["sources"] if channel is None or channel in each["channels"]]
    if len(sources) != 1:
        raise AudioError(f'its audio is in {len(sources)} files; list them one by one, as {{"audio": path}}')
    if sources[0]["type"] != "file":
        raise AudioError(f"its audio is a {sources[0]['type']}, which is not run or fetched; save it as a file")
    return sources[0]["source"]


def _path(value: Any, folder: Path) -> Path:
    """Return the path as it is or, where there is no such file, relative to the list's folder."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise AudioError(f"{value!r} is not a path")
    return Path(value) if os.path.exists(value) else folder / value


def _seconds(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1e9):
        raise AudioError(f"its {key} {value!r} is not a number of seconds")
    return value
