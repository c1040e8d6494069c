"""What a command is asked to transcribe: files, folders, lists of recordings, standard input.

A name is data: it is opened, and never run, expanded or believed to say what a file holds. Lists whose recordings are
to be fetched by a command or from an address are refused.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitformer.corpora.manifests import AUDIO_SUFFIXES
from splitformer.speech.audio import AudioError

STANDARD_INPUT = "-"
LIST_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Source:
    """One recording to transcribe, or a span of it.

    name: of the file as it was given, or the id that a list gives it.
    path: None for standard input.
    start, duration: seconds; channel: from 0, None for the mean of all.
    """

    name: str
    path: Path | None
    start: float = 0.0
    duration: float | None = None
    channel: int | None = None


@dataclass(frozen=True)
class Fault:
    """What cannot be transcribed, and why."""

    name: str
    reason: str


def find_sources(arguments: Sequence[str]) -> Iterator[Source | Fault]:
    """What the arguments of a command stand for, in their order, one by one.

    A folder stands for its audio files, told by their suffixes, and those of its subfolders, sorted; `.jsonl` and
    `.jsonl.gz` for their lines; `-` for standard input; anything else for a file of any name.
    """
    for argument in arguments:
        if argument == STANDARD_INPUT:
            yield Source(argument, None)
        elif os.path.isdir(argument):
            yield from _of_folder(argument)
        elif argument.endswith(LIST_SUFFIXES):
            yield from _of_list(Path(argument))
        else:
            yield Source(argument, Path(argument))


def _of_folder(folder: str) -> Iterator[Source | Fault]:
    faults: list[Fault] = []
    found = []
    for place, _, names in os.walk(
        folder, onerror=lambda error: faults.append(Fault(str(error.filename), error.strerror or str(error)))
    ):
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in AUDIO_SUFFIXES]
    yield from faults
    if not found and not faults:
        yield Fault(folder, f"the folder has no audio files ({', '.join(sorted(AUDIO_SUFFIXES))})")
    for path in sorted(found):
        yield Source(str(path), path)


def _of_list(path: Path) -> Iterator[Source | Fault]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield _of_line(json.loads(line), path.parent)
                    except (AudioError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                        yield Fault(f"{path}:{number}", f"no recording in this line: {_reason(error)}")
    except (OSError, EOFError) as error:
        yield Fault(str(path), f"the list cannot be read: {getattr(error, 'strerror', None) or error}")
        return
    if not number:
        yield Fault(str(path), "the list is empty")


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _of_line(line: Any, folder: Path) -> Source:
    """{"audio": path}, with "start", "duration", "channel" and "id" where wanted; NeMo's {"audio_filepath": path} with
    "offset"; a recording or a cut of Lhotse."""
    if not isinstance(line, Mapping):
        raise AudioError(f"a line is a JSON object such as {{\"audio\": \"a.wav\"}}, this is {type(line).__name__}")
    if "audio" in line or "audio_filepath" in line:
        given = line["audio"] if "audio" in line else line["audio_filepath"]
        start = line.get("start", line.get("offset"))
        return Source(
            _text(line.get("id")) or given,
            _existing(given, folder),
            _seconds("start", start) or 0.0,
            _seconds("duration", line.get("duration")),
            _channel(line.get("channel")),
        )
    if "sources" in line:
        return Source(_text(line["id"]), _of_recording(line, folder, None))
    if "recording" in line:
        channel = _channel(line.get("channel"))
        path = _of_recording(line["recording"], folder, channel)
        start, duration = _seconds("start", line["start"]), _seconds("duration", line["duration"])
        return Source(_text(line["id"]), path, start or 0.0, duration, channel)
    raise AudioError(
        f"it has {', '.join(map(str, line)) or 'nothing'}; expected audio or audio_filepath, or a recording or cut of "
        "Lhotse (mixed cuts are not read)"
    )


def _of_recording(recording: Mapping[str, Any], folder: Path, channel: int | None) -> Path:
    if recording.get("transforms"):
        raise AudioError("its audio is to be changed (transforms); give the recording as it is")
    sources = recording["sources"]
    if channel is not None:
        sources = [each for each in sources if channel in each["channels"]]
    if len(sources) != 1:
        raise AudioError(f"its audio is in {len(sources)} files; give them one by one, as {{\"audio\": path}}")
    if sources[0]["type"] != "file":
        raise AudioError(f"its audio is a {sources[0]['type']}, which is not run or fetched; save it as a file")
    return _existing(sources[0]["source"], folder)


def _existing(given: Any, folder: Path) -> Path:
    """A path as it stands or, where nothing is there, beside the list."""
    if not isinstance(given, str) or not given or "\0" in given:
        raise AudioError(f"{given!r} is no path")
    return Path(given) if os.path.exists(given) else folder / given


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, (str, int)):
        raise AudioError(f"its id {value!r} is no text")
    return "" if value is None else str(value)


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise AudioError(f"its {name} {value!r} is no number of seconds")
    return float(value)


def _channel(value: Any) -> int | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise AudioError(f"its channel {value!r} is no channel, which are counted from 0")
    return value
