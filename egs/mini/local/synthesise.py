#!/usr/bin/env python3
"""Synthesise a small speech corpus with espeak-ng: sentences from a grammar, voices from a list.

The corpus has LibriSpeech's layout, `<split>/<speaker>/<chapter>/<utterance>.flac` with
`<speaker>-<chapter>.trans.txt`, which Lhotse's recipe reads. A specification (TOML, see CorpusSpec) and a seed
determine every byte, whatever the number of jobs: sentences and voices are drawn in one process, and each utterance is
spoken by a fresh copy of a newly started engine, because espeak-ng carries state (pitch flutter, phase) from one
utterance to the next.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, fields
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
import soundfile
from tqdm import tqdm

from splitformer.cli import command
from splitformer.errors import UserError
from splitformer.files import atomic_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SAMPLING_RATE = 16000
SLOT = re.compile(r"\{(\w+)\}")
CHAPTER = 1
"""Every speaker reads one chapter."""


@dataclass(frozen=True)
class Options:
    """Synthesise a small speech corpus with espeak-ng."""

    spec: Path
    """specification of the corpus, TOML"""
    output_dir: Path
    seed: int = 42
    num_jobs: int = 1
    """processes; the corpus does not depend on their number"""
    limit_utterances: int | None = None
    """at most so many in each split"""


def run(options: Options) -> None:
    spec = load_spec(options.spec)
    utterances = synthesise(spec, options.output_dir, options.seed, options.num_jobs, options.limit_utterances)
    for split in spec.splits:
        chosen = [utterance for utterance in utterances if utterance.split == split]
        words = Counter(word for utterance in chosen for word in utterance.text.split())
        print(
            f"{options.output_dir / split}: {len(chosen)} utterances, {len({u.speaker.id for u in chosen})} speakers, "
            f"{words.total()} words, {len(words)} different"
        )


# ---- specification


class SpecError(UserError):
    """A specification cannot be used; the message names the key."""


@dataclass(frozen=True)
class SplitSpec:
    """One split."""

    utterances: int
    """number of utterances; the sentences of all splits but the largest are different"""
    variants: tuple[str, ...]
    """espeak-ng's voice variants, which make the speakers; a variant belongs to one split"""
    speakers_per_variant: int = 1
    """speakers with one variant differ in accent, pitch and rate"""


@dataclass(frozen=True)
class CorpusSpec:
    """Specification of the corpus. Ranges are (lowest, highest), and drawn for each speaker."""

    sentence: str
    """name of the rule that every sentence starts with"""
    rules: dict[str, tuple[str, ...]]
    """name -> alternatives, all equally likely; `{name}` in an alternative stands for another rule"""
    accents: tuple[str, ...]
    """espeak-ng voices, such as "en-us" """
    words_per_minute: tuple[float, float]
    pitch: tuple[float, float]
    """espeak-ng's units, 0 to 99"""
    pitch_range: tuple[float, float]
    rate_variation: float
    """the rate of an utterance departs by at most this fraction from its speaker's"""
    level_db: tuple[float, float]
    """of the speech, relative to full scale"""
    snr_db: tuple[float, float]
    """of the speech over white noise"""
    splits: dict[str, SplitSpec]
    """the largest is the training split"""

    def __post_init__(self) -> None:
        for name, alternatives in self.rules.items():
            for slot in SLOT.findall(" ".join(alternatives)):
                if slot not in self.rules:
                    raise SpecError(
                        f"rules.{name} uses {{{slot}}}, which is no rule; rules are {', '.join(self.rules)}"
                    )
            if not alternatives:
                raise SpecError(f"rules.{name} has no alternatives")
        if self.sentence not in self.rules:
            raise SpecError(f"sentence = {self.sentence!r} is no rule; rules are {', '.join(self.rules)}")
        split_of: dict[str, str] = {}
        for split, spec in self.splits.items():
            if spec.utterances < 1 or spec.speakers_per_variant < 1 or not spec.variants:
                raise SpecError(f"splits.{split} needs at least one utterance, variant and speaker per variant")
            for variant in spec.variants:
                if variant in split_of:
                    raise SpecError(f"variant {variant!r} is in the splits {split_of[variant]} and {split}; choose one")
                split_of[variant] = split


def load_spec(path: str | Path) -> CorpusSpec:
    """Read a specification. Raises SpecError for unknown or missing keys, and for rules that do not exist."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}") from None
    values = _checked(CorpusSpec, table, str(path))
    values["splits"] = {
        name: SplitSpec(**_checked(SplitSpec, split, f"{path}: splits.{name}"))
        for name, split in values["splits"].items()
    }
    values["rules"] = {name: tuple(alternatives) for name, alternatives in values["rules"].items()}
    return CorpusSpec(**values)


def _checked(kind: type, table: dict[str, Any], where: str) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    unknown, missing = sorted(table.keys() - known), sorted(known - {"speakers_per_variant"} - table.keys())
    if unknown or missing:
        raise SpecError(f"{where}: unknown keys {unknown}, missing keys {missing}; keys are {', '.join(sorted(known))}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


# ---- sentences and voices


@dataclass(frozen=True)
class Speaker:
    """A voice; LibriSpeech's layout wants a number as `id`."""

    id: int
    voice: str
    rate: float
    pitch: float
    pitch_range: float
    level_db: float
    snr_db: float


