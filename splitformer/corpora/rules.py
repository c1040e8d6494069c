"""Turn own data into splits: which text is kept, what is left out, and who is in which split.

The result depends on the source and on options, which the corpus's description holds; nothing is random.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lhotse import Recording, SupervisionSegment

from splitformer.corpora.manifests import Skipped, spread
from splitformer.corpora.sources import ReadOptions, SourceError, SourceRecording, read_source
from splitformer.corpora.sources.audio import check_audio
from splitformer.corpora.sources.base import LeftOut, Utterance
from splitformer.data.manifests import Pair

LONGEST = 60.0
"""Seconds. Longer utterances are left out: training would drop them, and attention is quadratic in the length."""
TRIMMED = 0.5
"""Seconds by which an utterance may end after its recording; it is trimmed."""
JOINERS = "\u200c\u200d"
"""Invisible characters that belong to the spelling of Persian and Indic scripts."""
APOSTROPHES = "'’ʼ"
TAG = re.compile(r"^(<.*>|\[.*\]|\{.*\})$")
MISREAD = re.compile("[\x80-\x9f\ufffd]")
"""Characters that indicate a wrong encoding."""


@dataclass(frozen=True)
class TextRules:
    """Rules for transcripts. All are normalized (NFC), and lose invisible characters and repeated spaces."""

    case: Literal["keep", "lower", "upper"] = "keep"
    """convert letters to this case"""
    punctuation: Literal["keep", "drop"] = "keep"
    """drop: remove punctuation, symbols and tags such as [noise]; dashes separate words, apostrophes in words stay"""
    digits: Literal["keep", "reject"] = "keep"
    """reject: leave out utterances with digits, whose pronunciation is ambiguous"""

    def apply(self, text: str) -> str:
        """Return the normalized text."""
        text = unicodedata.normalize("NFC", text)
        text = "".join(c for c in text if c.isspace() or c in JOINERS or unicodedata.category(c) not in ("Cf", "Cc"))
        if self.punctuation == "drop":
            text = " ".join(_without_punctuation(word) for word in text.split() if not TAG.match(word))
        if self.case != "keep":
            text = text.lower() if self.case == "lower" else text.upper()
        return " ".join(unicodedata.normalize("NFC", text).split())

    def reject(self, text: str) -> LeftOut | None:
        """Return why an utterance with this text is left out, or None."""
        kept, written = self.apply(text), repr(text.strip()[:60])
        if found := MISREAD.search(text):
            remedy = "for text from Windows use --encoding cp1252, or convert the original by iconv -f CP1252 -t UTF-8"
            return LeftOut("encoding", f"{found.group()!r} in {written} is due to a wrong encoding; {remedy}")
        if not kept:
            reason = f"nothing is left of {written} by these rules" if text.strip() else "the transcript is empty"
            return LeftOut("no transcript", reason)
        if self.digits == "reject" and has_digits(kept):
            return LeftOut("digits", f"{written}: write numbers as they are spoken, or use --digits keep")
        return None


def _without_punctuation(word: str) -> str:
    kept = []
    for place, char in enumerate(word):
        category = unicodedata.category(char)
        if char in APOSTROPHES:
            inside = 0 < place < len(word) - 1 and word[place - 1].isalpha() and word[place + 1].isalpha()
            kept.append("'" if inside else " ")
        elif category == "Pd" or char in "/_":
            kept.append(" ")
        elif category[0] not in "PS":
            kept.append(char)
    return "".join(kept)


def has_digits(text: str) -> bool:
    """Whether the text has numbers that are not written as words."""
    return any(char.isnumeric() and unicodedata.category(char)[0] == "N" for char in text)


@dataclass(frozen=True)
class SplitRule:
    """Train, dev and test splits. The source's dev and test sets are kept; the rest is divided by a hash.

    The hash depends on the seed and on one name alone: adding utterances does not move others.
    """

    split_by: Literal["speaker", "recording", "utterance"] = "utterance"
    """what stays together; recordings, where the speaker is unknown"""
    split_seed: int = 0
    """another seed gives another division"""
    dev_share: float = 0.1
    """expected share of what is divided, 0 to 0.5"""
    test_share: float = 0.1
    """expected share of what is divided, 0 to 0.5"""

    def split_of(self, utterance: Utterance, recording: str) -> str:
        """Return "train", "dev" or "test"."""
        if utterance.split in ("dev", "test"):
            return str(utterance.split)
        return self.drawn(self.key(utterance, recording))

    def key(self, utterance: Utterance, recording: str) -> str:
        """Return the name that is hashed."""
        if self.split_by == "utterance":
            return utterance.id
        return (utterance.speaker if self.split_by == "speaker" else None) or recording

    def drawn(self, name: str) -> str:
        """Return the split of a name by its hash."""
        place = int(hashlib.sha256(f"{self.split_seed} {name}".encode()).hexdigest()[:12], 16) / 16**12
        if place < self.test_share:
            return "test"
        return "dev" if place < self.test_share + self.dev_share else "train"


def check_shares(*shares: float | None) -> None:
    """Raise SourceError for a share that is not from 0 to 0.5."""
    for share in shares:
        if share is not None and not 0 <= share <= 0.5:
            raise SourceError(f"--dev-share and --test-share are from 0 to 0.5, not {share:g}")


def choose_seed(seconds: dict[str, float], dev: float, test: float) -> int:
    """Return the seed whose shares of the hours are nearest to `dev` and `test`, with something in every split.

    Args:
      seconds: {key: seconds of its utterances}.
    Raises:
      SourceError: there are too few keys.
    """
    wanted = {name: share for name, share in (("train", 1 - dev - test), ("dev", dev), ("test", test)) if share > 0}
    total = sum(seconds.values())
    best, best_distance = 0, float("inf")
    for seed in range(max(20, min(2000, 100_000 // max(1, len(seconds))))):
        rule = SplitRule(split_seed=seed, dev_share=dev, test_share=test)
        shares = dict.fromkeys(wanted, 0.0)
        for name, length in seconds.items():
            shares[rule.drawn(name)] += length / total
        distance = sum(abs(shares[name] - share) for name, share in wanted.items())
        if all(shares.values()) and distance < best_distance:
            best, best_distance = seed, distance
    if best_distance == float("inf"):
        remedy = "give larger --dev-share and --test-share, or another --split-by"
        raise SourceError(f"{len(seconds)} groups of utterances cannot be divided into {', '.join(wanted)}; {remedy}")
    return best


def supervision_of(
    utterance: Utterance, recording: Recording, rules: TextRules, channel: int = 0
) -> SupervisionSegment | LeftOut:
    """Return Lhotse's supervision for an utterance, or why it is left out. channel: if the source names none."""
    if rejected := rules.reject(utterance.text):
        return rejected
    channel = channel if utterance.channel is None else utterance.channel
    if channel not in recording.channel_ids:
        ids = ", ".join(map(str, recording.channel_ids))
        return LeftOut("channel", f"{recording.id} has no channel {channel}; it has {ids}")
    start = utterance.start or 0.0
    end = recording.duration if utterance.end is None else utterance.end
    if start >= recording.duration or end > recording.duration + TRIMMED:
        return LeftOut("times", f"it spans {start:g} to {end:g} s, and its recording has {recording.duration:.2f} s")
    end = min(end, recording.duration)
    if end - start > LONGEST:
        remedy = "give times: columns start and end, segments, or supervisions" if utterance.end is None else "cut it"
        return LeftOut("too long", f"{end - start:.0f} s are more than {LONGEST:.0f} in one utterance; {remedy}")
    text, duration = rules.apply(utterance.text), round(end - start, ndigits=8)
    return SupervisionSegment(
        utterance.id, recording.id, start, duration, channel, text=text, speaker=utterance.speaker
    )


