"""Read tables with a header, LJSpeech's metadata.csv, and NeMo's manifests: everything that names audio row by row."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from splitformer.corpora.sources.base import ALL_AUDIO, ReadOptions, SourceError, SourceRecording, Utterance
from splitformer.corpora.sources.text import SPLITS, clean_id, json_lines, read_lines, read_span, split_named

Row = tuple[str, Mapping[str, str]]
"""File and line, and values: audio and text, and optionally id, speaker, split, start, end, duration, channel."""

JSON_SUFFIXES = (".json", ".jsonl", ".jsonl.gz")
TABLE_SUFFIXES = (".tsv", ".csv", ".txt", *JSON_SUFFIXES)
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


def read_table(table: Path, options: ReadOptions) -> list[SourceRecording]:
    """Return the recordings of a table.

    Relative paths start from `options.audio_dir`, or from the table's folder, or from a folder `clips` in it if the
    first file is there.
    """
    rows = list(table_rows(table, options))
    if not rows:
        raise SourceError(f"{table}: there are no rows after the header")
    folder, first = table.parent, rows[0][1]["audio"]
    clips = not (folder / first).exists() and (folder / "clips" / first).exists()
    return group_rows(rows, options.base(folder / "clips" if clips else folder))


def table_rows(table: Path, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a table, with the keys of COLUMNS. Raises SourceError."""
    if table.name.lower().endswith(JSON_SUFFIXES):
        for where, item in json_lines(table, options.encoding):
            columns = _columns(list(item), options)
            _check_columns(columns, list(item), where)
            yield where, {name: "" if item[key] is None else str(item[key]) for name, key in columns.items()}
        return
    lines = read_lines(table, options.encoding)
    delimiter = max(DELIMITERS, key=lambda d: (len(_columns(_fields(lines[0], d), options)), lines[0].count(d)))
    names = _fields(lines[0], delimiter)
    columns = _columns(names, options)
    if "text" not in columns and "|" in lines[0] and (table.parent / "wavs").is_dir():
        yield from _ljspeech_rows(table, lines)
        return
    _check_columns(columns, names, f"{table}:1")
    for where, values in _split_lines(table, lines, delimiter):
        if len(values) != len(names):
            problem = f"{len(values)} columns, and the header has {len(names)}; look for a stray"
            raise SourceError(f"{where}: {problem} {'tab' if delimiter == chr(9) else delimiter} in the text")
        row = {name: values[names.index(column)].strip() for name, column in columns.items()}
        if not row["audio"]:
            raise SourceError(f"{where}: the row names no audio file; fill it in or remove the row")
        yield where, row


def _split_lines(table: Path, lines: Sequence[str], delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield file:line and fields of the rows after the header that are not empty."""
    # a .tsv has no quotes but those of the text; Excel's "Unicode text" (.txt) has
    quoted = delimiter != "\t" or table.suffix.lower() == ".txt"
    text: Iterable[str] = (line + "\n" for line in lines[1:])
    reader = csv.reader(
        text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True
    )
    number = 2
    try:
        for values in reader:
            if any(value.strip() for value in values):
                yield f"{table}:{number}", values
            number = reader.line_num + 2
    except csv.Error as error:
        raise SourceError(f"{table}:{number}: {error}; look for a quotation mark that is not closed") from error


def _fields(header: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"') for name in header.split(delimiter)]


def _columns(names: Sequence[str], options: ReadOptions) -> dict[str, str]:
    """Return {key of COLUMNS: name in the header}; of several, the one that is first in COLUMNS."""
    given = {"audio": options.audio_column, "text": options.text_column, "speaker": options.speaker_column}
    known = {name.lower(): name for name in reversed(names)}
    found = {}
    for key, usual in COLUMNS.items():
        column = given.get(key)
        aliases = usual if column is None else (column.lower(),)
        if alias := next((alias for alias in aliases if alias in known), None):
            found[key] = known[alias]
    return found


def _check_columns(columns: dict[str, str], names: Sequence[str], where: str) -> None:
    if missing := [name for name in ("audio", "text") if name not in columns]:
        raise SourceError(
            f"{where}: there is no column for {' and '.join(missing)}; the columns are {', '.join(map(repr, names))}. "
            f"Say which it is by {' and '.join(f'--{name}-column' for name in missing)}, or add a header such as "
            f"audio<TAB>text<TAB>speaker. Audio may be called {', '.join(COLUMNS['audio'])}, and text "
            f"{', '.join(COLUMNS['text'])}"
        )


def _ljspeech_rows(table: Path, lines: Sequence[str]) -> Iterator[Row]:
    """Yield rows for lines `id|text` and `id|text|normalized text`, whose audio is wavs/id.wav."""
    for number, line in enumerate(lines, 1):
        name, *texts = line.split("|")
        if line.strip() and len(texts) not in (1, 2):
            raise SourceError(f"{table}:{number}: expected `id|text` or `id|text|normalized text`, got {line[:80]!r}")
        if line.strip():
            file = name if Path(name).suffix.lower() in ALL_AUDIO else f"{name}.wav"
            yield f"{table}:{number}", {"audio": f"wavs/{file}", "text": texts[-1], "id": Path(file).stem}


def group_rows(rows: Iterable[Row], base: Path) -> list[SourceRecording]:
    """Return the recordings that rows name, with their utterances. Raises SourceError.

    If rows have a start or an end, rows with the same audio are utterances of one recording. If not, every row is a
    recording. Relative paths start from `base`.
    """
    rows = list(rows)
    spans = any("start" in row or "end" in row for _, row in rows)
    recordings: dict[str, SourceRecording] = {}
    for where, row in rows:
        audio = row["audio"]
        if "\\" in audio and not (base / audio).exists():
            audio = audio.replace("\\", "/")
        known = Path(audio).suffix.lower() in ALL_AUDIO
        name = (Path(audio).with_suffix("") if known else Path(audio)).as_posix().lstrip("/")
        utterance = _utterance(row, name, spans, where)
        recording = SourceRecording(where, clean_id(name) if spans else utterance.id, base / audio)
        recordings.setdefault(audio if spans else where, recording).utterances.append(utterance)
    for recording in recordings.values():
        recording.utterances.sort(key=lambda utterance: utterance.start or 0.0)
    return list(recordings.values())


def _utterance(row: Mapping[str, str], name: str, spans: bool, where: str) -> Utterance:
    start, end = read_span(where, row.get("start"), row.get("end"), row.get("duration") if spans else None)
    name = clean_id(row.get("id") or name)
    if not row.get("id") and (start is not None or end is not None):
        name += f"-{round(100 * (start or 0.0)):07d}"
    split = split_named(row.get("split", ""))
    if row.get("split") and split is None:
        known = ", ".join(name for names in SPLITS.values() for name in names)
        raise SourceError(f"{where}: split is {row['split']!r}; it may be {known}, or empty to draw one")
    channel = row.get("channel") or None
    if channel is not None and not channel.isdecimal():
        raise SourceError(f"{where}: channel is {channel!r}; it must be a number, counted from 0")
    return Utterance(
        where, name, row["text"], row.get("speaker") or None, split, start, end, int(channel) if channel else None
    )
