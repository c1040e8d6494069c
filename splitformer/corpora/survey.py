"""A look at own data before anything is made of them: what is there, what is wrong, and what to do with it.

`survey` reads the source once, of the audio the headers. `propose` is arithmetic on what it has found.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from splitformer.corpora.rules import (
    LONGEST,
    TAG,
    Fault,
    SplitRule,
    TextRules,
    choose_seed,
    has_digits,
    key_of,
    supervision_of,
)
from splitformer.corpora.sources import SourceError, Utterance, kind_of, read_source
from splitformer.data.features import SAMPLING_RATE

FEWEST = 10
"""Utterances without which there is nothing to divide."""
SHOWN = 5
"""Places that are named of each kind of trouble."""
RATES = (2.0, 30.0)
"""Characters per second of an alphabet between which a transcript is plausible."""
SYLLABLE_RATES = (0.5, 12.0)
"""The same where a character is a syllable or a word."""
MANY_CHARACTERS = 400
"""An alphabet of more than so many is one of syllables or words."""
SMALL_HOURS, MEDIUM_HOURS = 10.0, 100.0


class Heard(NamedTuple):
    """An utterance whose audio is there."""

    utterance: Utterance
    recording: str
    seconds: float


@dataclass
class Survey:
    """What a source holds.

    heard: utterances with audio and text.
    faults: what is left out, by kind: (file and line, reason).
    duplicates: pairs of places that are one and the same utterance.
    sampling_rates, channels: {of recordings: how many}.
    """

    source: Path
    kind: str
    heard: list[Heard] = field(default_factory=list)
    faults: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    recordings: int = 0
    sampling_rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)

    def add_fault(self, kind: str, where: str, reason: str) -> None:
        self.faults.setdefault(kind, []).append((where, reason))

    @property
    def seconds(self) -> float:
        return math.fsum(each.seconds for each in self.heard)

    @property
    def speakers(self) -> Counter[str]:
        """{speaker: utterances}, of those that have one."""
        return Counter(each.utterance.speaker for each in self.heard if each.utterance.speaker)


def survey(
    source: str | Path,
    *,
    channel: int = 0,
    audio_dir: str | Path | None = None,
    speakers_from_folders: bool | None = None,
) -> Survey:
    """Read a source, and of its audio the headers.

    Raises:
      SourceError: it cannot be read, or there is nothing to train on; the message says what to do.
    """
    found = Survey(Path(source), kind_of(Path(source)))
    seen: dict[tuple, tuple[str, Path | None]] = {}
    too_long = 0.0
    stream = read_source(source, audio_dir=audio_dir, speakers_from_folders=speakers_from_folders)
    for spoken in tqdm(stream, desc="survey", unit=" recordings"):
        recording = spoken.recording()
        if isinstance(recording, str):
            for where in [u.where for u in spoken.utterances] or [spoken.where]:
                found.add_fault("no audio" if spoken.utterances else "no transcript", where, recording)
            continue
        if not spoken.utterances:
            found.add_fault("no transcript", spoken.where, f"recording {spoken.id} has no utterance")
            continue
        found.recordings += 1
        found.sampling_rates[recording.sampling_rate] += 1
        found.channels[recording.num_channels] += 1
        for utterance in spoken.utterances:
            made = supervision_of(utterance, recording, TextRules(), channel)
            if isinstance(made, Fault):
                found.add_fault(made.kind, utterance.where, made.reason)
                if made.kind == "too long":
                    too_long += (utterance.end or recording.duration) - (utterance.start or 0.0)
                continue
            found.heard.append(Heard(utterance, recording.id, made.duration))
            what = (recording.num_samples, made.start, made.duration, utterance.text)
            if what not in seen:
                seen[what] = utterance.where, spoken.path
            elif _same_audio(seen[what][1], spoken.path):
                found.duplicates.append((seen[what][0], utterance.where))
    _check_audio(found, too_long)
    return found


def _same_audio(one: Path | None, other: Path | None) -> bool:
    if one == other:
        return True
    return None not in (one, other) and _digest(one) == _digest(other)


def _digest(path: Path | None) -> str:
    digest = hashlib.sha256()
    with open(str(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_audio(found: Survey, too_long: float) -> None:
    """Raises SourceError where too little is left to go on with."""
    total = len(found.heard) + sum(map(len, found.faults.values()))
    no_audio = found.faults.get("no audio", [])
    if 2 * len(no_audio) > total:
        raise SourceError(
            f"{found.source}: for {len(no_audio)} of {total} utterances there is no audio:\n{_places(no_audio)}\n"
            "--audio-dir DIR says what relative paths start from"
        )
    if too_long > 0.1 * (too_long + found.seconds):
        raise SourceError(
            f"{found.source}: {too_long / 3600:.1f} hours are utterances of more than {LONGEST:.0f} seconds:\n"
            f"{_places(found.faults['too long'])}\n"
            "A long recording is used by its segments: give times (columns start and end of a table, a Kaldi "
            "`segments`, Lhotse supervisions), or cut it, for instance by a forced aligner"
        )
    _check_enough(found, len(found.heard))


def _check_enough(found: Survey, usable: int) -> None:
    if usable < FEWEST:
        faults = "".join(f"\n{kind}:\n{_places(places)}" for kind, places in found.faults.items())
        raise SourceError(
            f"{found.source}: {usable} usable utterances are too few to train on and to test with; {FEWEST} are the "
            f"least, and an hour or more is of use{faults}"
        )


def _places(places: Sequence[tuple[str, str]]) -> str:
    shown = [f"  {where}: {reason}" for where, reason in places[:SHOWN]]
    return "\n".join(shown + [f"  and {len(places) - SHOWN} more"] * (len(places) > SHOWN))


# ------------------------------------------------------------------------------------------------- proposals


@dataclass(frozen=True)
class Choices:
    """What the user has decided; None: as proposed."""

    case: str | None = None
    punctuation: str | None = None
    digits: str | None = None
    split_by: str | None = None
    split_seed: int | None = None
    dev_share: float | None = None
    test_share: float | None = None
    token_type: str | None = None
    vocab_size: int | None = None
    characters_per_second: tuple[float, float] | None = None


@dataclass(frozen=True)
class Proposal:
    """How a recipe takes a source.

    texts: {id of an utterance that is kept: its text}.
    split: of each of them.
    faults: what the text rules leave out, by kind.
    size: "small", "medium" or "large", the conf that fits; epochs: of training, for the first two.
    warnings: what to think about.
    """

    text_rules: TextRules
    split_rule: SplitRule
    texts: dict[str, str]
    split: dict[str, str]
    faults: dict[str, list[tuple[str, str]]]
    token_type: str
    vocab_size: int
    size: str
    epochs: int
    rates: tuple[float, float]
    slow: list[tuple[str, str]]
    fast: list[tuple[str, str]]
    reasons: dict[str, str]
    warnings: list[str]


def propose(found: Survey, choices: Choices | None = None) -> Proposal:
    """Rules for the text, division into splits, tokens and conf, for what a survey has found.

    Raises:
      SourceError: by these rules too little is left, or it cannot be divided.
    """
    choices = choices or Choices()
    reasons: dict[str, str] = {}
    rules = _text_rules(found, choices, reasons)
    texts: dict[str, str] = {}
    kept: list[Heard] = []
    faults: dict[str, list[tuple[str, str]]] = {}
    for each in found.heard:
        text = rules.apply(each.utterance.text)
        if not text:
            reason = f"nothing is left of {each.utterance.text.strip()[:60]!r}"
            faults.setdefault("no transcript", []).append((each.utterance.where, reason))
        elif rules.digits == "reject" and has_digits(text):
            faults.setdefault("digits", []).append((each.utterance.where, repr(text[:60])))
        else:
            texts[each.utterance.id] = text
            kept.append(each)
    if len(kept) < FEWEST:
        _check_enough(Survey(found.source, found.kind, faults={**found.faults, **faults}), len(kept))
    split_rule = _split_rule(kept, choices, reasons)
    split = {each.utterance.id: split_rule.split_of(each.utterance, each.recording) for each in kept}
    for name in ("train", "dev", "test"):
        if name not in split.values():
            raise SourceError(
                f"{found.source}: no utterance is in {name}; say otherwise in the source's splits, or by --split-seed, "
                "--dev-share and --test-share"
            )

    alphabet = {char for text in texts.values() for char in text} - {" "}
    hours = math.fsum(each.seconds for each in kept if split[each.utterance.id] == "train") / 3600
    size = "small" if hours < SMALL_HOURS else "medium" if hours < MEDIUM_HOURS else "large"
    token_type, vocab_size = _tokens(texts, alphabet, hours, choices, reasons)
    rates = choices.characters_per_second or (SYLLABLE_RATES if len(alphabet) > MANY_CHARACTERS else RATES)
    slow, fast = _implausible(kept, texts, rates)
    return Proposal(
        rules,
        split_rule,
        texts,
        split,
        faults,
        token_type,
        vocab_size,
        size,
        _epochs(hours),
        rates,
        slow,
        fast,
        reasons,
        _warnings(found, kept, texts, split, hours, alphabet),
    )


def _text_rules(found: Survey, choices: Choices, reasons: dict[str, str]) -> TextRules:
    chars = Counter(char for each in found.heard for char in unicodedata.normalize("NFC", each.utterance.text))
    upper = sum(count for char, count in chars.items() if char.isupper())
    lower = sum(count for char, count in chars.items() if char.islower())
    marks = {char: n for char, n in chars.items() if unicodedata.category(char)[0] in "PS" and char not in "'’ʼ"}
    numbers = sum(has_digits(each.utterance.text) for each in found.heard)
    case, punctuation, digits = "keep", "keep", "keep"
    if upper and lower:
        case = "lower"
        reasons["case"] = f"{upper} upper-case and {lower} lower-case letters"
    else:
        reasons["case"] = "one case alone, or a script without"
    if marks:
        punctuation = "drop"
        most = sorted(marks, key=lambda char: -marks[char])[:12]
        reasons["punctuation"] = f"{sum(marks.values())} characters: {' '.join(most)}"
    else:
        reasons["punctuation"] = "there is none"
    if numbers:
        share = numbers / len(found.heard)
        digits = "reject" if share <= 0.2 else "keep"
        how = "write them as they are spoken to have these too" if digits == "reject" else "too many to leave out"
        reasons["digits"] = f"{numbers} utterances ({100 * share:.1f} %) have numbers in digits; {how}"
    else:
        reasons["digits"] = "there are none"
    return TextRules(choices.case or case, choices.punctuation or punctuation, choices.digits or digits)


def _split_rule(kept: list[Heard], choices: Choices, reasons: dict[str, str]) -> SplitRule:
    given = Counter(each.utterance.split for each in kept)
    hours = math.fsum(each.seconds for each in kept) / 3600
    usual = min(0.1, max(0.01, round(2.5 / max(hours, 1e-9), 2)))  # two and a half hours tell systems apart
    dev = 0.0 if given["dev"] else usual if choices.dev_share is None else choices.dev_share
    test = 0.0 if given["test"] else usual if choices.test_share is None else choices.test_share
    drawn = [each for each in kept if each.utterance.split not in ("dev", "test")]
    speakers = {each.utterance.speaker for each in drawn if each.utterance.speaker}
    recordings = {each.recording for each in drawn}
    needed = 1 + (dev > 0) + (test > 0)
    if choices.split_by:
        key = choices.split_by
        reasons["split"] = "as asked for"
    elif len(speakers) >= needed:
        key = "speaker"
        reasons["split"] = f"{len(speakers)} speakers are known, so that nobody is in two splits"
    elif needed <= len(recordings) < len(drawn):
        key = "recording"
        reasons["split"] = "speakers are not known, or too few, and recordings have several utterances"
    else:
        key = "utterance"
        reasons["split"] = "speakers are not known" if not speakers else f"there are {len(speakers)} speakers"
    if not dev and not test:
        reasons["split"] = "the source says so"
        return SplitRule(key, choices.split_seed or 0, 0.0, 0.0)
    seconds: dict[str, float] = {}
    for each in drawn:
        name = key_of(each.utterance, each.recording, key)
        seconds[name] = seconds.get(name, 0.0) + each.seconds
    seed = choose_seed(seconds, dev, test) if choices.split_seed is None else choices.split_seed
    return SplitRule(key, seed, dev, test)


def _tokens(
    texts: dict[str, str], alphabet: set[str], hours: float, choices: Choices, reasons: dict[str, str]
) -> tuple[str, int]:
    words = {word for text in texts.values() for word in text.split()}
    size = max(256, 2 * math.ceil(len(alphabet) / 64) * 64)
    if len(alphabet) > MANY_CHARACTERS:
        token_type, reason = "char", f"an alphabet of {len(alphabet)} characters leaves BPE little to join"
    elif hours < SMALL_HOURS:
        token_type, reason = "char", f"less than {SMALL_HOURS:.0f} hours"
    elif len(words) < 4 * size:
        token_type, reason = "char", f"{len(words)} different words"
    else:
        token_type, reason = "bpe", f"{len(alphabet)} characters, {len(words)} different words"
    reasons["tokens"] = reason if choices.token_type is None else "as asked for"
    return choices.token_type or token_type, choices.vocab_size or size


def _epochs(hours: float) -> int:
    """For the small conf some 6000 batches of 30 seconds, three speeds, and for the medium one 30,000 of 200."""
    batches = 6000 * 30 if hours < SMALL_HOURS else 30_000 * 200
    return min(60, max(8, round(batches / max(1.0, 3 * 3600 * hours))))


def _implausible(
    kept: list[Heard], texts: dict[str, str], rates: tuple[float, float]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Transcripts that are too short or too long for their audio, the worst first."""
    found = []
    for each in kept:
        text = texts[each.utterance.id]
        rate = len(text.replace(" ", "")) / each.seconds
        if not rates[0] <= rate <= rates[1]:
            told = f"{rate:.1f} characters per second: {text[:50]!r} in {each.seconds:.1f} s"
            found.append((rate, each.utterance.where, told))
    slow = [(where, told) for rate, where, told in sorted(found) if rate < rates[0]]
    fast = [(where, told) for rate, where, told in sorted(found, reverse=True) if rate > rates[1]]
    return slow, fast


