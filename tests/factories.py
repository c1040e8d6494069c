"""Speech-like data: every letter is a tone of its own, so that a small model can learn to spell."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import soundfile
from lhotse import CutSet, Fbank, NumpyFilesWriter, Recording, SupervisionSegment

from splitformer.corpora.manifests import write_split
from splitformer.corpora.tokens import train_tokenizer

RATE = 16000
LETTERS = "ABCDEFGH"


def tone_speech(text: str, rng: np.random.Generator, letter_seconds: float = 0.12) -> np.ndarray:
    """Return samples of `text`: tones of 300 Hz to 3 kHz, silence for a space, a little noise."""
    pieces = []
    for letter in text:
        t = np.arange(int(letter_seconds * rng.uniform(0.9, 1.1) * RATE)) / RATE
        frequency = 300.0 * 10.0 ** (LETTERS.find(letter) / len(LETTERS))
        tone = np.sin(2 * np.pi * frequency * t) * np.hanning(len(t)) if letter != " " else 0.0 * t
        pieces.append(0.3 * tone)
    samples = np.concatenate([np.zeros(RATE // 20), *pieces, np.zeros(RATE // 20)])
    return samples + 0.001 * rng.standard_normal(len(samples))


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Return transcripts of one to three words of two to four letters."""
    rng = random.Random(seed)
    return [
        " ".join("".join(rng.choices(LETTERS, k=rng.randint(2, 4))) for _ in range(rng.randint(1, 3)))
        for _ in range(count)
    ]


def make_cuts(folder: Path, name: str, texts: list[str], seed: int = 0) -> Path:
    """Record `texts`, store Lhotse's fbank, write the cuts to `folder/<name>_cuts.jsonl.gz` and return that path."""
    rng = np.random.default_rng(seed)
    cuts = []
    for i, text in enumerate(texts):
        path = folder / name / f"{name}-{i:03d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone_speech(text, rng), RATE)
        cut = Recording.from_file(path).to_cut()
        cut.supervisions = [
            SupervisionSegment(
                id=path.stem, recording_id=path.stem, start=0.0, duration=cut.duration, text=text, speaker=name
            )
        ]
        cuts.append(cut)
    stored = CutSet.from_cuts(cuts).compute_and_store_features(
        Fbank(), str(folder / f"{name}_feats"), num_jobs=1, storage_type=NumpyFilesWriter, progress_bar=False
    )
    out = folder / f"{name}_cuts.jsonl.gz"
    stored.to_file(out)
    return out


def make_split(folder: Path, texts: list[str], rate: int = RATE) -> tuple[Path, Path]:
    """Record `texts`, two in each recording, and return the paths of recordings and supervisions."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(0, len(texts), 2):
        pieces = [tone_speech(text, rng) for text in texts[number : number + 2]]
        path = folder / "audio" / f"r{number:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.concatenate(pieces), rate)
        recording, start, segments = Recording.from_file(path), 0.0, []
        for i, piece in enumerate(pieces):
            duration = len(piece) / rate
            segments.append(SupervisionSegment(f"u{number + i:03d}", path.stem, start, duration, 0, texts[number + i]))
            start = round(start + duration, 8)
        pairs.append((recording, segments))
    files = folder / "recordings.jsonl.gz", folder / "supervisions.jsonl.gz"
    write_split(pairs, *files)
    return files


def make_lang_dir(folder: Path, texts: list[str]) -> Path:
    """Make a lang_dir with a character tokenizer for `texts`."""
    text = folder / "train.txt"
    text.write_text("\n".join(texts) + "\n")
    train_tokenizer(text, folder / "lang_char", "char")
    return folder / "lang_char"
