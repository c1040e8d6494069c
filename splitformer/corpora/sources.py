"""Own data as they lie there: a table, a Kaldi data directory, a folder of audio and text, manifests of Lhotse.

Nothing that a source names is run, fetched or believed: pipes of wav.scp and manifests whose audio comes from a command
or an address are refused. What is wrong is told with file and line.

Of a source, audio stays on disk and recordings are read one by one; transcripts are in memory where the source has them
in another order than the audio (Kaldi, Lhotse, tables with `start`).
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lhotse import Recording

from splitformer.corpora.manifests import audio_error
from splitformer.corpora.recipes import files_below
from splitformer.data.manifests import ManifestError, use_soundfile
from splitformer.speech.audio import AUDIO_SUFFIXES

KINDS = ("table", "kaldi", "folder", "lhotse")
TABLE_SUFFIXES = (".tsv", ".csv")
DELIMITERS = "\t,;|"
COLUMNS = {
    "audio": ("audio", "path", "file", "wav", "filename", "file_name", "audio_path", "audio_file", "audio_filepath"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "id": ("id", "utterance", "utterance_id", "utt_id", "utt"),
    "speaker": ("speaker", "speaker_id", "spk", "spk_id", "client_id"),
    "split": ("split", "set", "subset", "partition"),
    "start": ("start", "start_time", "begin", "offset"),
    "end": ("end", "end_time", "stop"),
    "duration": ("duration",),
    "channel": ("channel",),
}
SPLITS = {
    "train": ("train", "training"),
    "dev": ("dev", "devel", "development", "valid", "validation", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
TEXT_SUFFIXES = (".txt", ".lab")
OTHER_AUDIO = {".m4a", ".mp4", ".aac", ".wma", ".amr", ".webm", ".mkv", ".3gp", ".mka"}
"""Suffixes of audio that libsndfile does not read."""


class SourceError(ManifestError):
    """A source that cannot be read; the message names file and line and says what to do."""


@dataclass(frozen=True)
class Utterance:
    """What a source says of one utterance.

    where: file and line.
    text: as it stands there.
    split: "train", "dev" or "test", None where the source does not say.
    start, end: seconds in the recording; None where it is all of it, or up to its end.
    channel: None where the source does not say.
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
class Spoken:
    """One recording of a source with its utterances.

    where: file and line that names the audio, or the audio itself.
    path: the audio file; None where there is none, and `fault` says why.
    ready: the recording, where the source has it as such.
    """

    where: str
    id: str
    path: Path | None
    utterances: list[Utterance] = field(default_factory=list)
    fault: str | None = None
    ready: Recording | None = None

    def recording(self) -> Recording | str:
        """The recording, of which the header is read, or the reason why there is none."""
        if self.fault is not None or self.path is None:
            return self.fault or "there is no audio"
        for path in [Path(part.source) for part in self.ready.sources] if self.ready else [self.path]:
            fault = audio_error(path)
            if fault is not None:
                return f"{path}: {fault}{_convert(path) if 'corrupt' in fault else ''}"
        use_soundfile()
        return self.ready or Recording.from_file(self.path, recording_id=self.id)


def _convert(path: Path) -> str:
    converted = path.with_suffix(".flac" if path.suffix != ".flac" else ".wav")
    return f"; what ffmpeg reads, it converts: ffmpeg -i {shlex.quote(str(path))} {shlex.quote(str(converted))}"


def kind_of(source: Path) -> str:
    """Which of KINDS a source is, told by what is there. Raises SourceError where it is none of them."""
    if source.is_file():
        if source.name.lower().endswith(TABLE_SUFFIXES):
            return "table"
        raise SourceError(f"{source}: a table's name ends in .tsv or .csv; or give a folder (see --help)")
    if not source.is_dir():
        raise SourceError(f"there is no {source}; give a table (.tsv, .csv) or a folder")
    if (source / "wav.scp").is_file():
        return "kaldi"
    if _manifest_pairs(source):
        return "lhotse"
    return "folder"