def source_pairs(
    source: str | Path,
    split: str,
    split_rule: SplitRule,
    text_rules: TextRules,
    skipped: Skipped,
    options: ReadOptions | None = None,
    *,
    limit: int | None = None,
    decode: bool = False,
) -> Iterator[Pair]:
    """Yield the recordings of one split of a source with their supervisions.

    Args:
      skipped: records utterances that are left out, by file and line.
      limit: at most so many utterances, evenly over the split.
      decode: see check_audio.
    Raises:
      SourceError: see read_source; an empty split.  ManifestError: an utterance is left out, if `skipped` is strict.
    """
    options = options or ReadOptions()
    recordings = read_source(source, options).recordings
    recordings = _filtered(recordings, lambda utterance, name: split_rule.split_of(utterance, name) == split)
    if limit is not None:
        chosen = {utterance.id for utterance in spread([u for each in recordings for u in each.utterances], limit)}
        recordings = _filtered(recordings, lambda utterance, _: utterance.id in chosen)
    empty = True
    for recording, audio in zip(recordings, check_audio(recordings, decode)):
        group = []
        for utterance in recording.utterances:
            result = audio
            if isinstance(audio, Recording):
                result = supervision_of(utterance, audio, text_rules, options.channel)
            if isinstance(result, LeftOut):
                skipped.add(utterance.where, result.reason)
            else:
                group.append(result)
        if group:
            empty = False
            yield audio, group
    if empty:
        raise SourceError(f"{source}: no usable utterance in the split {split}; see what was skipped")


def _filtered(recordings: list[SourceRecording], wanted: Callable[[Utterance, str], bool]) -> list[SourceRecording]:
    """Return the recordings that have wanted utterances, with these. `wanted` takes the recording's id, too."""
    kept = [replace(each, utterances=[u for u in each.utterances if wanted(u, each.id)]) for each in recordings]
    return [each for each in kept if each.utterances]
