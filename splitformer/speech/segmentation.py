"""Long recordings cut into pieces that a model can take, and the words of the pieces put together again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_SEGMENT = 25.0
OVERLAP = 1.0
MIN_PAUSE = 0.2
"""Seconds. A quiet stretch that is shorter may be within a word: the closure of a plosive takes up to 0.15 s."""
CONTRAST = 10.0
"""Decibels between the loud and the quiet part of a stretch; with less, nothing tells speech from silence."""
SILENCE_BELOW = 40.0
"""Decibels below the recording's loud parts: silence, whatever is around it."""


class Piece(NamedTuple):
    """A span of a recording in seconds."""

    start: float
    end: float
    overlap: float = 0.0
    """seconds that the piece before holds too; 0 where the cut is in a silence"""


def plan_pieces(
    decibels: np.ndarray,
    hop_seconds: float,
    seconds: float,
    max_segment: float = MAX_SEGMENT,
    overlap: float = OVERLAP,
) -> list[Piece]:
    """Cut a recording into pieces of at most `max_segment` seconds, which together cover all but long silences.

    A piece ends in the middle of the longest pause in the second half of what it may hold. Where there is none, it is
    as long as may be and the next piece starts `overlap` seconds before its end. What is a pause is told from the
    levels around: at most 0.3 of the way up from the quiet (10th percentile) to the loud (95th), or SILENCE_BELOW the
    loud parts of the recording. A piece that has nothing louder than the latter is left out: in mere silence a model
    may hear words. A recording that needs no cut is one piece, whatever it holds.

    Args:
      decibels: (hops,), the level of each hop.
      seconds: of the whole recording.
    Raises:
      ValueError: max_segment is less than 1 s, or overlap is not in 0 to half of it.
    """
    check_limits(max_segment, overlap)
    pieces: list[Piece] = []
    longest = int(max_segment / hop_seconds + 1e-6)
    shared = int(overlap / hop_seconds + 1e-6)
    silence = np.percentile(decibels, 99) - SILENCE_BELOW if len(decibels) else 0.0
    start, shares = 0, 0
    while seconds - start * hop_seconds > max_segment:
        limit = start + longest
        cut = _pause(decibels[start:limit], longest // 2, round(MIN_PAUSE / hop_seconds), silence)
        end = limit if cut is None else start + cut
        pieces.append(Piece(start * hop_seconds, end * hop_seconds, shares * hop_seconds))
        shares = shared if cut is None else 0
        start = end - shares
    pieces.append(Piece(start * hop_seconds, seconds, shares * hop_seconds))
    if len(pieces) == 1:
        return pieces

    def has_sound(piece: Piece) -> bool:
        hops = decibels[round(piece.start / hop_seconds) : round(piece.end / hop_seconds)]
        return bool((hops > silence).any())

    return [piece for piece in pieces if has_sound(piece)]


def slice_pieces(
    blocks: Iterable[np.ndarray], sampling_rate: int, pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its samples (n,), of blocks (n,) that are read once and no further ahead than needed.

    What lies before, between and behind them is passed over. A piece that ends with the recording may be a sample
    shorter or longer: its seconds, in samples of another rate, are rounded.
    """
    blocks = iter(blocks)
    buffer, position = np.zeros(0, np.float32), 0  # of the buffer's first sample
    for piece in pieces:
        first, last = round(piece.start * sampling_rate), round(piece.end * sampling_rate)
        while True:
            passed = min(first - position, len(buffer))
            buffer, position = buffer[passed:], position + passed
            if position + len(buffer) >= last:
                break
            block = next(blocks, None)
            if block is None:
                break
            buffer = np.concatenate([buffer, block])
        yield piece, buffer[: last - first].copy()


def check_limits(max_segment: float, overlap: float) -> None:
    """Raises ValueError where nothing can be cut so."""
    if not 1.0 <= max_segment < float("inf"):
        raise ValueError(f"a segment of at most {max_segment} s: give 1 s or more, such as {MAX_SEGMENT:g}")
    if not 0.0 <= overlap <= max_segment / 2:
        raise ValueError(f"an overlap of {overlap} s: give 0 to half of the longest segment, {max_segment / 2:g} s")


def _pause(decibels: np.ndarray, first: int, shortest: int, silence: float) -> int | None:
    """The hop in the middle of the longest pause of (hops,) from `first` on; of equals the last; None without one."""
    quiet_level, loud_level = np.percentile(decibels, (10, 95))
    threshold = silence
    if loud_level - quiet_level >= CONTRAST:
        threshold = max(threshold, quiet_level + 0.3 * (loud_level - quiet_level))
    quiet = np.concatenate([[False], decibels[first:] <= threshold, [False]])
    edges = np.flatnonzero(quiet[1:] != quiet[:-1]).reshape(-1, 2)  # where stretches begin, and end
    if not len(edges):
        return None
    begin, end = max(edges.tolist(), key=lambda each: (each[1] - each[0], each[0]))
    return first + (begin + end) // 2 if end - begin >= shortest else None


# ------------------------------------------------------------------------------------------------- words


class Word(NamedTuple):
    """A word with its place in the recording, in seconds."""

    text: str
    start: float
    end: float


SAME_WORD = 0.25
"""Seconds by which the same word may start apart in two pieces."""
SAME_PLACE = 0.1
"""Seconds within which two words that differ are still two readings of one."""


def join_words(left: Sequence[Word], right: Sequence[Word], start: float, end: float) -> tuple[int, int]:
    """How many words of `left` to keep, and the first of `right`, where both heard `start` to `end`.

    Each piece is heard badly at its own edge. So the left piece speaks up to the middle of the overlap and the right
    one from there on. Where both have the same word, the one nearest to the middle is where they change, which keeps a
    word that stands across the middle from being said twice, or by neither.

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
    if count < len(left) and first > 0 and _one_place(left[count], right[first - 1]):
        count += 1  # a word at the middle, of which each says that it is the other's
    elif count > 0 and first < len(right) and _one_place(left[count - 1], right[first]):
        first += 1  # both say that it is theirs
    while count > 0 and first < len(right) and centres[1][first] < left[count - 1].end:
        first += 1  # what is one word to the left may be two to the right
    return count, first


def _one_place(a: Word, b: Word) -> bool:
    shared = min(a.end, b.end) - max(a.start, b.start)
    shorter = min(a.end - a.start, b.end - b.start)
    return abs(a.start - b.start) <= SAME_PLACE or shared > shorter / 2
