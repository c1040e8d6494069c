"""Survey own data before anything is made of them: what they contain, and what is wrong with them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from lhotse import Recording
from tqdm import tqdm

from splitformer.corpora.manifests import spread
from splitformer.corpora.rules import LONGEST, TextRules, supervision_of
from splitformer.corpora.sources import ReadOptions, Source, SourceError, read_source
from splitformer.corpora.sources.audio import check_audio
from splitformer.corpora.sources.base import LeftOut, Utterance

FEWEST = 10
"""A source with fewer usable utterances is refused."""
SHOWN = 5
"""Number of examples shown for each problem."""
DECODED_HOURS = 20.0
"""Hours that are decoded completely; of larger sources, a sample of this size."""

CheckAudio = Literal["all", "sample", "headers"]
Places = list[tuple[str, str]]
"""[(file and line, reason)]"""


class SurveyedUtterance(NamedTuple):
    """An utterance with usable audio. recording: its id; seconds: of the utterance; text, split: as proposed."""

    utterance: Utterance
    recording: str
    seconds: float
    text: str = ""
    split: str = ""


@dataclass
class Survey:
    """The contents of a source.

    left_out: {kind: places}.
    repeated, contradictory: pairs of places with the same audio, and the same text or not.
    sampling_rates, channels: {value: recordings}.
    one_channel: whether recordings have several channels, and the source names none.
    audio_check: what was decoded; decoded_all: whether all of it was.
    """

    source: Path
    kind: str
    utterances: list[SurveyedUtterance] = field(default_factory=list)
    left_out: defaultdict[str, Places] = field(default_factory=lambda: defaultdict(list))
    repeated: list[tuple[str, str]] = field(default_factory=list)
    contradictory: list[tuple[str, str]] = field(default_factory=list)
    recordings: int = 0
    num_missing: int = 0
    sampling_rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    one_channel: bool = False
    audio_check: str = ""
    decoded_all: bool = False

    @property
    def seconds(self) -> float:
        return math.fsum(each.seconds for each in self.utterances)

    @property
    def speakers(self) -> Counter[str]:
        """{speaker: utterances}, of those with a speaker."""
        return Counter(each.utterance.speaker for each in self.utterances if each.utterance.speaker)


def survey(source: str | Path, options: ReadOptions | None = None, check: CheckAudio | None = None) -> Survey:
    """Read a source and check its audio.

    Args:
      check: decode all audio, a sample of it, or only headers and the ends of files (default: all of it up to
        DECODED_HOURS, else a sample).
    Raises:
      SourceError: it cannot be read, or there is too little to train on.
    """
    options = options or ReadOptions()
    read = read_source(source, options)
    found = Survey(Path(source), read.kind, num_missing=read.num_missing)
    same: defaultdict[tuple, list[tuple[Path, str, str]]] = defaultdict(list)
    too_long = 0.0
    for recording, audio in zip(read.recordings, _checked_audio(read, check, found)):
        if isinstance(audio, Recording) and not recording.utterances:
            audio = LeftOut("no transcript", f"recording {recording.id} has no utterance")
        if isinstance(audio, LeftOut):
            places = [utterance.where for utterance in recording.utterances] or [recording.where]
            found.left_out[audio.kind] += [(where, audio.reason) for where in places]
            continue
        found.recordings += 1
        found.sampling_rates[audio.sampling_rate] += 1
        found.channels[audio.num_channels] += 1
        for utterance in recording.utterances:
            found.one_channel |= audio.num_channels > 1 and utterance.channel is None
            result = supervision_of(utterance, audio, TextRules(), options.channel)
            if isinstance(result, LeftOut):
                found.left_out[result.kind].append((utterance.where, result.reason))
                if result.kind == "too long":
                    too_long += (utterance.end or audio.duration) - (utterance.start or 0.0)
                continue
            found.utterances.append(SurveyedUtterance(utterance, audio.id, result.duration))
            key = (audio.num_samples, result.start, result.duration, result.channel)
            same[key].append((recording.path, utterance.where, utterance.text))
    _find_repeated(same, found)
    _check_amount(found, too_long)
    return found


def _checked_audio(read: Source, check: CheckAudio | None, found: Survey) -> list[Recording | LeftOut]:
    """Check all audio, and note in `found` what was decoded."""
    recordings = read.recordings
    results = list(tqdm(check_audio(recordings), desc="audio headers", total=len(recordings), unit=" recordings"))
    seconds = {number: each.duration for number, each in enumerate(results) if isinstance(each, Recording)}
    chosen = [] if check == "headers" else list(seconds)
    hours = sum(seconds.values()) / 3600
    if check != "all" and hours > DECODED_HOURS:
        chosen = spread(chosen, max(1, round(len(chosen) * DECODED_HOURS / hours)))
    decoded = check_audio([recordings[number] for number in chosen], decode=True)
    for number, result in tqdm(zip(chosen, decoded), desc="audio", total=len(chosen), unit=" recordings"):
        results[number] = result
    found.decoded_all = check != "headers" and len(chosen) == len(seconds)
    damaged = sum(isinstance(each, LeftOut) and each.kind == "damaged audio" for each in results)
    checked = damaged + sum(isinstance(each, Recording) for each in results)
    found.audio_check = f"{checked} files, {damaged} of them damaged"
    if found.decoded_all:
        found.audio_check += "; all were decoded"
    else:
        found.audio_check += f"; {len(chosen)} were decoded, of the others headers and ends were read "
        found.audio_check += "(--check-audio all decodes all)"
    return results


def _find_repeated(same: Mapping[tuple, list[tuple[Path, str, str]]], found: Survey) -> None:
    """Note utterances with the same audio. same: {length and span: [(audio file, file and line, text)]}."""
    digests: dict[Path, str] = {}
    for group in same.values():
        first: dict[object, tuple[str, str]] = {}
        one_file = len({path for path, _, _ in group}) == 1
        for path, where, text in group if len(group) > 1 else ():
            if not one_file and path not in digests:
                digests[path] = _digest(path)
            first_where, first_text = first.setdefault(path if one_file else digests[path], (where, text))
            if first_where != where:
                (found.repeated if text == first_text else found.contradictory).append((first_where, where))


def _digest(path: Path) -> str:
    """Return a hash of a file's size, first and last mebibyte."""
    with open(path, "rb") as file:
        start = file.read(1 << 20)
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 20)))
        return hashlib.sha256(b"%d" % size + start + file.read()).hexdigest()