@dataclass(frozen=True)
class Utterance:
    """A sentence and its speaker; `seed` determines espeak-ng's flutter and the noise."""

    id: str
    split: str
    text: str
    speaker: Speaker
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.split}/{self.speaker.id}/{CHAPTER}"


def plan(spec: CorpusSpec, seed: int, limit: int | None = None) -> list[Utterance]:
    """Draw all utterances, at most `limit` of each split. Raises SpecError as `_draw_sentences`."""
    sentences = _draw_sentences(spec, seed, limit)
    utterances = []
    first_speaker = 1
    for name, split in spec.splits.items():
        speakers = _draw_speakers(spec, split, _rng(seed, "speakers", name), first_speaker)
        first_speaker += len(speakers)
        rng = _rng(seed, "utterances", name)
        for index, sentence in enumerate(sentences[name]):
            speaker = speakers[index % len(speakers)]
            rate = speaker.rate * rng.uniform(1 - spec.rate_variation, 1 + spec.rate_variation)
            utterance_id = f"{speaker.id}-{CHAPTER}-{index // len(speakers):04d}"
            utterances.append(Utterance(utterance_id, name, sentence, speaker, rate, rng.getrandbits(31)))
    return utterances


def _draw_sentences(spec: CorpusSpec, seed: int, limit: int | None) -> dict[str, list[str]]:
    """Draw the sentences of all splits.

    The sentences of the smaller splits are all different and occur in no other split. All their words occur in the
    training split.

    Raises:
      SpecError: the grammar has too few sentences, or a word is missing in training (not checked with `limit`).
    """
    sizes = {name: min(split.utterances, limit or split.utterances) for name, split in spec.splits.items()}
    training = max(spec.splits, key=lambda name: spec.splits[name].utterances)
    taken: set[str] = set()
    sentences: dict[str, list[str]] = {}
    for name in [*(name for name in sizes if name != training), training]:
        rng = _rng(seed, "sentences", name)
        sentences[name] = []
        for _ in range(100 * sizes[name]):
            if len(sentences[name]) == sizes[name]:
                break
            sentence = expand(spec, spec.sentence, rng)
            if sentence not in taken:
                sentences[name].append(sentence)
                if name != training:
                    taken.add(sentence)
        else:
            raise SpecError(f"the rules do not give {sizes[name]} different sentences for the split {name}")
    known = {word for sentence in sentences[training] for word in sentence.split()}
    new = sorted({word for sentence in taken for word in sentence.split()} - known)
    if new and limit is None:
        raise SpecError(f"{new} are not among the words of {training}; give it more utterances, or them more rules")
    return sentences


def expand(spec: CorpusSpec, rule: str, rng: random.Random) -> str:
    """Draw a sentence, in lower case: an alternative of the rule with its slots filled."""
    alternative = rng.choice(spec.rules[rule])
    return " ".join(SLOT.sub(lambda match: expand(spec, match[1], rng), alternative).lower().split())


def _draw_speakers(spec: CorpusSpec, split: SplitSpec, rng: random.Random, first_id: int) -> list[Speaker]:
    speakers: list[Speaker] = []
    for turn in range(split.speakers_per_variant):
        for index, variant in enumerate(split.variants):
            accent = spec.accents[(index + turn) % len(spec.accents)]
            ranges = (spec.words_per_minute, spec.pitch, spec.pitch_range, spec.level_db, spec.snr_db)
            speakers.append(
                Speaker(first_id + len(speakers), f"{accent}+{variant}", *(rng.uniform(*each) for each in ranges))
            )
    return speakers


def _rng(*name: object) -> random.Random:
    """Return a generator for one thing that is drawn: a change of one split leaves the others alone."""
    return random.Random("/".join(map(str, name)))


# ---- speech