def read_source(
    source: str | Path, *, audio_dir: str | Path | None = None, speakers_from_folders: bool | None = None
) -> Iterator[Spoken]:
    """The recordings of a source with their utterances; each recording once.

    Args:
      source: a table with a header (.tsv, .csv; columns see COLUMNS), a Kaldi data directory, a folder with audio and
        .txt or .lab beside each file, or a folder with manifests of Lhotse (`*recordings*.jsonl[.gz]` and the same with
        `supervisions`).
      audio_dir: what relative paths of the source start from (default: the folder of the file that has them).
      speakers_from_folders: of a folder, whether the folders that files lie in are speakers; None: where there are two
        or more of them.
    Raises:
      SourceError: what cannot be read, or is contradictory.
    """
    source = Path(source).absolute()
    base = None if audio_dir is None else Path(audio_dir).absolute()
    kind = kind_of(source)
    if kind == "table":
        yield from _of_table(source, base or source.parent)
    elif kind == "kaldi":
        yield from _of_kaldi(source, base or source)
    elif kind == "lhotse":
        for recordings, supervisions, split in _manifest_pairs(source):
            yield from _of_lhotse(recordings, supervisions, split, base or source)
    else:
        yield from _of_folder(source, speakers_from_folders)


# ------------------------------------------------------------------------------------------------- text files


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file in UTF-8, numbered from 1, without their ends, without a byte order mark.

    Raises SourceError for another encoding, with the line and what converts the file.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise SourceError(f"{path}:1: the file is UTF-16, not UTF-8; {_iconv(path, 'UTF-16')}")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise SourceError(
                        f"{path}:{number}: byte {line[error.start]:#04x} is no UTF-8; {_iconv(path, 'ISO-8859-1')} "
                        f"(or whatever encoding it has: file -i {shlex.quote(str(path))} guesses)"
                    ) from None
                if "\0" in text:
                    raise SourceError(f"{path}:{number}: this is no text file: it holds a byte 0")
                yield number, text.rstrip("\r\n")
    except (OSError, EOFError) as error:
        raise SourceError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _iconv(path: Path, encoding: str) -> str:
    converted = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(converted))}"


def clean_id(name: str) -> str:
    """`name` as an id: without what separates folders and fields."""
    return re.sub(r"\s+", "_", name.strip()).replace("/", "-")


def split_named(name: str) -> str | None:
    """train, dev or test for a name of that split, None for any other."""
    return next((split for split, names in SPLITS.items() if name.strip().lower() in names), None)


