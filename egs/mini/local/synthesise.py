#!/usr/bin/env python3
"""A small speech corpus that espeak-ng speaks: sentences from a grammar, voices from a list.

It is written as `<split>/<speaker>/<chapter>/<utterance>.flac` with `<speaker>-<chapter>.trans.txt`, the layout that
Lhotse's most used recipe reads. A specification (TOML, see CorpusSpec) and a seed determine every byte, whatever the
number of jobs: sentences and voices are drawn in one place, and each utterance is spoken by a fresh copy of a newly
started engine, because espeak-ng carries state (pitch flutter, phase) from one utterance to the next.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import multiprocessing.connection
import multiprocessing.process
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
import soundfile
from tqdm import tqdm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SAMPLING_RATE = 16000
SLOT = re.compile(r"\{(\w+)\}")
CHAPTER = 1  # every speaker reads one chapter


class SpecError(ValueError):
    """A specification that cannot be used; the message names the key."""


@dataclass(frozen=True)
class SplitSpec:
    """One split.

    utterances: how many; all sentences of splits other than the largest are different.
    variants: espeak-ng's voice variants, which make the speakers; no variant serves two splits.
    speakers_per_variant: speakers of one variant differ in accent, pitch and rate.
    """

    utterances: int
    variants: tuple[str, ...]
    speakers_per_variant: int = 1


@dataclass(frozen=True)
class CorpusSpec:
    """What the corpus is made of. Ranges are (lowest, highest).

    sentence: name of the rule that every sentence begins with.
    rules: name -> alternatives, all equally likely; `{name}` in one of them stands for another rule.
    accents: espeak-ng voices, such as "en-us".
    words_per_minute, pitch, pitch_range: of a speaker, in espeak-ng's units (pitch 0 to 99).
    rate_variation: the rate of an utterance departs by at most this share from its speaker's.
    level_db: of the speech, relative to full scale; snr_db: of the speech over white noise, both per speaker.
    splits: name -> SplitSpec; the largest is the training split.
    """

    sentence: str
    rules: dict[str, tuple[str, ...]]
    accents: tuple[str, ...]
    words_per_minute: tuple[float, float]
    pitch: tuple[float, float]
    pitch_range: tuple[float, float]
    rate_variation: float
    level_db: tuple[float, float]
    snr_db: tuple[float, float]
    splits: dict[str, SplitSpec]

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
        owners: dict[str, str] = {}
        for split, spec in self.splits.items():
            if spec.utterances < 1 or spec.speakers_per_variant < 1 or not spec.variants:
                raise SpecError(f"splits.{split} needs one utterance, variant and speaker per variant at least")
            for variant in spec.variants:
                if variant in owners:
                    raise SpecError(f"variant {variant!r} is in the splits {owners[variant]} and {split}; choose one")
                owners[variant] = split


@dataclass(frozen=True)
class Speaker:
    """A voice. `id` is a number, as that layout wants it."""

    id: int
    voice: str
    rate: float
    pitch: float
    pitch_range: float
    level_db: float
    snr_db: float


@dataclass(frozen=True)
class Utterance:
    """What is said by whom; `seed` determines espeak-ng's flutter and the noise."""

    id: str
    split: str
    text: str
    speaker: Speaker
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.split}/{self.speaker.id}/{CHAPTER}"