def _warnings(
    found: Survey,
    kept: list[Heard],
    texts: dict[str, str],
    split: dict[str, str],
    hours: float,
    alphabet: set[str],
) -> list[str]:
    warnings = []
    by_split: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    said: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    for each in kept:
        by_split[split[each.utterance.id]].add(each.utterance.speaker or "")
        said[split[each.utterance.id]].add(texts[each.utterance.id])
    for name in ("dev", "test"):
        shared = sorted((by_split["train"] & by_split[name]) - {""})
        if shared:
            warnings.append(
                f"{len(shared)} speakers are in train and in {name} ({', '.join(shared[:SHOWN])}): WER on {name} is "
                "that for voices that were heard in training"
            )
        own = [texts[each.utterance.id] for each in kept if split[each.utterance.id] == name]
        again = [text for text in own if text in said["train"]]
        if again:
            warnings.append(f"{len(again)} transcripts of {name} are also in train: WER on {name} is lower for it")
    if len(found.speakers) == 1:
        warnings.append("there is one speaker: a system that is trained on one voice knows no other")
    if hours < 1:
        warnings.append(
            f"{_time(3600 * hours)} to train on are little: ./run.sh --init-from CHECKPOINT starts from a model "
            "that was trained on more"
        )
    unseen = alphabet - {char for text in said["train"] for char in text}
    if unseen:
        warnings.append(f"characters of dev or test that train does not have: {' '.join(sorted(unseen)[:40])}")
    words = [word for text in texts.values() for word in text.split()]
    if sum(map(len, words)) > 15 * len(words):
        warnings.append(
            "words are long, as of a script without spaces: WER counts what stands between spaces; put spaces between "
            "words, or between characters for character error rates"
        )
    tags = Counter(word for each in found.heard for word in each.utterance.text.split() if TAG.match(word))
    if tags:
        most = ", ".join(f"{tag} {count} times" for tag, count in tags.most_common(SHOWN))
        warnings.append(f"words that look like tags: {most}; --punctuation drop takes them out")
    return warnings