def _seconds(value: str, name: str, where: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < 1e9:
        raise SourceError(f"{where}: {name} is {value!r}, and must be a number of seconds from 0 up, such as 12.5")
    return seconds


def _check_span(start: float | None, end: float | None, where: str) -> None:
    if end is not None and end <= (start or 0.0):
        raise SourceError(f"{where}: it ends at {end} s and starts at {start or 0.0} s; end must come after start")


class _Once:
    """Refuses what comes a second time."""

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        self.first: dict[str, str] = {}

    def add(self, name: str, where: str) -> None:
        if name in self.first:
            raise SourceError(f"{where}: {self.what}{name!r} is there already, at {self.first[name]}; {self.remedy}")
        self.first[name] = where


# ----------------------------------------------------------------------------------------------------- tables


def _of_table(table: Path, base: Path) -> Iterator[Spoken]:
    rows = _rows(table)
    columns = next(rows)[1]
    ids = _Once("utterance ", "give the table an id column with a different id in each row")
    if not {"start", "end"} & columns.keys():
        for where, row in rows:
            utterance = _utterance(row, where, None)
            ids.add(utterance.id, where)
            # a recording's name is its utterance's: there is one
            yield Spoken(where, utterance.id, base / row["audio"], [utterance])
        return
    spoken: dict[str, Spoken] = {}
    for where, row in rows:
        audio = row["audio"]
        if audio not in spoken:
            spoken[audio] = Spoken(where, clean_id(_without_suffix(audio)), base / audio)
        utterance = _utterance(row, where, spoken[audio].id)
        ids.add(utterance.id, where)
        spoken[audio].utterances.append(utterance)
    names = _Once("recording ", "give the audio files different names")
    for each in spoken.values():
        names.add(each.id, each.where)
        each.utterances.sort(key=lambda utterance: utterance.start or 0.0)
        yield each


def _utterance(row: Mapping[str, str], where: str, recording: str | None) -> Utterance:
    start = _seconds(row["start"], "start", where) if row.get("start") else None
    end = _seconds(row["end"], "end", where) if row.get("end") else None
    if end is None and row.get("duration") and recording is not None:
        end = (start or 0.0) + _seconds(row["duration"], "duration", where)
    _check_span(start, end, where)
    name = clean_id(row.get("id") or _without_suffix(row["audio"]))
    if not row.get("id") and recording is not None and (start is not None or end is not None):
        name += f"-{round(100 * (start or 0.0)):07d}"
    channel = row.get("channel") or None
    if channel is not None and not channel.isdecimal():
        raise SourceError(f"{where}: channel is {channel!r}, and must be a number, counted from 0")
    return Utterance(
        where,
        name,
        row["text"],
        row.get("speaker") or None,
        _split(row["split"], where) if row.get("split") else None,
        start,
        end,
        None if channel is None else int(channel),
    )


def _split(name: str, where: str) -> str:
    split = split_named(name)
    if split is None:
        known = ", ".join(name for names in SPLITS.values() for name in names)
        raise SourceError(f"{where}: split is {name!r}; it may be {known}, or empty where one is to be drawn")
    return split


def _without_suffix(audio: str) -> str:
    path = Path(audio)
    kept = path.with_suffix("") if path.suffix.lower() in AUDIO_SUFFIXES | OTHER_AUDIO else path
    return kept.as_posix().lstrip("/")


def _rows(table: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """First ("", {our name of a column: theirs}), then (file:line, {our name: value}) of each row."""
    numbers = [0]

    def lines() -> Iterator[str]:
        for number, line in read_lines(table):
            numbers[0] = number
            yield line + "\n"

    text = lines()
    header = next(text, "").rstrip("\n")
    delimiter = max(DELIMITERS, key=lambda d: (len(_known_columns(_fields(header, d))), header.count(d)))
    names = _fields(header, delimiter)
    columns = _known_columns(names)
    missing = [name for name in ("audio", "text") if name not in columns]
    if missing:
        raise SourceError(
            f"{table}:1: the first line names no column for {' and '.join(missing)}; it has "
            f"{', '.join(map(repr, names)) or 'nothing'}. Put a header there, such as audio<TAB>text<TAB>speaker; "
            f"audio may be called {', '.join(COLUMNS['audio'])}, and text {', '.join(COLUMNS['text'])}"
        )
    yield "", {name: names[place] for name, place in columns.items()}
    # a .tsv has no quotes but those of the text
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
    rows = 0
    while True:
        first = numbers[0] + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise SourceError(f"{table}:{first}: {error}; look for a quotation mark that is not closed") from error
        if values is None:
            break
        where = f"{table}:{first}"
        if not any(value.strip() for value in values):
            continue
        if len(values) != len(names):
            raise SourceError(
                f"{where}: {len(values)} columns, and the header has {len(names)}; look for a stray "
                f"{'tab' if delimiter == chr(9) else delimiter} in the text"
            )
        row = {name: values[place].strip() for name, place in columns.items()}
        if not row["audio"]:
            raise SourceError(f"{where}: the row names no audio file; fill it in or remove the row")
        rows += 1
        yield where, row
    if not rows:
        raise SourceError(f"{table}: no rows after the header")


def _fields(header: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"') for name in header.split(delimiter)]


def _known_columns(names: list[str]) -> dict[str, int]:
    """{our name: place}; of two that mean the same the one that COLUMNS has first."""
    lower = [name.lower() for name in names]
    found = {}
    for name, aliases in COLUMNS.items():
        place = next((lower.index(alias) for alias in aliases if alias in lower), None)
        if place is not None:
            found[name] = place
    return found


# ------------------------------------------------------------------------------------------------------ Kaldi


def _of_kaldi(folder: Path, base: Path) -> Iterator[Spoken]:
    if not (folder / "text").is_file():
        raise SourceError(f"{folder} has no file `text`: there are no transcripts to learn from")
    texts = _mapping(folder / "text", empty=True)
    speakers = _mapping(folder / "utt2spk") if (folder / "utt2spk").is_file() else {}
    recordings = _mapping(folder / "wav.scp")
    for name, (where, audio) in recordings.items():
        if audio.endswith("|") or audio.startswith("|"):
            raise SourceError(
                f"{where}: recording {name!r} is a pipe, which is not run: {audio[:200]!r}. Write the audio to files, "
                "for instance by Kaldi's wav-copy, and name these in wav.scp"
            )
        if re.search(r"\.ark(:\d+)?$", audio):
            raise SourceError(
                f"{where}: recording {name!r} lies in an archive ({audio}); write it to a file, for instance by "
                "Kaldi's wav-copy, and name that in wav.scp"
            )
    spans: dict[str, list[tuple[str, str, float | None, float | None]]] = {}
    if (folder / "segments").is_file():
        for name, (where, rest) in _mapping(folder / "segments").items():
            fields = rest.split()
            if len(fields) != 3:
                raise SourceError(f"{where}: a line of segments is `utterance recording start end`")
            start = _seconds(fields[1], "start", where)
            end = None if fields[2].startswith("-") else _seconds(fields[2], "end", where)
            _check_span(start, end, where)
            if fields[0] not in recordings:
                raise SourceError(f"{where}: wav.scp has no recording {fields[0]!r}; add it or remove the line")
            spans.setdefault(fields[0], []).append((name, where, start, end))
    else:
        spans = {name: [(name, where, None, None)] for name, (where, _) in recordings.items()}
    known = {name for group in spans.values() for name, *_ in group}
    for name, (where, _) in texts.items():
        if name not in known:
            listed = "segments" if (folder / "segments").is_file() else "wav.scp"
            raise SourceError(f"{where}: {listed} has no {name!r}; add it or remove the line (fix_data_dir.sh does)")
    for name, (where, audio) in recordings.items():
        utterances = [
            Utterance(
                texts[each][0] if each in texts else place,
                clean_id(each),
                texts[each][1] if each in texts else "",
                speakers[each][1] if each in speakers else None,
                None,
                start,
                end,
            )
            for each, place, start, end in sorted(spans.get(name, ()), key=lambda span: span[2] or 0.0)
        ]
        yield Spoken(where, clean_id(name), base / audio, utterances)


def _mapping(path: Path, empty: bool = False) -> dict[str, tuple[str, str]]:
    """{first field: (file:line, the rest)}; `empty` allows a rest that is."""
    found: dict[str, tuple[str, str]] = {}
    once = _Once("", "remove one of the lines")
    for number, line in read_lines(path):
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ") if " " in line.strip() else line.strip().partition("\t")
        where = f"{path}:{number}"
        if not rest.strip() and not empty:
            raise SourceError(f"{where}: {name!r} stands alone; a line of {path.name} has two fields or more")
        once.add(name, where)
        found[name] = where, rest.strip()
    if not found:
        raise SourceError(f"{path} is empty")
    return found


# --------------------------------------------------------------------------------------------- audio and text


def _of_folder(folder: Path, speakers_from_folders: bool | None) -> Iterator[Spoken]:
    audio = sorted(path for path in files_below(folder) if path.suffix.lower() in AUDIO_SUFFIXES | OTHER_AUDIO)
    if not audio:
        raise SourceError(
            f"{folder} has no audio files ({', '.join(sorted(AUDIO_SUFFIXES))}); nor is it a Kaldi data directory "
            "(wav.scp) or a folder with Lhotse's manifests (*recordings*.jsonl.gz)"
        )
    texts = {path: _text_beside(path) for path in audio}
    if not any(texts.values()):
        raise SourceError(
            f"{folder} has {len(audio)} audio files and no transcript: put beside {audio[0].name} a file "
            f"{audio[0].with_suffix('.txt').name} with what is said in it, or give a table (.tsv) of audio and text"
        )
    parts = {path: path.relative_to(folder).parts for path in audio}
    tops = {split_named(each[0]) if len(each) > 1 else None for each in parts.values()}
    by_split = None not in tops  # every file lies in a folder train, dev or test
    depth = 2 if by_split else 1
    names = {each[-2] for each in parts.values() if len(each) > depth}
    if speakers_from_folders is None:
        speakers_from_folders = len(names) >= 2
    ids = _Once("utterance ", "two audio files differ in their suffix alone, or in a space: rename one")
    for path in audio:
        where, part = str(path), parts[path]
        name = clean_id(Path(*part).with_suffix("").as_posix())
        ids.add(name, where)
        split = split_named(part[0]) if by_split else None
        speaker = part[-2] if speakers_from_folders and len(part) > depth else None
        beside = texts[path]
        if beside is None:
            fault = f"there is no {path.with_suffix('.txt').name} (or .lab) beside it"
            yield Spoken(where, name, path, [], fault)
            continue
        text = " ".join(line.strip() for _, line in read_lines(beside))
        fault = f"{path}: not a format of libsndfile{_convert(path)}" if path.suffix.lower() in OTHER_AUDIO else None
        yield Spoken(where, name, path, [Utterance(f"{beside}:1", name, text, speaker, split)], fault)


def _text_beside(audio: Path) -> Path | None:
    return next((path for suffix in TEXT_SUFFIXES if (path := audio.with_suffix(suffix)).is_file()), None)


# ----------------------------------------------------------------------------------------------------- Lhotse


def _manifest_pairs(folder: Path) -> list[tuple[Path, Path, str | None]]:
    """(recordings, supervisions, split that their name has) of the manifests in a folder."""
    pairs = []
    for path in sorted(folder.iterdir()):
        if "recordings" in path.name and path.name.endswith((".jsonl", ".jsonl.gz")):
            supervisions = path.with_name(path.name.replace("recordings", "supervisions"))
            words = re.split(r"[^a-zA-Z]+", path.name)
            split = next((split for word in words if (split := split_named(word)) is not None), None)
            pairs.append((path, supervisions, split))
    return pairs


def _of_lhotse(recordings: Path, supervisions: Path, split: str | None, base: Path) -> Iterator[Spoken]:
    if not supervisions.is_file():
        raise SourceError(f"{recordings} has no {supervisions.name} beside it: there are no transcripts to learn from")
    groups: dict[str, list[Utterance]] = {}
    ids = _Once("utterance ", "give the supervisions different ids")
    for where, item in _json_lines(supervisions):
        start = _seconds(str(_field(item, "start", where)), "start", where)
        end = start + _seconds(str(_field(item, "duration", where)), "duration", where)
        _check_span(start, end, where)
        channel = item.get("channel", 0)
        channel = channel[0] if isinstance(channel, list) and channel else channel
        name = clean_id(str(_field(item, "id", where)))
        ids.add(name, where)
        text, speaker = str(item.get("text") or ""), item.get("speaker") or None
        utterance = Utterance(where, name, text, speaker, split, start, end, channel)
        groups.setdefault(str(_field(item, "recording_id", where)), []).append(utterance)
    once = _Once("recording ", "give the recordings different ids")
    for where, item in _json_lines(recordings):
        name = str(_field(item, "id", where))
        once.add(name, where)
        for source in _field(item, "sources", where):
            if source.get("type") != "file":
                raise SourceError(
                    f"{where}: the audio of recording {name!r} is a {source.get('type')}, which is not run or fetched: "
                    f"{str(source.get('source'))[:200]!r}. Save it as a file, and name that (type \"file\")"
                )
        try:
            recording = Recording.from_dict(item)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SourceError(f"{where}: Lhotse cannot read this recording ({reason})") from error
        for part in recording.sources:
            part.source = str(base / part.source)
        utterances = sorted(groups.pop(name, ()), key=lambda utterance: utterance.start or 0.0)
        yield Spoken(where, name, Path(recording.sources[0].source), utterances, ready=recording)
    for name, group in groups.items():
        raise SourceError(f"{group[0].where}: {recordings} has no recording {name!r}; add it or remove the supervision")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where}: this is no JSON ({error}); was the file cut off?") from error
        if not isinstance(item, dict):
            raise SourceError(f"{where}: a line is a JSON object, as Lhotse writes it")
        yield where, item


def _field(item: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in item:
        raise SourceError(f"{where}: the line lacks {name!r}; it has {', '.join(item)}")
    return item[name]
