"""What was heard in a recording, and the formats in which it is written: text, JSON lines, SRT, CTM."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from splitformer.data.tokenizer import BLANK, SOS_EOS, UNKNOWN
from splitformer.speech.segmentation import Word, join_words

FORMATS = ("text", "jsonl", "srt", "ctm")
OUTPUT_FRAME = 0.04
"""Seconds: four feature frames."""
WORD_BEGIN = "▁"
UNKNOWN_WORD = "⁇"
"""As sentencepiece spells it."""

# What fits on a screen and can be read in time: two lines of 42 characters, at most 7 seconds.
CUE_SECONDS, CUE_LINE, CUE_LINES, CUE_PAUSE = 7.0, 42, 2, 1.0
SHORTEST_CUE = 0.5


@dataclass(frozen=True)
class Segment:
    """A piece of a recording, as it was heard.

    start, end: seconds in the recording.
    words: with their times.  tokens, timestamps: pieces, and the seconds at which they start.
    confidence: see docs/transcribe.md; 0 to 1.
    exit_layer: where it left the encoder.  milliseconds: from its batch's setting out until its words were there.
    overlap: seconds that the segment before holds too.
    """

    start: float
    end: float
    words: list[Word]
    tokens: list[str]
    timestamps: list[float]
    confidence: float
    exit_layer: int
    milliseconds: float
    overlap: float = 0.0

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True)
class Transcript:
    """Of one recording. name: as it was given; seconds: its length."""

    name: str
    seconds: float
    segments: list[Segment] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.words)


# -------------------------------------------------------------------------------------- tokens to words


def timed_words(
    pieces: Sequence[str], starts: Sequence[float], words: Sequence[str] | None = None
) -> list[Word]:
    """Words, spelled by pieces as the tokenizer spells them, from the start of the first piece that has letters to the
    end of the last one's frame.

    Args:
      pieces, starts: the tokens, and the seconds at which they start.
      words: where a lexicon chose them. They get the times of what the pieces spell; where there are more or fewer,
        equal parts of the time between first and last token.
    """
    spelled: list[Word] = []
    begin = True
    for piece, start in zip(pieces, starts, strict=True):
        if piece in (BLANK, SOS_EOS):
            continue
        if piece == UNKNOWN:
            spelled.append(Word(UNKNOWN_WORD, start, start + OUTPUT_FRAME))
            begin = True
            continue
        begin = begin or piece.startswith(WORD_BEGIN)
        text = piece.replace(WORD_BEGIN, "")
        if not text:
            continue
        if begin:
            spelled.append(Word(text, start, start + OUTPUT_FRAME))
        else:
            spelled[-1] = Word(spelled[-1].text + text, spelled[-1].start, start + OUTPUT_FRAME)
        begin = False
    if words is None:
        return spelled
    if len(words) == len(spelled):
        return [word._replace(text=text) for text, word in zip(words, spelled)]
    if not starts:
        return []  # no word without a token
    first, last = starts[0], starts[-1] + OUTPUT_FRAME
    step = (last - first) / max(1, len(words))
    return [Word(text, first + i * step, first + (i + 1) * step) for i, text in enumerate(words)]


def join_segments(segments: Sequence[Segment]) -> list[Segment]:
    """Consecutive segments of a recording, less what overlapping ones have twice."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.overlap and joined:
            start, end = segment.start, segment.start + segment.overlap
            count, first = join_words(joined[-1].words, segment.words, start, end)
            joined[-1] = _less(joined[-1], joined[-1].words[:count])
            segment = _less(segment, segment.words[first:])
        joined.append(segment)
    return joined


def _less(segment: Segment, words: list[Word]) -> Segment:
    """With these of its words alone, and their tokens."""
    if len(words) == len(segment.words):
        return segment
    begin, end = (words[0].start - 1e-6, words[-1].end - 1e-6) if words else (0.0, 0.0)
    kept = [(t, s) for t, s in zip(segment.tokens, segment.timestamps) if begin <= s < end]
    return replace(segment, words=words, tokens=[t for t, _ in kept], timestamps=[s for _, s in kept])


# ------------------------------------------------------------------------------------------------ formats


def printable(name: str) -> str:
    """A name as one piece of a line: what would break a line, or steer a terminal, is escaped as in Python."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)


def as_text(transcript: Transcript, with_name: bool) -> str:
    """One line: the text, or the name, a tab and the text."""
    return f"{printable(transcript.name)}\t{transcript.text}\n" if with_name else f"{transcript.text}\n"


def as_json(transcript: Transcript) -> str:
    """One line."""
    segments = [
        {
            "start": round(s.start, 3),
            "end": round(s.end, 3),
            "text": s.text,
            "words": [{"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in s.words],
            "tokens": s.tokens,
            "timestamps": [round(each, 3) for each in s.timestamps],
            "confidence": round(s.confidence, 4),
            "exit_layer": s.exit_layer,
            "milliseconds": round(s.milliseconds, 1),
        }
        for s in transcript.segments
    ]
    contents = {
        "audio": transcript.name,
        "duration": round(transcript.seconds, 3),
        "text": transcript.text,
        "segments": segments,
    }
    # names that are no UTF-8 hold surrogates, which JSON can carry as escapes alone
    ascii_only = any("\ud800" <= c <= "\udfff" for c in transcript.name)
    return json.dumps(contents, ensure_ascii=ascii_only) + "\n"


def as_ctm(transcript: Transcript) -> str:
    """A line a word: name, channel, start, duration, word, its segment's confidence (NIST's format, as in Kaldi)."""
    name = _ctm_field(transcript.name)
    return "".join(
        f"{name} 1 {word.start:.2f} {max(0.01, word.end - word.start):.2f} {_ctm_field(word.text)} {s.confidence:.2f}\n"
        for s in transcript.segments
        for word in s.words
    )


def _ctm_field(text: str) -> str:
    """Without whitespace, and no comment (`;;`): such characters, and %, as %XX of their UTF-8 bytes."""
    return "".join(
        "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape"))
        if c in "%;" or c.isspace() or not c.isprintable()
        else c
        for c in text
    )


def as_srt(transcript: Transcript) -> str:
    """Numbered subtitles of at most two lines of 42 characters and, but for a long word, seven seconds."""
    blocks = []
    cues = list(_cues(word for segment in transcript.segments for word in segment.words))
    for number, cue in enumerate(cues, 1):
        start = cue[0].start
        # a word's end is that of its last token's frame; a cue stays long enough to be seen
        end = max(cue[-1].end, start + SHORTEST_CUE)
        if number < len(cues):
            end = max(min(end, cues[number][0].start), start + 0.001)
        lines = "\n".join(_lines([word.text for word in cue]))
        blocks.append(f"{number}\n{_clock(start)} --> {_clock(end)}\n{lines}\n")
    return "\n".join(blocks)


def _cues(words: Iterable[Word]) -> Iterable[list[Word]]:
    cue: list[Word] = []
    for word in words:
        full = cue and (
            word.start - cue[-1].end > CUE_PAUSE
            or word.end - cue[0].start > CUE_SECONDS
            or len(_lines([each.text for each in [*cue, word]])) > CUE_LINES
        )
        if full:
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _lines(words: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= CUE_LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _clock(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    return (
        f"{milliseconds // 3_600_000:02d}:{milliseconds // 60_000 % 60:02d}:"
        f"{milliseconds // 1000 % 60:02d},{milliseconds % 1000:03d}"
    )