class Engine:
    """libespeak-ng, started. It keeps its state in globals: use one engine at a time, in one thread."""

    _RETRIEVAL, _SYNCHRONOUS = 1, 2  # espeak_AUDIO_OUTPUT
    _RATE, _PITCH, _PITCH_RANGE = 1, 3, 4  # espeak_PARAMETER
    _CHARACTERS, _UTF8 = 1, 1  # espeak_POSITION_TYPE, and a flag of espeak_Synth

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
        self.sampling_rate: int = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, data.encode(), 0)
        if self.sampling_rate <= 0:
            raise UserError(
                f"espeak-ng does not start with the voices in {data}; reinstall espeakng-loader (remove .venv and run "
                "./setup.sh)"
            )
        self._chunks: list[np.ndarray] = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = signature(self._receive)  # ctypes keeps no reference, and the engine calls it later

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # continue

    def speak(self, utterance: Utterance) -> np.ndarray:
        """Return samples (S,), int16, at `self.sampling_rate`. Raises SpecError for an unknown voice."""
        speaker = utterance.speaker
        if self._library.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise SpecError(f"espeak-ng has no voice {speaker.voice!r}; see its folders lang/ and voices/!v")
        for parameter, value in (
            (self._RATE, utterance.rate),
            (self._PITCH, speaker.pitch),
            (self._PITCH_RANGE, speaker.pitch_range),
        ):
            self._library.espeak_SetParameter(parameter, round(value), 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(utterance.seed))
        self._chunks.clear()
        self._library.espeak_SetSynthCallback(self._callback)  # a later engine's may have been freed with it
        text = utterance.text.encode() + b"\0"
        status = self._library.espeak_Synth(
            text, ctypes.c_size_t(len(text)), 0, self._CHARACTERS, 0, self._UTF8, None, None
        )
        if status != 0 or self._library.espeak_Synchronize() != 0 or not self._chunks:
            raise RuntimeError(f"espeak-ng cannot speak {utterance.text!r} with the voice {speaker.voice}")
        return np.concatenate(self._chunks)


def render(engine: Engine, utterance: Utterance) -> np.ndarray:
    """Return the utterance as float samples (S,) at SAMPLING_RATE, with its speaker's level and noise."""
    samples = resample(engine.speak(utterance) / 32768, engine.sampling_rate, SAMPLING_RATE)
    speaker = utterance.speaker
    level = np.sqrt(np.mean(samples**2))
    if level == 0:
        raise RuntimeError(f"espeak-ng says {utterance.text!r} as silence with the voice {speaker.voice}")
    samples *= 10 ** (speaker.level_db / 20) / level
    noise = np.random.default_rng(utterance.seed).standard_normal(len(samples))
    samples += noise * 10 ** ((speaker.level_db - speaker.snr_db) / 20)
    return np.clip(samples, -1, 1 - 1 / 32768)


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Resample (S,) to (S * target / source,), band-limited, by cutting or padding the spectrum.

    The signal is padded with zeros to a length for which the ratio is exact.
    """
    divisor = int(np.gcd(source, target))
    blocks = -(-len(samples) * divisor // source)
    length = blocks * (target // divisor)
    spectrum = np.fft.rfft(samples, blocks * (source // divisor))
    return np.fft.irfft(spectrum[: length // 2 + 1], length) * (target / source)


# ---- corpus


def synthesise(
    spec: CorpusSpec, output_dir: str | Path, seed: int, num_jobs: int = 1, limit: int | None = None
) -> list[Utterance]:
    """Write the corpus to `output_dir`, which appears when it is complete, and return its utterances.

    Args:
      num_jobs: number of processes.
      limit: at most so many utterances in each split.
    Raises:
      SpecError: see `plan`; or an utterance could not be spoken or written, for a reason that was printed.
    """
    utterances = plan(spec, seed, limit)
    with atomic_folder(output_dir) as root:
        for utterance in utterances:
            folder = root / utterance.folder
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{utterance.speaker.id}-{CHAPTER}.trans.txt", "a", encoding="utf-8") as transcripts:
                transcripts.write(f"{utterance.id} {utterance.text.upper()}\n")
        _speak_all(utterances, root, num_jobs)
    return utterances


def _speak_all(utterances: list[Utterance], root: Path, num_jobs: int) -> None:
    """Write the audio of all utterances, each from a process of its own."""
    engine = Engine()  # started once: every child is a copy of the engine in this state
    fork = multiprocessing.get_context("fork")
    running: dict[Any, tuple[BaseProcess, Utterance]] = {}
    waiting = list(reversed(utterances))
    with tqdm(total=len(utterances), desc="synthesise", unit=" utterances") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < max(1, num_jobs):
                    utterance = waiting.pop()
                    child: BaseProcess = fork.Process(target=_speak, args=(engine, utterance, root))
                    child.start()
                    running[child.sentinel] = child, utterance
                for sentinel in wait([child.sentinel for child, _ in running.values()]):
                    child, utterance = running.pop(sentinel)
                    child.join()
                    if child.exitcode != 0:
                        raise SpecError(f"utterance {utterance.id} ({utterance.text!r}) could not be made, see above")
                    bar.update()
        finally:
            for child, _ in running.values():  # after an error; they end within milliseconds
                child.join()


def _speak(engine: Engine, utterance: Utterance, root: Path) -> None:
    path = root / utterance.folder / f"{utterance.id}.flac"
    try:
        soundfile.write(path, render(engine, utterance), SAMPLING_RATE, subtype="PCM_16")
    except SpecError as error:
        sys.exit(str(error))  # of a child: printed, without a traceback


if __name__ == "__main__":
    sys.exit(command(run))
