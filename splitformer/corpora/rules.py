"""How own data become splits of a recipe: what is kept of the text, what is left out, who is in which split.

All of it is a function of the source and of a few options, which a corpus's description holds: nothing is drawn.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lhotse import Recording, SupervisionSegment

from splitformer.corpora.manifests import Skipped, spread
from splitformer.corpora.sources import SourceError, Spoken, Utterance, read_source
from splitformer.data.manifests import Pair

CASES = ("keep", "lower", "upper")
PUNCTUATIONS = ("keep", "drop")
DIGITS = ("keep", "reject")
SPLIT_KEYS = ("speaker", "recording", "utterance")
LONGEST = 60.0
"""Seconds above which an utterance is left out: training would drop it, and attention grows with the square."""
TRIMMED = 0.5
"""Seconds by which a span may reach beyond its recording; it is cut there."""
JOINERS = "\u200c\u200d"
"""Not seen, and yet part of the spelling in Persian and Indic scripts."""
APOSTROPHES = "'’ʼ"
TAG = re.compile(r"^(<.*>|\[.*\]|\{.*\})$")


class Fault(NamedTuple):
    """Why an utterance is left out. kind: for counting; reason: with its figures."""

    kind: str
    reason: str


@dataclass(frozen=True)
class TextRules:
    """What is done to a transcript. It is composed (NFC) and without invisible characters in any case.

    case: "keep", "lower" or "upper".
    punctuation: "drop" takes out punctuation, symbols and words that are a tag, such as [noise] or <unk>; apostrophes
      in a word stay, a dash or stroke in one makes two.
    digits: "reject" leaves out utterances with digits: how they are spoken is not written.
    """

    case: str = "keep"
    punctuation: str = "keep"
    digits: str = "keep"

    def apply(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        text = "".join(c for c in text if c.isspace() or c in JOINERS or unicodedata.category(c) not in ("Cf", "Cc"))
        if self.punctuation == "drop":
            words = (_without_punctuation(word) for word in text.split() if not TAG.match(word))
            text = " ".join(words)
        text = {"keep": str, "lower": str.lower, "upper": str.upper}[self.case](text)
        return " ".join(unicodedata.normalize("NFC", text).split())


def _without_punctuation(word: str) -> str:
    kept = []
    for place, char in enumerate(word):
        kind = unicodedata.category(char)
        if char in APOSTROPHES:
            inside = 0 < place < len(word) - 1 and word[place - 1].isalpha() and word[place + 1].isalpha()
            kept.append("'" if inside else " ")
        elif kind == "Pd" or char in "/_":
            kept.append(" ")
        elif kind[0] not in "PS":
            kept.append(char)
    return "".join(kept)


def has_digits(text: str) -> bool:
    return any(char.isnumeric() and unicodedata.category(char)[0] == "N" for char in text)


@dataclass(frozen=True)
class SplitRule:
    """Who is in which split. What a source says is kept for dev and test; the rest is drawn by a hash.

    key: what stays together: all utterances of a "speaker" or "recording", or "utterance": each for itself. Where the
      speaker is not known, the recording counts.
    seed: another one gives another division.
    dev, test: shares of the keys that are drawn, 0 to 1.

    The hash depends on the key's name and the seed alone: utterances that come later move none that are there.
    """

    key: str = "utterance"
    seed: int = 0
    dev: float = 0.1
    test: float = 0.1

    def split_of(self, utterance: Utterance, recording: str) -> str:
        if utterance.split in ("dev", "test"):
            return str(utterance.split)
        return self.drawn(key_of(utterance, recording, self.key))

    def drawn(self, name: str) -> str:
        place = int(hashlib.sha256(f"{self.seed} {name}".encode()).hexdigest()[:12], 16) / 16**12
        if place < self.test:
            return "test"
        return "dev" if place < self.test + self.dev else "train"


def key_of(utterance: Utterance, recording: str, key: str) -> str:
    if key == "utterance":
        return utterance.id
    return (utterance.speaker if key == "speaker" else None) or recording


def choose_seed(seconds: dict[str, float], dev: float, test: float) -> int:
    """The seed with which shares of the hours come nearest to `dev` and `test`, every split having something.

    Args:
      seconds: of each key.
    Raises:
      SourceError: there are fewer keys than splits.
    """
    wanted = {"train": 1 - dev - test, "dev": dev, "test": test}
    wanted = {name: share for name, share in wanted.items() if share > 0}
    if len(seconds) < len(wanted):
        raise SourceError(f"{len(seconds)} groups of utterances cannot be divided into {', '.join(wanted)}")
    total = sum(seconds.values())
    best, best_distance = 0, float("inf")
    for seed in range(max(20, min(2000, 100_000 // len(seconds)))):
        rule = SplitRule(seed=seed, dev=dev, test=test)
        shares = dict.fromkeys(wanted, 0.0)
        for name, length in seconds.items():
            shares[rule.drawn(name)] += length / total
        distance = sum(abs(shares[name] - share) for name, share in wanted.items())
        if all(shares.values()) and distance < best_distance:
            best, best_distance = seed, distance
    if best_distance == float("inf"):
        raise SourceError(
            f"no division of {len(seconds)} groups of utterances into {', '.join(wanted)} was found; give larger "
            "--dev-share and --test-share"
        )
    return best


def supervision_of(
    utterance: Utterance, recording: Recording, rules: TextRules, channel: int = 0
) -> SupervisionSegment | Fault:
    """The utterance as Lhotse has it, or why it is left out. `channel`: where the source names none."""
    text = rules.apply(utterance.text)
    if not text:
        written = utterance.text.strip()
        reason = f"nothing is left of {written[:80]!r} by the rules" if written else "the transcript is empty"
        return Fault("no transcript", reason)
    if rules.digits == "reject" and has_digits(text):
        return Fault("digits", f"digits in {text[:80]!r}: write numbers as they are spoken, or --digits keep")
    channel = channel if utterance.channel is None else utterance.channel
    if channel not in recording.channel_ids:
        ids = ", ".join(map(str, recording.channel_ids))
        return Fault("channel", f"{recording.id} has no channel {channel}; it has {ids}")
    start = utterance.start or 0.0
    end = recording.duration if utterance.end is None else utterance.end
    if start >= recording.duration or end > recording.duration + TRIMMED:
        return Fault("times", f"it spans {start:g} to {end:g} s, and its recording has {recording.duration:.2f} s")
    end = min(end, recording.duration)
    if end - start > LONGEST:
        remedy = "give times: columns start and end, segments, or supervisions" if utterance.end is None else "cut it"
        return Fault("too long", f"{end - start:.0f} s are more than {LONGEST:.0f} in one utterance; {remedy}")
    return SupervisionSegment(
        id=utterance.id,
        recording_id=recording.id,
        start=start,
        duration=round(end - start, ndigits=8),
        channel=channel,
        text=text,
        speaker=utterance.speaker,
    )


def source_pairs(
    source: str | Path,
    split: str,
    split_rule: SplitRule,
    text_rules: TextRules,
    skipped: Skipped,
    *,
    channel: int = 0,
    audio_dir: str | Path | None = None,
    speakers_from_folders: bool | None = None,
    limit: int | None = None,
) -> Iterator[Pair]:
    """The recordings of one split of a source with their supervisions.

    Args:
      skipped: where utterances that are left out are noted, by file and line.
      limit: at most so many utterances, taken evenly over the split.
    Raises:
      SourceError: see read_source; an empty split.  ManifestError: anything that is left out, if `skipped` is strict.
    """
    spoken = _of_split(
        read_source(source, audio_dir=audio_dir, speakers_from_folders=speakers_from_folders), split, split_rule
    )
    if limit is not None:
        spoken = _limited(list(spoken), limit)
    empty = True
    for each in spoken:
        recording = each.recording()
        if isinstance(recording, str):
            for where in [utterance.where for utterance in each.utterances] or [each.where]:
                skipped.add(where, recording)
            continue
        group = []
        for utterance in each.utterances:
            made = supervision_of(utterance, recording, text_rules, channel)
            if isinstance(made, Fault):
                skipped.add(utterance.where, made.reason)
            else:
                group.append(made)
        if group:
            empty = False
            yield recording, group
    if empty:
        raise SourceError(f"{source}: no usable utterance in the split {split}; see what was skipped")


def _of_split(source: Iterator[Spoken], split: str, rule: SplitRule) -> Iterator[Spoken]:
    for each in source:
        mine = [u for u in each.utterances if rule.split_of(u, each.id) == split]
        if mine:
            yield Spoken(each.where, each.id, each.path, mine, each.fault, each.ready)


def _limited(spoken: Sequence[Spoken], limit: int) -> Iterator[Spoken]:
    chosen = {u.id for u in spread([u for each in spoken for u in each.utterances], limit)}
    for each in spoken:
        mine = [u for u in each.utterances if u.id in chosen]
        if mine:
            yield Spoken(each.where, each.id, each.path, mine, each.fault, each.ready)
