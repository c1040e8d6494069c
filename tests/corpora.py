"""Small corpora of synthesised speech, each in the folders and file formats of a real distribution."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import soundfile

from egs.mini.local.synthesise import SAMPLING_RATE, Engine, Speaker, Utterance, render

ENGLISH = (
    "open the door",
    "close the window please",
    "what time is it",
    "play some music",
    "turn off the light",
    "call my mother",
    "it is cold today",
    "read the next page",
)
GREEK = (
    "Καλημέρα, τι κάνεις;",
    "Άνοιξε την πόρτα!",
    "Κλείσε το παράθυρο.",
    "Τι ώρα είναι τώρα;",
    "Παίξε λίγη μουσική.",
    "Κάνει κρύο σήμερα.",
    "Διάβασε την επόμενη σελίδα.",
    "Πάρε τηλέφωνο τη μητέρα.",
)


@cache
def _engine() -> Engine:
    return Engine()


def speak(text: str, voice: str = "en-us+m1", seed: int = 1) -> np.ndarray:
    """Return samples of `text` at SAMPLING_RATE; the seed determines rate and pitch."""
    rng = np.random.default_rng(seed)
    speaker = Speaker(1, voice, rng.uniform(170, 200), rng.uniform(30, 70), 50.0, -25.0, 35.0)
    return render(_engine(), Utterance("u", "train", text, speaker, speaker.rate, seed))


def session(
    texts: Sequence[str], voice: str, seed: int, pause: float = 0.3
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Return a recording of several utterances with pauses between them, and their spans in seconds."""
    pieces, spans, place = [], [], 0
    for number, text in enumerate(texts):
        samples, silence = speak(text, voice, seed + number), np.zeros(int(pause * SAMPLING_RATE))
        spans.append((place / SAMPLING_RATE, (place + len(samples)) / SAMPLING_RATE))
        pieces += [samples, silence]
        place += len(samples) + len(silence)
    return np.concatenate(pieces), [(round(start, 2), round(end, 2)) for start, end in spans]


def write_librispeech(root: Path, splits: dict[str, int], speakers: dict[str, Sequence[int]] | None = None) -> None:
    """Write `LibriSpeech/<split>/<speaker>/<chapter>/` with FLAC and trans.txt.

    splits: {split: utterances of all its speakers}; speakers: {split: their numbers}, by default two for each split.
    """
    names = iter(range(101, 1000))
    for split, count in splits.items():
        own = (speakers or {}).get(split) or [next(names), next(names)]
        for part, speaker in enumerate(own):
            folder = root / "LibriSpeech" / split / str(speaker) / "7"
            folder.mkdir(parents=True)
            lines = []
            for number in range(part, count, len(own)):
                name, text = f"{speaker}-7-{number:04d}", ENGLISH[number % len(ENGLISH)]
                samples = speak(text, f"en-us+m{part % 4 + 1}", 10 * speaker + number)
                soundfile.write(folder / f"{name}.flac", samples, SAMPLING_RATE)
                lines.append(f"{name} {text.upper()}\n")
            (folder / f"{speaker}-7.trans.txt").write_text("".join(lines))


def write_tedlium(root: Path, splits: dict[str, int]) -> None:
    """Write `TEDLIUM_release-3/legacy/<split>/{sph,stm}/`: SPHERE talks and STM; {split: talks} of eight segments.

    Training data are in `data/` and linked, as in the release. There are segments that are not scored, noise, unknown
    words and separate suffixes.
    """
    release = root / "TEDLIUM_release-3"
    talk = 0
    for split, count in splits.items():
        place = release / ("data" if split == "train" else f"legacy/{split}")
        for kind in ("sph", "stm"):
            (place / kind).mkdir(parents=True)
        for _ in range(count):
            talk += 1
            name = f"Speaker{talk}_2010"
            samples, spans = session(ENGLISH, f"en-us+m{talk % 4 + 1}", 100 * talk)
            soundfile.write(place / f"sph/{name}.sph", samples, SAMPLING_RATE, format="NIST", subtype="PCM_16")
            label = "<o,f0,male>"
            lines = [f"{name} 1 inter_segment_gap 0 {spans[0][0] + 0.01} <o,,unknown> ignore_time_segment_in_scoring"]
            for (start, end), text in zip(spans, ENGLISH):
                spelled = text.replace("it is", "it 's").replace("please", "{NOISE} please <unk>")
                lines.append(f"{name} 1 {name} {start} {end} {label} {spelled}")
            (place / f"stm/{name}.stm").write_text("\n".join(lines) + "\n")
        if split == "train":
            (release / "legacy/train").mkdir(parents=True)
            for kind in ("sph", "stm"):
                (release / f"legacy/train/{kind}").symlink_to(f"../../data/{kind}")


def write_voxpopuli(root: Path, sessions: dict[str, int]) -> None:
    """Write `voxpopuli/raw_audios/en/<year>/<session>_original.ogg` and `asr_en.tsv.gz`, its columns divided by |;
    {split: sessions} of eight segments."""
    header = ["session_id", "id_", "original_text", "normed_text", "speaker_id", "gender", "split"]
    header += ["start_time", "end_time"]
    table = io.StringIO()
    rows = csv.DictWriter(table, [*header, "is_gold_transcript", "accent"], delimiter="|")
    rows.writeheader()
    number = 0
    for year in range(2009, 2021):
        (root / f"voxpopuli/raw_audios/en/{year}").mkdir(parents=True)
    for split, count in sessions.items():
        for _ in range(count):
            number += 1
            year = 2008 + number
            name = f"{year}0112-0900-PLENARY-{number}"
            samples, spans = session(ENGLISH, f"en-gb-x-rp+m{number % 4 + 1}", 100 * number)
            path = root / f"voxpopuli/raw_audios/en/{year}/{name}_original.ogg"
            soundfile.write(path, samples, SAMPLING_RATE, format="OGG", subtype="VORBIS")
            for place, ((start, end), text) in enumerate(zip(spans, ENGLISH)):
                row = [name, f"en_{place}", f"{text.capitalize()}.", text, str(1000 + number)]
                row += ["male", split, start, end]
                rows.writerow({**dict(zip(header, row)), "is_gold_transcript": True, "accent": "None"})
    with gzip.open(root / "voxpopuli/asr_en.tsv.gz", "wt") as file:
        file.write(table.getvalue())


def write_folder(root: Path, speakers: int, each: int, texts: Sequence[str] = GREEK, voice: str = "el") -> None:
    """Write `<speaker>/<utterance>.wav` with .txt beside: names with spaces and non-ASCII letters, several sampling
    rates, some files with two channels."""
    for speaker in range(speakers):
        folder = root / f"ομιλητής {speaker + 1}"
        folder.mkdir(parents=True)
        for number in range(each):
            text = texts[(speaker + number) % len(texts)]
            samples = speak(text, f"{voice}+m{speaker % 4 + 1}", 50 * speaker + number)
            path = folder / f"φράση {number}.wav"
            if number % 3 == 0:
                soundfile.write(path, np.stack([samples, 0 * samples], axis=1), SAMPLING_RATE)
            elif number % 3 == 1:
                soundfile.write(path, samples[::2], SAMPLING_RATE // 2)
            else:
                soundfile.write(path, samples, SAMPLING_RATE)
            path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