def _check_amount(found: Survey, too_long: float) -> None:
    """Raise SourceError if most audio is missing, or much of it is too long, or too few utterances are usable."""
    no_audio = found.left_out.get("missing audio", []) + found.left_out.get("damaged audio", [])
    total = len(found.utterances) + sum(map(len, found.left_out.values()))
    if 2 * len(no_audio) > total:
        raise SourceError(
            f"{found.source}: {len(no_audio)} of {total} utterances have no usable audio:\n{show_places(no_audio)}\n"
            "--audio-dir DIR sets the folder of relative paths; --skip-missing ignores files that do not exist"
        )
    if too_long > 0.1 * (too_long + found.seconds):
        raise SourceError(
            f"{found.source}: {too_long / 3600:.1f} hours are utterances of more than {LONGEST:.0f} seconds:\n"
            f"{show_places(found.left_out['too long'])}\nGive the times of the utterances (columns start and end of a "
            "table, a Kaldi `segments`, Lhotse supervisions), or cut the recordings, for instance with a forced aligner"
        )
    check_enough(found.source, len(found.utterances), found.left_out)


def check_enough(source: Path, usable: int, left_out: Mapping[str, Places]) -> None:
    """Raise SourceError if there are too few usable utterances."""
    if usable < FEWEST:
        reasons = "".join(f"\n{kind}:\n{show_places(places)}" for kind, places in left_out.items())
        raise SourceError(
            f"{source}: {usable} usable utterances are too few to train and test with; {FEWEST} are the minimum, and "
            f"an hour or more is useful{reasons}"
        )


def show_places(places: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Return lines with the first SHOWN places."""
    shown = [f"{indent}{where}: {reason}" for where, reason in places[:SHOWN]]
    return "\n".join(shown + [f"{indent}and {len(places) - SHOWN} more"] * (len(places) > SHOWN))
