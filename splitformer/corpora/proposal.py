"""Propose how a recipe uses own data: rules for the text, splits, tokens, a conf. And show it, with the survey."""

from __future__ import annotations

import heapq
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from splitformer.config import DataConfig
from splitformer.corpora.rules import TAG, SplitRule, TextRules, choose_seed, has_digits
from splitformer.corpora.sources import SourceError
from splitformer.corpora.survey import SHOWN, Places, Survey, SurveyedUtterance, check_enough, show_places
from splitformer.model.subsampling import SAMPLING_RATE

RATES = (2.0, 30.0)
"""Plausible characters per second of an alphabet."""
SYLLABLE_RATES = (0.5, 12.0)
"""Plausible characters per second where a character is a syllable or a word."""
MANY_CHARACTERS = 400
"""Larger alphabets consist of syllables or words."""
SMALL_HOURS, MEDIUM_HOURS = 10.0, 100.0
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Choices:
    """Decisions that replace what is proposed."""

    case: Literal["keep", "lower", "upper"] | None = None
    """case of the text"""
    punctuation: Literal["keep", "drop"] | None = None
    """drop: remove punctuation, symbols and tags such as [noise]"""
    digits: Literal["keep", "reject"] | None = None
    """reject: leave out utterances with digits"""
    split_by: Literal["speaker", "recording", "utterance"] | None = None
    """unit kept within one split"""
    split_seed: int | None = None
    """another seed draws other splits"""
    dev_share: float | None = None
    """share of the hours, 0 to 0.5"""
    test_share: float | None = None
    """share of the hours, 0 to 0.5"""
    token_type: Literal["bpe", "char"] | None = None
    """tokens of the model"""
    vocab_size: int | None = None
    """number of BPE tokens"""
    chars_per_second: tuple[float, float] | None = None
    """speaking rates that are plausible; others are listed as suspicious"""


@dataclass(frozen=True)
class Proposal:
    """Proposal of text rules, splits, tokens and conf for a source.

    left_out: {kind: places}, by the survey and by the text rules.
    size: "small", "medium" or "large", the conf; epochs: of the first two.
    rates: plausible characters per second; slow, fast: utterances outside them, the worst first.
    reasons: {case, punctuation, digits, split, tokens: why}.
    """

    text_rules: TextRules
    split_rule: SplitRule
    utterances: list[SurveyedUtterance]
    left_out: dict[str, Places]
    token_type: str
    vocab_size: int
    size: str
    epochs: int
    rates: tuple[float, float]
    slow: Places
    fast: Places
    reasons: dict[str, str]
    warnings: list[str]


def propose(found: Survey, choices: Choices | None = None) -> Proposal:
    """Return what suits the utterances of a survey. Raises SourceError if too little is left, or cannot be divided."""
    choices = choices or Choices()
    reasons: dict[str, str] = {}
    rules = _text_rules(found, choices, reasons)
    kept: list[SurveyedUtterance] = []
    left_out = defaultdict(list, {kind: list(places) for kind, places in found.left_out.items()})
    for each in found.utterances:
        if rejected := rules.reject(each.utterance.text):
            left_out[rejected.kind].append((each.utterance.where, rejected.reason))
        else:
            kept.append(each._replace(text=rules.apply(each.utterance.text)))
    check_enough(found.source, len(kept), left_out)
    split_rule = _split_rule(kept, choices, reasons)
    kept = [each._replace(split=split_rule.split_of(each.utterance, each.recording)) for each in kept]
    if empty := [name for name in SPLITS if not any(each.split == name for each in kept)]:
        remedy = "change the source's splits, or --split-seed, --dev-share and --test-share"
        raise SourceError(f"{found.source}: no utterance is in {' and '.join(empty)}; {remedy}")
    alphabet = {char for each in kept for char in each.text} - {" "}
    hours = math.fsum(each.seconds for each in kept if each.split == "train") / 3600
    token_type, vocab_size = _tokens(kept, alphabet, hours, choices, reasons)
    rates = choices.chars_per_second or (SYLLABLE_RATES if len(alphabet) > MANY_CHARACTERS else RATES)
    slow, fast = _implausible(kept, rates)
    return Proposal(
        rules,
        split_rule,
        kept,
        left_out,
        token_type,
        vocab_size,
        "small" if hours < SMALL_HOURS else "medium" if hours < MEDIUM_HOURS else "large",
        _epochs(hours),
        rates,
        slow,
        fast,
        reasons,
        _warnings(found, kept, hours, alphabet),
    )