def load_spec(path: str | Path) -> CorpusSpec:
    """Read a specification. Raises SpecError for unknown or missing keys and for rules that do not exist."""
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
    optional = {"speakers_per_variant"}
    unknown, missing = sorted(table.keys() - known), sorted(known - optional - table.keys())
    if unknown or missing:
        raise SpecError(f"{where}: unknown keys {unknown}, missing keys {missing}; keys are {', '.join(sorted(known))}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def plan(spec: CorpusSpec, seed: int, limit: int | None = None) -> list[Utterance]:
    """Draw all utterances.

    Sentences of the smaller splits are all different and appear in no other split. Every word of theirs appears in the
    training split.

    Args:
      limit: at most so many utterances in each split.
    Raises:
      SpecError: the grammar has too few sentences, or a word is missing in training.
    """
    sizes = {name: min(split.utterances, limit or split.utterances) for name, split in spec.splits.items()}
    training = max(spec.splits, key=lambda name: spec.splits[name].utterances)
    taken: set[str] = set()
    sentences: dict[str, list[str]] = {}
    for name in [*(name for name in sizes if name != training), training]:
        rng = _generator(seed, "sentences", name)
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
    if limit is None:
        known = Counter(word for sentence in sentences[training] for word in sentence.split())
        new = sorted({word for sentence in taken for word in sentence.split()} - known.keys())
        if new:
            raise SpecError(f"{new} are not among the words of {training}; give it more utterances, or them more rules")

    utterances = []
    first_speaker = 1
    for name, split in spec.splits.items():
        speakers = _speakers(spec, split, _generator(seed, "speakers", name), first_speaker)
        first_speaker += len(speakers)
        rng = _generator(seed, "utterances", name)
        for index, sentence in enumerate(sentences[name]):
            speaker = speakers[index % len(speakers)]
            rate = speaker.rate * rng.uniform(1 - spec.rate_variation, 1 + spec.rate_variation)
            number = index // len(speakers)
            utterance_id = f"{speaker.id}-{CHAPTER}-{number:04d}"
            utterances.append(Utterance(utterance_id, name, sentence, speaker, rate, rng.getrandbits(31)))
    return utterances


def expand(spec: CorpusSpec, rule: str, rng: random.Random) -> str:
    """One sentence, lower-case: an alternative of the rule with its slots filled."""
    alternative = rng.choice(spec.rules[rule])
    return " ".join(SLOT.sub(lambda match: expand(spec, match[1], rng), alternative).lower().split())


def _speakers(spec: CorpusSpec, split: SplitSpec, rng: random.Random, first_id: int) -> list[Speaker]:
    speakers = []
    for turn in range(split.speakers_per_variant):
        for index, variant in enumerate(split.variants):
            accent = spec.accents[(index + turn) % len(spec.accents)]
            values = [rng.uniform(*r) for r in (spec.words_per_minute, spec.pitch, spec.pitch_range)]
            levels = [rng.uniform(*r) for r in (spec.level_db, spec.snr_db)]
            speakers.append(Speaker(first_id + len(speakers), f"{accent}+{variant}", *values, *levels))
    return speakers


def _generator(*name: object) -> random.Random:
    """A generator of its own for everything that is drawn: a change of one split leaves the others alone."""
    return random.Random("/".join(map(str, name)))


class Engine:
    """libespeak-ng, started. It keeps its state in globals: use one at a time, and never in two threads."""

    _RETRIEVAL, _SYNCHRONOUS = 1, 2  # espeak_AUDIO_OUTPUT
    _RATE, _PITCH, _PITCH_RANGE = 1, 3, 4  # espeak_PARAMETER
    _CHARACTERS, _UTF8 = 1, 1  # espeak_POSITION_TYPE, and a flag of espeak_Synth

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sampling_rate: int = self._library.espeak_Initialize(
            self._SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0
        )
        if self.sampling_rate <= 0:
            raise RuntimeError(
                f"espeak-ng does not start with the voices in {espeakng_loader.get_data_path()}; "
                "reinstall espeakng-loader (remove .venv and run ./setup.sh)"
            )
        self._chunks: list[np.ndarray] = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = signature(self._receive)  # ctypes keeps no reference, the engine calls it later

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    def speak(self, utterance: Utterance) -> np.ndarray:
        """The samples, int16, at `self.sampling_rate`. Raises ValueError for an unknown voice."""
        speaker = utterance.speaker
        if self._library.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {speaker.voice!r}; see its folders lang/ and voices/!v")
        parameters = (
            (self._RATE, utterance.rate),
            (self._PITCH, speaker.pitch),
            (self._PITCH_RANGE, speaker.pitch_range),
        )
        for parameter, value in parameters:
            self._library.espeak_SetParameter(parameter, round(value), 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(utterance.seed))
        self._chunks.clear()
        self._library.espeak_SetSynthCallback(self._callback)  # that of a later engine may be gone with it
        text = utterance.text.encode() + b"\0"
        status = self._library.espeak_Synth(
            text, ctypes.c_size_t(len(text)), 0, self._CHARACTERS, 0, self._UTF8, None, None
        )
        if status != 0 or self._library.espeak_Synchronize() != 0 or not self._chunks:
            raise RuntimeError(f"espeak-ng cannot speak {utterance.text!r} with the voice {speaker.voice}")
        return np.concatenate(self._chunks)


def render(engine: Engine, utterance: Utterance) -> np.ndarray:
    """The utterance as float samples at SAMPLING_RATE, at its speaker's level and with its noise."""
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
    """Band-limited resampling by cutting, or padding, the spectrum. Shapes (samples,) -> (samples * target / source,).

    The signal is padded with zeros to a length at which the ratio is exact.
    """
    divisor = int(np.gcd(source, target))
    blocks = -(-len(samples) * divisor // source)
    length = blocks * (target // divisor)
    spectrum = np.fft.rfft(samples, blocks * (source // divisor))
    return np.fft.irfft(spectrum[: length // 2 + 1], length) * (target / source)


def synthesise(
    spec: CorpusSpec, output_dir: str | Path, *, seed: int, num_jobs: int = 1, limit: int | None = None
) -> list[Utterance]:
    """Speak the corpus into `output_dir`, which appears when it is complete; return what was said.

    Files: `<split>/<speaker>/<chapter>/<utterance>.flac` and `<speaker>-<chapter>.trans.txt`, upper-case.

    Args:
      num_jobs: utterances spoken at a time, each in a process of its own.
    Raises:
      SpecError: see `plan`.
      RuntimeError: an utterance could not be spoken or written; the reason was printed.
    """
    utterances = plan(spec, seed, limit)
    output_dir = Path(output_dir)
    temporary = output_dir.with_name(f".{output_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for folder, group in _by_folder(utterances).items():
        (temporary / folder).mkdir(parents=True)
        transcripts = temporary / folder / f"{group[0].speaker.id}-{CHAPTER}.trans.txt"
        transcripts.write_text("".join(f"{each.id} {each.text.upper()}\n" for each in group), encoding="utf-8")

    engine = Engine()  # once; every child is a copy of the engine in this very state
    fork = multiprocessing.get_context("fork")
    running: dict[int, tuple[multiprocessing.process.BaseProcess, Utterance]] = {}
    with tqdm(total=len(utterances), desc="synthesise", unit=" utterances") as bar:

        def wait_for_one() -> None:
            for sentinel in multiprocessing.connection.wait(list(running)):
                child, utterance = running.pop(sentinel)
                child.join()
                if child.exitcode != 0:
                    raise RuntimeError(f"utterance {utterance.id} ({utterance.text!r}) could not be made, see above")
                bar.update()

        try:
            for utterance in utterances:
                while len(running) >= max(1, num_jobs):
                    wait_for_one()
                child = fork.Process(target=_speak, args=(engine, utterance, temporary))
                child.start()
                running[child.sentinel] = child, utterance
            while running:
                wait_for_one()
        except BaseException:
            for child, _ in running.values():
                child.join()  # they end within milliseconds
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    shutil.rmtree(output_dir, ignore_errors=True)
    temporary.rename(output_dir)
    return utterances


def _by_folder(utterances: list[Utterance]) -> dict[str, list[Utterance]]:
    folders: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        folders.setdefault(utterance.folder, []).append(utterance)
    return folders


def _speak(engine: Engine, utterance: Utterance, root: Path) -> None:
    path = root / utterance.folder / f"{utterance.id}.flac"
    soundfile.write(path, render(engine, utterance), SAMPLING_RATE, subtype="PCM_16")


def digest(folder: str | Path) -> str:
    """sha256 over the names and contents of all files below a folder."""
    total = hashlib.sha256()
    for path in _files(Path(folder)):
        total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="TOML file")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num-jobs", type=int, default=1, help="processes; the corpus does not depend on it")
    parser.add_argument("--limit-utterances", type=int, help="at most so many in each split")
    args = parser.parse_args()
    try:
        utterances = synthesise(
            load_spec(args.spec), args.output_dir, seed=args.seed, num_jobs=args.num_jobs, limit=args.limit_utterances
        )
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"synthesise: {error}")
    for split, count in Counter(each.split for each in utterances).items():
        speakers = {each.speaker.id for each in utterances if each.split == split}
        words = Counter(word for each in utterances if each.split == split for word in each.text.split())
        print(
            f"{args.output_dir / split}: {count} utterances, {len(speakers)} speakers, "
            f"{words.total()} words, {len(words)} different"
        )


if __name__ == "__main__":
    main()
