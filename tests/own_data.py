"""Small sources of own data, with noise as audio."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import soundfile
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet

from splitformer.corpora.manifests import Skipped
from splitformer.corpora.rules import SplitRule, TextRules, source_pairs
from splitformer.corpora.sources import ReadOptions, read_source

RATE = 16000
TEXTS = ["open the door", "close the window", "what time is it", "play some music"]


def write_audio(path: Path, seconds: float = 1.0, rate: int = RATE, channels: int = 1) -> Path:
    """Write noise that depends on the file's name and its folder's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32("/".join(path.parts[-2:]).encode()))
    samples = 0.1 * rng.standard_normal((int(seconds * rate), channels))
    soundfile.write(path, samples, rate)
    return path


def write_table(folder: Path, rows: int = 12, header: str = "audio\ttext\tspeaker", name: str = "table.tsv") -> Path:
    lines = [header]
    for number in range(rows):
        write_audio(folder / f"clips/ü {number}.wav", 1.0 + 0.1 * number)
        lines.append(f"clips/ü {number}.wav\t{TEXTS[number % 4]}\tspeaker {number % 4}")
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def write_kaldi(folder: Path, rows: int = 12, segments: bool = False) -> Path:
    data = folder / "data dir"
    data.mkdir(parents=True)
    files: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": [], "segments": []}
    for number in range(rows):
        audio = write_audio(folder / f"audio/{number} é.wav", 4.0)
        files["wav.scp"].append(f"r{number} {audio}")
        for part in range(2 if segments else 1):
            name = f"r{number}-{part}" if segments else f"r{number}"
            files["text"].append(f"{name} {TEXTS[number % 4]}")
            files["utt2spk"].append(f"{name} s{number % 3}")
            files["segments"].append(f"{name} r{number} {2 * part} {2 * part + 1.5 if part == 0 else -1}")
    for name, lines in files.items():
        if name != "segments" or segments:
            (data / name).write_text("\n".join(lines) + "\n")
    return data


def write_lhotse(folder: Path) -> Path:
    (folder / "manifests").mkdir(parents=True)
    for split, count in (("train", 12), ("dev", 2), ("test", 2)):
        recordings = [Recording.from_file(write_audio(folder / f"audio/{split} {i}.wav", 2.0)) for i in range(count)]
        segments = [
            SupervisionSegment(f"{r.id}-{i}", r.id, i, 0.9, 0, text=TEXTS[i], speaker=r.id)
            for r in reversed(recordings)
            for i in range(2)
        ]
        RecordingSet.from_recordings(recordings).to_file(folder / f"manifests/my_recordings_{split}.jsonl.gz")
        SupervisionSet.from_segments(segments).to_file(folder / f"manifests/my_supervisions_{split}.jsonl.gz")
    return folder / "manifests"


def write_lines(path: Path, *lines: object) -> Path:
    """Write lines to a text file; a line that is no text is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def replace_line(path: Path, number: int, line: str | bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))


def utterances(source: Path, **options: object) -> dict[str, tuple]:
    """{id: (text, speaker, split, start, end)}; options are those of ReadOptions."""
    recordings = read_source(source, ReadOptions(**options)).recordings
    return {u.id: (u.text, u.speaker, u.split, u.start, u.end) for each in recordings for u in each.utterances}


def pairs_of(
    source: Path,
    split: str = "train",
    rule: SplitRule | None = None,
    skipped: Skipped | None = None,
    limit: int | None = None,
    decode: bool = False,
    **options: object,
) -> list:
    """The recordings of a split with their supervisions; by default everything is in train."""
    rule = rule or SplitRule(dev_share=0, test_share=0)
    skipped = Skipped() if skipped is None else skipped
    given = ReadOptions(**options)
    return list(source_pairs(source, split, rule, TextRules(), skipped, given, limit=limit, decode=decode))