def _text_rules(found: Survey, choices: Choices, reasons: dict[str, str]) -> TextRules:
    texts = [each.utterance.text for each in found.utterances]
    chars = Counter(char for text in texts for char in unicodedata.normalize("NFC", text))
    upper = sum(count for char, count in chars.items() if char.isupper())
    lower = sum(count for char, count in chars.items() if char.islower())
    marks = Counter({c: n for c, n in chars.items() if unicodedata.category(c)[0] in "PS" and c not in "'’ʼ"})
    numbers = sum(map(has_digits, texts))
    few = numbers <= 0.2 * len(texts)
    reasons["case"] = "only one case, or a script without case"
    if upper and lower:
        reasons["case"] = f"{upper} upper-case and {lower} lower-case letters"
    reasons["punctuation"] = reasons["digits"] = "there are none"
    if marks:
        most = " ".join(char for char, _ in marks.most_common(12))
        reasons["punctuation"] = f"{marks.total()} characters: {most}"
    if numbers:
        remedy = "write them as they are spoken to keep these too" if few else "too many to leave out"
        share = 100 * numbers / len(texts)
        reasons["digits"] = f"numbers in digits in {_number(numbers, 'utterance')} ({share:.1f} %); {remedy}"
    return TextRules(
        choices.case or ("lower" if upper and lower else "keep"),
        choices.punctuation or ("drop" if marks else "keep"),
        choices.digits or ("reject" if numbers and few else "keep"),
    )


def _split_rule(usable: list[SurveyedUtterance], choices: Choices, reasons: dict[str, str]) -> SplitRule:
    given = {each.utterance.split for each in usable}
    hours = math.fsum(each.seconds for each in usable) / 3600
    usual = min(0.1, max(0.01, round(2.5 / max(hours, 1e-9), 2)))  # two and a half hours distinguish systems
    dev = 0.0 if "dev" in given else usual if choices.dev_share is None else choices.dev_share
    test = 0.0 if "test" in given else usual if choices.test_share is None else choices.test_share
    divided = [each for each in usable if each.utterance.split not in ("dev", "test")]
    speakers = {each.utterance.speaker for each in divided if each.utterance.speaker}
    recordings = {each.recording for each in divided}
    needed = 1 + (dev > 0) + (test > 0)
    key: Literal["speaker", "recording", "utterance"] = "utterance"
    reasons["split"] = f"only {_number(len(speakers), 'speaker')}" if speakers else "the speakers are unknown"
    if choices.split_by == "speaker" and not speakers and needed > 1:
        remedy = "name their column by --speaker-column, or use --speakers folders if folders of audio are speakers"
        raise SourceError(f"--split-by speaker: the speakers are unknown; {remedy}")
    if choices.split_by:
        key, reasons["split"] = choices.split_by, "your choice"
    elif len(speakers) >= needed:
        key, reasons["split"] = "speaker", f"{len(speakers)} speakers are known; none is in two splits"
    elif needed <= len(recordings) < len(divided):
        key, reasons["split"] = "recording", f"{reasons['split']}, and recordings have several utterances"
    if not dev and not test:
        reasons["split"] = "given by the source"
        return SplitRule(key, choices.split_seed or 0, 0.0, 0.0)
    rule = SplitRule(key, choices.split_seed or 0, dev, test)
    if choices.split_seed is not None:
        return rule
    seconds: defaultdict[str, float] = defaultdict(float)
    for each in divided:
        seconds[rule.key(each.utterance, each.recording)] += each.seconds
    return SplitRule(key, choose_seed(seconds, dev, test), dev, test)


def _tokens(
    kept: list[SurveyedUtterance], alphabet: set[str], hours: float, choices: Choices, reasons: dict[str, str]
) -> tuple[str, int]:
    words = {word for each in kept for word in each.text.split()}
    size = max(256, 2 * math.ceil(len(alphabet) / 64) * 64)
    if len(alphabet) > MANY_CHARACTERS:
        token_type, reason = "char", f"with an alphabet of {len(alphabet)} characters, BPE has little to merge"
    elif hours < SMALL_HOURS:
        token_type, reason = "char", f"less than {SMALL_HOURS:.0f} hours"
    else:
        token_type = "char" if len(words) < 4 * size else "bpe"
        reason = f"{len(alphabet)} characters, {len(words)} different words"
    reasons["tokens"] = reason if choices.token_type is None else "your choice"
    return choices.token_type or token_type, choices.vocab_size or size


