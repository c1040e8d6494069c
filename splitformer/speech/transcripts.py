"""Transcripts, and the formats in which they are written: text, JSON lines, SRT, CTM."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import quote

from splitformer.config import BLANK, SOS_EOS, UNKNOWN
from splitformer.model.subsampling import OUTPUT_FRAME
from splitformer.speech.segmentation import Word, join_words

Format = Literal["text", "jsonl", "srt", "ctm"]
WORD_BEGIN = "▁"
UNKNOWN_WORD = "⁇"
"""Sentencepiece's text for an unknown token."""

# A subtitle fits on a screen and can be read in time: two lines of 42 characters, at most 7 seconds.
CUE_SECONDS, CUE_LINE, CUE_LINES, CUE_PAUSE = 7.0, 42, 2, 1.0
SHORTEST_CUE = 0.5


@dataclass(frozen=True)
class Segment:
    """A piece of a recording with the words in it. Times are in seconds of the recording.

    start, end: the piece.
    words: `Word`s with their own start and end.
    tokens, timestamps: pieces of the vocabulary, and the times at which they start.
    confidence: 0 to 1; the geometric mean of the search's score per output frame.
    exit: the exit that was searched, named by its encoder layer.
    milliseconds: of computing, from the start of its batch until its words were found.
    overlap: seconds at the start that the segment before also covers.
    """

    start: float
    end: float
    words: list[Word]
    tokens: list[str]
    timestamps: list[float]
    confidence: float
    exit: int
    milliseconds: float
    overlap: float = 0.0

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True)
class Transcript:
    """The segments of one recording; iterating yields them. A recording shorter than one output frame has none.

    name: as it was given.  seconds: the length of the recording.
    """

    name: str
    seconds: float
    segments: list[Segment]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.words)


# ---- tokens to words


def timed_words(pieces: Sequence[str], starts: Sequence[float], words: Sequence[str] | None = None) -> list[Word]:
    """Return the words that pieces spell, from the start of a word's first piece to the end of its last one's frame.

    Args:
      pieces, starts: the tokens, and the seconds at which they start.
      words: where a lexicon chose them. They take the times of the words that the pieces spell or, if their numbers
        differ, equal parts of the time between the first and the last token.
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
    """Return consecutive segments of a recording without the words that overlapping ones have twice."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.overlap and joined:
            start, end = segment.start, segment.start + segment.overlap
            count, first = join_words(joined[-1].words, segment.words, start, end)
            joined[-1] = _with_words(joined[-1], joined[-1].words[:count])
            segment = _with_words(segment, segment.words[first:])
        joined.append(segment)
    return joined


def _with_words(segment: Segment, words: list[Word]) -> Segment:
    """The segment with only these of its words, and their tokens."""
    if len(words) == len(segment.words):
        return segment
    begin, end = (words[0].start - 1e-6, words[-1].end - 1e-6) if words else (0.0, 0.0)
    kept = [(t, s) for t, s in zip(segment.tokens, segment.timestamps) if begin <= s < end]
    return replace(segment, words=words, tokens=[t for t, _ in kept], timestamps=[s for _, s in kept])


# ---- formats


def written(transcript: Transcript, format: Format, with_name: bool = True) -> str:
    """Return the transcript in a format.

    text: a line with the name and a tab (`with_name`) and the text.  jsonl: a line with a JSON object.
    srt: subtitles.  ctm: a line for each word.
    """
    if format == "text":
        return (f"{printable(transcript.name)}\t" if with_name else "") + f"{transcript.text}\n"
    return {"jsonl": _json_line, "srt": _srt, "ctm": _ctm}[format](transcript)


def printable(name: str) -> str:
    """Escape, as Python does, the characters of a name that would break a line or control a terminal."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)


def _json_line(transcript: Transcript) -> str:
    segments = [
        {
            "start": round(s.start, 3),
            "end": round(s.end, 3),
            "text": s.text,
            "words": [{"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in s.words],
            "tokens": s.tokens,
            "timestamps": [round(each, 3) for each in s.timestamps],
            "confidence": round(s.confidence, 4),
            "exit": s.exit,
            "milliseconds": round(s.milliseconds, 1),
        }
        for s in transcript
    ]
    contents = {"audio": transcript.name, "duration": round(transcript.seconds, 3), "text": transcript.text}
    # JSON can hold names that are not UTF-8 only as escapes
    return json.dumps({**contents, "segments": segments}, ensure_ascii=not transcript.name.isprintable()) + "\n"


def _ctm(transcript: Transcript) -> str:
    """NIST's format, as in Kaldi: name, channel, start, duration, word, and the confidence of its segment."""
    name = _ctm_field(transcript.name)
    return "".join(
        f"{name} 1 {word.start:.2f} {max(0.01, word.end - word.start):.2f} {_ctm_field(word.text)} {s.confidence:.2f}\n"
        for s in transcript
        for word in s.words
    )


def _ctm_field(text: str) -> str:
    """Write whitespace, `;` (which starts a comment) and % as %XX of their UTF-8 bytes."""
    special = (c in "%;" or c.isspace() or not c.isprintable() for c in text)
    return "".join(quote(c, safe="", errors="surrogateescape") if s else c for c, s in zip(text, special))


def _srt(transcript: Transcript) -> str:
    """Numbered subtitles of at most two lines of 42 characters and seven seconds, unless one word is longer."""
    blocks = []
    cues = list(_cues(word for segment in transcript for word in segment.words))
    for number, cue in enumerate(cues, 1):
        start = cue[0].start
        end = max(cue[-1].end, start + SHORTEST_CUE)
        if number < len(cues):
            end = max(min(end, cues[number][0].start), start + 0.001)
        blocks.append(f"{number}\n{_clock(start)} --> {_clock(end)}\n" + "\n".join(_lines(cue)) + "\n")
    return "\n".join(blocks)


def _cues(words: Iterable[Word]) -> Iterator[list[Word]]:
    cue: list[Word] = []
    for word in words:
        if cue and (
            word.start - cue[-1].end > CUE_PAUSE
            or word.end - cue[0].start > CUE_SECONDS
            or len(_lines([*cue, word])) > CUE_LINES
        ):
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _lines(words: Sequence[Word]) -> list[str]:
    text = " ".join(word.text for word in words)
    return textwrap.wrap(text, CUE_LINE, break_long_words=False, break_on_hyphens=False)


def _clock(seconds: float) -> str:
    rest, milliseconds = divmod(round(1000 * seconds), 1000)
    minutes, seconds = divmod(rest, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d},{milliseconds:03d}"
