"""Cutting long recordings into pieces that a model can process, and joining the words of the pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from splitformer.errors import UserError
from splitformer.speech.audio import Levels

MAX_SEGMENT = 25.0
OVERLAP = 1.0
MIN_PAUSE = 0.2
"""Seconds. A shorter quiet stretch may lie within a word: the closure of a plosive takes up to 0.15 s."""
CONTRAST = 10.0
"""Decibels between the loud and the quiet parts of a stretch; with less, its levels do not show where pauses are."""
SILENCE_BELOW = 40.0
"""Decibels below the loud parts of the recording that count as silence everywhere."""


class Piece(NamedTuple):
    """A span of a recording in seconds."""

    start: float
    end: float
    overlap: float = 0.0
    """seconds at its beginning that the piece before also covers; 0 after a cut in a pause"""


def plan_pieces(levels: Levels, max_segment: float = MAX_SEGMENT, overlap: float = OVERLAP) -> list[Piece]:
    """Cut a recording into pieces of at most `max_segment` seconds that cover all of it but long silences.

    A piece ends in the middle of the longest pause in the second half of its maximum length. If there is none, it has
    the maximum length, and the next piece starts `overlap` seconds before its end. A pause is quieter than the level
    0.3 of the way up from the quiet (10th percentile) to the loud parts (95th) around it, or SILENCE_BELOW the loud
    parts of the recording. A piece that is nowhere louder than the latter is left out, because models may find words
    in silence. A recording that needs no cut is one piece, whatever it holds.

    Raises:
      UserError: max_segment is less than 1 s, or overlap is not between 0 and half of it.
    """
    check_limits(max_segment, overlap)
    decibels, hop, seconds = levels
    longest, shared = int(max_segment / hop + 1e-6), int(overlap / hop + 1e-6)
    silence = np.percentile(decibels, 99) - SILENCE_BELOW if len(decibels) else 0.0
    pieces: list[Piece] = []
    start, shares = 0, 0
    while seconds - start * hop > max_segment:
        cut = _pause(decibels[start : start + longest], longest // 2, round(MIN_PAUSE / hop), silence)
        end = start + (longest if cut is None else cut)
        pieces.append(Piece(start * hop, end * hop, shares * hop))
        shares = shared if cut is None else 0
        start = end - shares
    pieces.append(Piece(start * hop, seconds, shares * hop))
    if len(pieces) == 1:
        return pieces
    return [p for p in pieces if (decibels[round(p.start / hop) : round(p.end / hop)] > silence).any()]


def check_limits(max_segment: float, overlap: float) -> None:
    """Raise UserError unless `plan_pieces` can cut recordings with these limits."""
    if not 1.0 <= max_segment < float("inf"):
        raise UserError(f"a segment of at most {max_segment} s: give 1 s or more, such as {MAX_SEGMENT:g}")
    if not 0.0 <= overlap <= max_segment / 2:
        raise UserError(f"an overlap of {overlap} s: give 0 to half of the longest segment, {max_segment / 2:g} s")


def _pause(decibels: np.ndarray, first: int, shortest: int, silence: float) -> int | None:
    """Return the hop in the middle of the longest pause in (hops,) from `first` on (the last if equal), or None."""
    quiet_level, loud_level = np.percentile(decibels, (10, 95))
    threshold = silence
    if loud_level - quiet_level >= CONTRAST:
        threshold = max(threshold, quiet_level + 0.3 * (loud_level - quiet_level))
    quiet = np.concatenate([[False], decibels[first:] <= threshold, [False]])
    edges = np.flatnonzero(quiet[1:] != quiet[:-1]).reshape(-1, 2)  # where quiet stretches begin and end
    if not len(edges):
        return None
    begin, end = max(edges.tolist(), key=lambda each: (each[1] - each[0], each[0]))
    return first + (begin + end) // 2 if end - begin >= shortest else None


def slice_pieces(
    blocks: Iterable[np.ndarray], sampling_rate: int, pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yield each piece with its samples (n,), cut from blocks (n,) that are read once and only as far as needed.

    A piece at the end of the recording may be a sample shorter or longer, because its seconds are rounded to samples
    of another rate.
    """
    blocks = iter(blocks)
    buffer, position = np.zeros(0, np.float32), 0  # of the buffer's first sample
    for piece in pieces:
        first, last = round(piece.start * sampling_rate), round(piece.end * sampling_rate)
        while True:
            passed = min(first - position, len(buffer))
            buffer, position = buffer[passed:], position + passed
            if position + len(buffer) >= last or (block := next(blocks, None)) is None:
                break
            buffer = np.concatenate([buffer, block])
        yield piece, buffer[: last - first].copy()


# ---- words


class Word(NamedTuple):
    """A word with its place in the recording, in seconds. It ends with the frame of its last token."""

    text: str
    start: float
    end: float


SAME_WORD = 0.25
"""Largest difference in seconds between the starts of one word in two pieces."""
SAME_PLACE = 0.1
"""Two different words whose starts differ by at most so many seconds are two readings of one."""


def join_words(left: Sequence[Word], right: Sequence[Word], start: float, end: float) -> tuple[int, int]:
    """Return how many words of `left` to keep and the first word of `right`, where both pieces cover `start` to `end`.

    Each piece is recognised badly at its own edge. So the words are taken from the left piece up to the middle of the
    overlap and from the right piece after it. Where both have the same word, they change at the one nearest to the
    middle, so that a word across the middle is neither doubled nor lost.

    Args:
      left, right: words in the order of their times, in seconds of the recording.
    """
    middle = (start + end) / 2
    centres = [[(word.start + word.end) / 2 for word in words] for words in (left, right)]
    common = [
        (abs((centres[0][i] + centres[1][j]) / 2 - middle), i, j)
        for i, a in enumerate(left)
        for j, b in enumerate(right)
        if a.text == b.text
        and abs(a.start - b.start) <= SAME_WORD
        and a.end > start - SAME_WORD
        and b.start < end + SAME_WORD
    ]
    if common:
        _, i, j = min(common)
        return i + 1, j + 1
    count = sum(centre < middle for centre in centres[0])
    first = sum(centre < middle for centre in centres[1])
    if count < len(left) and first > 0 and _same_place(left[count], right[first - 1]):
        count += 1  # a word at the middle that neither piece would keep
    elif count > 0 and first < len(right) and _same_place(left[count - 1], right[first]):
        first += 1  # a word that both pieces would keep
    while count > 0 and first < len(right) and centres[1][first] < left[count - 1].end:
        first += 1  # one word of the left piece may be two of the right
    return count, first


def _same_place(a: Word, b: Word) -> bool:
    shared = min(a.end, b.end) - max(a.start, b.start)
    shorter = min(a.end - a.start, b.end - b.start)
    return abs(a.start - b.start) <= SAME_PLACE or shared > shorter / 2