def _epochs(hours: float) -> int:
    """Return epochs for about 6000 batches of 30 s (small conf) or 30,000 of 200 s (medium), at three speeds."""
    seconds = 6000 * 30 if hours < SMALL_HOURS else 30_000 * 200
    return min(60, max(8, round(seconds / max(1.0, 3 * 3600 * hours))))


def _implausible(kept: list[SurveyedUtterance], rates: tuple[float, float]) -> tuple[Places, Places]:
    """Return the utterances whose text is too short or too long for their audio, the worst first."""
    found = []
    for each in kept:
        rate = len(each.text.replace(" ", "")) / each.seconds
        if not rates[0] <= rate <= rates[1]:
            reason = f"{rate:.1f} characters per second: {each.text[:50]!r} in {each.seconds:.1f} s"
            found.append((rate, each.utterance.where, reason))
    slow = [(where, reason) for rate, where, reason in sorted(found) if rate < rates[0]]
    fast = [(where, reason) for rate, where, reason in sorted(found, reverse=True) if rate > rates[1]]
    return slow, fast


def _warnings(found: Survey, kept: list[SurveyedUtterance], hours: float, alphabet: set[str]) -> list[str]:
    warnings = []
    speakers = {name: {k.utterance.speaker for k in kept if k.split == name} - {None} for name in SPLITS}
    texts = {name: [each.text for each in kept if each.split == name] for name in SPLITS}
    trained = set(texts["train"])
    for name in ("dev", "test"):
        if shared := sorted(map(str, speakers["train"] & speakers[name])):
            some = ", ".join(shared[:SHOWN])
            count = _number(len(shared), "speaker")
            warnings.append(f"{name} shares {count} with train, which lowers its WER: {some}")
        if again := sum(text in trained for text in texts[name]):
            count = _number(again, "transcript")
            warnings.append(f"{name} shares {count} with train, which lowers its WER")
    if len(found.speakers) == 1:
        warnings.append("there is one speaker: the system will not generalize to other speakers")
    if hours < 1:
        time = _time(3600 * hours)
        warnings.append(f"only {time} of training data: ./run.sh --init-from CHECKPOINT starts from a trained model")
    if unseen := alphabet - {char for text in trained for char in text}:
        warnings.append(f"characters of dev or test that train does not have: {' '.join(sorted(unseen)[:40])}")
    words = [word for each in kept for word in each.text.split()]
    if sum(map(len, words)) > 15 * len(words):
        remedy = "separate words by spaces for word error rates, or characters for character error rates"
        warnings.append(f"words are long, as in a script without spaces: {remedy}")
    tags = Counter(word for each in found.utterances for word in each.utterance.text.split() if TAG.match(word))
    if tags:
        most = ", ".join(f"{tag} {_number(count, 'time')}" for tag, count in tags.most_common(SHOWN))
        warnings.append(f"words that look like tags: {most}; --punctuation drop removes them")
    return warnings


# ---- report


def render(found: Survey, proposal: Proposal) -> str:
    """Return the survey and the proposal as text."""
    lines = [*_render_survey(found), "Left out (utterances):"]
    limit = DataConfig.max_utterance_seconds
    long = sum(each.seconds > limit for each in proposal.utterances if each.split == "train")
    dropped = [f"  {long} longer than {limit:g} s: training leaves them out (data.max_utterance_seconds)"] * (long > 0)
    lines += [*_render_places(proposal.left_out), *dropped] or ["  nothing"]
    low, high = proposal.rates
    lines.append(f"Suspicious transcripts (kept; {low:g} to {high:g} characters per second are plausible):")
    lines += _render_places({"slower": proposal.slow, "faster": proposal.fast}) or ["  none"]
    for title, pairs in (
        ("The same utterance twice", found.repeated),
        ("The same audio with different transcripts", found.contradictory),
    ):
        lines += [f"{title}: {len(pairs) or 'none'}", *(f"    {one} and {other}" for one, other in pairs[:SHOWN])]
    return "\n".join([*lines, *_render_proposal(proposal)]) + "\n"