# ------------------------------------------------------------------------------------------------------ report


def render(found: Survey, proposal: Proposal) -> str:
    """The survey and the proposal for people to read."""
    lengths = sorted(each.seconds for each in found.heard)
    by_id = {each.utterance.id: each for each in found.heard}
    lines = [
        f"{found.source} ({found.kind})",
        f"  {len(found.heard)} utterances in {found.recordings} recordings, {_time(found.seconds)}",
        f"  speakers: {_speakers(found)}",
        f"  sampling rates: {_counted(found.sampling_rates, 'Hz')}"
        + (f"; all are resampled to {SAMPLING_RATE} Hz" if set(found.sampling_rates) != {SAMPLING_RATE} else ""),
        f"  channels: {_counted(found.channels, '')}"
        + ("; one of them is taken (--channel)" if max(found.channels) > 1 else ""),
        f"  lengths: {lengths[0]:.2f} to {lengths[-1]:.2f} s, median {lengths[len(lengths) // 2]:.2f} s",
    ]
    lines += [f"    longest: {_told(each)}" for each in heapq.nlargest(3, found.heard, key=lambda each: each.seconds)]
    lines += [f"    shortest: {_told(each)}" for each in heapq.nsmallest(3, found.heard, key=lambda each: each.seconds)]
    lines.append(f"  alphabet as written: {_alphabet(each.utterance.text for each in found.heard)}")
    lines.append("Left out:")
    faults = {**found.faults}
    for kind, places in proposal.faults.items():
        faults[kind] = faults.get(kind, []) + places
    for kind, places in faults.items():
        lines += [f"  {kind}: {len(places)}", *(f"  {line}" for line in _places(places).splitlines())]
    if not faults:
        lines.append("  nothing")
    suspicious = [("slower", proposal.slow), ("faster", proposal.fast)]
    low, high = proposal.rates
    lines.append(f"Suspicious transcripts (kept; {low:g} to {high:g} characters per second are plausible):")
    for name, places in suspicious:
        if places:
            lines += [f"  {name}: {len(places)}", *(f"  {line}" for line in _places(places).splitlines())]
    if not any(places for _, places in suspicious):
        lines.append("  none")
    lines.append(f"The same utterance twice: {len(found.duplicates) or 'none'}")
    lines += [f"    {one} and {other}" for one, other in found.duplicates[:SHOWN]]
    rules, reasons = proposal.text_rules, proposal.reasons
    lines += [
        "Proposed:",
        f"  --case {rules.case} ({reasons['case']})",
        f"  --punctuation {rules.punctuation} ({reasons['punctuation']})",
        f"  --digits {rules.digits} ({reasons['digits']})",
        f"  alphabet then: {_alphabet(proposal.texts.values())}",
        f"  --token-type {proposal.token_type}"
        + (f" --vocab-size {proposal.vocab_size}" if proposal.token_type == "bpe" else "")
        + f" ({reasons['tokens']})",
        f"  --split-by {proposal.split_rule.key} ({reasons['split']})",
    ]
    for name in ("train", "dev", "test"):
        ids = [each for each, split in proposal.split.items() if split == name]
        speakers = {by_id[each].utterance.speaker for each in ids} - {None}
        time = _time(math.fsum(by_id[each].seconds for each in ids))
        lines.append(f"    {name}: {len(ids)} utterances, {time}, {len(speakers) or 'unknown'} speakers")
    fits = {
        "small": f"6 layers, {proposal.epochs} epochs",
        "medium": f"12 layers of 144 dimensions, {proposal.epochs} epochs",
        "large": "the published system, 12 layers of 256 dimensions",
    }
    lines.append(f"  conf: {proposal.size}, {fits[proposal.size]}")
    lines += [f"Note: {warning}" for warning in proposal.warnings]
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _told(each: Heard) -> str:
    return f"{each.seconds:.2f} s, {each.utterance.where}: {each.utterance.text.strip()[:50]!r}"


def _counted(counter: Counter[int], unit: str) -> str:
    return ", ".join(f"{value} {unit}".strip() + f" in {count} recordings" for value, count in counter.most_common())


def _speakers(found: Survey) -> str:
    speakers = found.speakers
    if not speakers:
        return "not known"
    unknown = len(found.heard) - speakers.total()
    rest = f"; {unknown} utterances have none" if unknown else ""
    return f"{len(speakers)}, with {min(speakers.values())} to {max(speakers.values())} utterances{rest}"


def _alphabet(texts: Iterable[str]) -> str:
    chars = Counter(char for text in texts for char in text if not char.isspace())
    most = [char for char, _ in chars.most_common(80)]
    more = f" and {len(chars) - len(most)} more" if len(chars) > len(most) else ""
    return f"{len(chars)} characters: {''.join(sorted(most))}{more}"