def _render_survey(found: Survey) -> list[str]:
    utterances = found.utterances
    lengths = sorted(each.seconds for each in utterances)
    resampled = set(found.sampling_rates) != {SAMPLING_RATE}
    recordings = _number(found.recordings, "recording")
    return [
        f"{found.source} ({found.kind})",
        f"  {_number(len(utterances), 'utterance')} in {recordings}, {_time(found.seconds)}",
        *([f"  ignored for lack of a file: {_number(found.num_missing, 'recording')}"] if found.num_missing else []),
        f"  speakers: {_speakers(found)}",
        f"  sampling rates: {_counts(found.sampling_rates, ' Hz')}"
        + (f"; all are resampled to {SAMPLING_RATE} Hz" if resampled else ""),
        f"  channels: {_counts(found.channels)}" + ("; one of them is used (--channel)" if found.one_channel else ""),
        f"  audio: {found.audio_check}",
        f"  lengths: {lengths[0]:.2f} to {lengths[-1]:.2f} s, median {lengths[len(lengths) // 2]:.2f} s",
        *(f"    longest: {_show(each)}" for each in heapq.nlargest(3, utterances, key=lambda each: each.seconds)),
        *(f"    shortest: {_show(each)}" for each in heapq.nsmallest(3, utterances, key=lambda each: each.seconds)),
        f"  alphabet as written: {_alphabet(each.utterance.text for each in utterances)}",
    ]


def _render_proposal(proposal: Proposal) -> list[str]:
    rules, reasons = proposal.text_rules, proposal.reasons
    size = f" --vocab-size {proposal.vocab_size}" if proposal.token_type == "bpe" else ""
    lines = [
        "Proposed:",
        f"  --case {rules.case} ({reasons['case']})",
        f"  --punctuation {rules.punctuation} ({reasons['punctuation']})",
        f"  --digits {rules.digits} ({reasons['digits']})",
        f"  alphabet after normalization: {_alphabet(each.text for each in proposal.utterances)}",
        f"  --token-type {proposal.token_type}{size} ({reasons['tokens']})",
        f"  --split-by {proposal.split_rule.split_by} ({reasons['split']})",
    ]
    for name in SPLITS:
        members = [each for each in proposal.utterances if each.split == name]
        speakers = {each.utterance.speaker for each in members} - {None}
        time = _time(math.fsum(each.seconds for each in members))
        voices = _number(len(speakers), "speaker") if speakers else "unknown speakers"
        lines.append(f"    {name}: {_number(len(members), 'utterance')}, {time}, {voices}")
    conf = {
        "small": f"6 layers, {proposal.epochs} epochs",
        "medium": f"12 layers of 144 dimensions, {proposal.epochs} epochs",
        "large": "the published system, 12 layers of 256 dimensions",
    }
    lines.append(f"  conf: {proposal.size}, {conf[proposal.size]}")
    return lines + [f"Note: {warning}" for warning in proposal.warnings]


def _render_places(kinds: dict[str, Places]) -> list[str]:
    return [f"  {kind}: {len(places)}\n{show_places(places, '    ')}" for kind, places in kinds.items() if places]


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _show(each: SurveyedUtterance) -> str:
    return f"{each.seconds:.2f} s, {each.utterance.where}: {each.utterance.text.strip()[:50]!r}"


def _counts(counter: Counter[int], unit: str = "") -> str:
    return ", ".join(f"{value}{unit} in {_number(count, 'recording')}" for value, count in counter.most_common())


def _speakers(found: Survey) -> str:
    speakers = found.speakers
    if not speakers:
        return "unknown"
    unknown = len(found.utterances) - speakers.total()
    rest = f"; unknown for {_number(unknown, 'utterance')}" if unknown else ""
    fewest, most = min(speakers.values()), max(speakers.values())
    return f"{len(speakers)}, with {f'{fewest} to ' if fewest < most else ''}{_number(most, 'utterance')}{rest}"


def _alphabet(texts: Iterable[str]) -> str:
    chars = Counter(char for text in texts for char in text if not char.isspace())
    most = [char for char, _ in chars.most_common(80)]
    more = f" and {len(chars) - len(most)} more" if len(chars) > len(most) else ""
    return f"{_number(len(chars), 'character')}: {' '.join(sorted(most))}{more}"
