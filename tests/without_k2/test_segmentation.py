"""Cutting long recordings into pieces, on levels of many kinds, and joining words that two pieces have in common."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from splitformer.errors import UserError
from splitformer.speech.audio import Levels
from splitformer.speech.segmentation import Piece, Word, join_words, plan_pieces, slice_pieces

HOP = 0.01


def decibels(seed: int, seconds: float, pauses: bool) -> np.ndarray:
    """Speech around -25 dB, with pauses around -60 dB or none."""
    random = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds / HOP:
        parts.append(random.normal(-25, 4, random.integers(50, 400)))
        if pauses:
            parts.append(random.normal(-60, 2, random.integers(20, 80)))
    return np.concatenate(parts)[: round(seconds / HOP)].astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pauses", [True, False])
@pytest.mark.parametrize(("longest", "overlap"), [(25.0, 1.0), (5.0, 0.5), (3.0, 0.0)])
def test_pieces_are_short_enough_and_cover_everything(seed, pauses, longest, overlap):
    levels = Levels(decibels(seed, 93.7, pauses), HOP, 93.7)
    pieces = plan_pieces(levels, longest, overlap)
    assert pieces[0].start == 0.0 and pieces[-1].end == pytest.approx(93.7)
    assert all(0 < piece.end - piece.start <= longest + 1e-6 for piece in pieces)
    for before, after in itertools.pairwise(pieces):
        assert after.start == pytest.approx(before.end - after.overlap)
        if pauses and longest > 10.0:  # there is a pause in each second half: nothing overlaps
            assert after.overlap == 0.0
        if after.overlap == 0.0 and overlap:
            assert levels.decibels[round(before.end / HOP) - 1] < -45
        else:
            assert after.overlap == pytest.approx(overlap)


def test_a_short_recording_is_one_piece():
    assert plan_pieces(Levels(decibels(0, 24.9, True), HOP, 24.9)) == [Piece(0.0, 24.9)]
    assert plan_pieces(Levels(np.zeros(0, np.float32), HOP, 0.004)) == [Piece(0.0, 0.004)]


def test_long_silence_is_left_out():
    silence = np.full(12000, -90.0)
    levels = np.concatenate([decibels(0, 30, True), silence, decibels(1, 30, True)]).astype(np.float32)
    pieces = plan_pieces(Levels(levels, HOP, 180.0))
    assert 60 <= sum(piece.end - piece.start for piece in pieces) < 120
    for start, end in ((0.0, 29.0), (150.5, 180.0)):  # all speech is in a piece
        covered = [piece for piece in pieces if piece.start < end and piece.end > start]
        assert covered[0].start <= start and covered[-1].end >= end - 1e-6


@pytest.mark.parametrize("block", [100, 777, 16000, 10**6])
def test_slices_are_the_samples_of_their_pieces(block):
    samples = np.arange(30000, dtype=np.float32)
    pieces = [Piece(0.1, 1.0), Piece(0.8, 1.3, 0.2), Piece(1.6, 3.0)]
    blocks = (samples[first : first + block] for first in range(0, len(samples), block))
    slices = list(slice_pieces(blocks, 10000, pieces))
    assert [piece for piece, _ in slices] == pieces
    for piece, got in slices:
        assert np.array_equal(got, samples[round(piece.start * 10000) : round(piece.end * 10000)])


@pytest.mark.parametrize("seed", range(30))
def test_words_of_an_overlap_are_kept_once(seed):
    """Two pieces have the same words to within 0.1 s, and each a wrong word at its own edge."""
    random = np.random.default_rng(seed)
    starts = np.cumsum(random.uniform(0.3, 0.6, 40))
    spoken = [Word(f"w{i % 7}", float(at), float(at) + 0.25) for i, at in enumerate(starts)]
    end = float(starts[25])
    start = end - 2.0
    jitter = random.uniform(-0.1, 0.1, (2, len(spoken)))

    def moved(word: Word, by: float) -> Word:
        return word._replace(start=word.start + by, end=word.end + by)

    left = [moved(w, jitter[0, i]) for i, w in enumerate(spoken) if w.end < end]
    right = [moved(w, jitter[1, i]) for i, w in enumerate(spoken) if w.start > start]
    # a word that an edge cuts is recognised as another
    left += [Word("edge", end - 0.1, end)]
    right = [Word("edge", start, start + 0.1), *right]
    kept, first = join_words(left, right, start, end)
    assert [word.text for word in [*left[:kept], *right[first:]]] == [word.text for word in spoken]


def test_different_words_change_in_the_middle():
    left = [Word("a", 0.0, 0.4), Word("b", 8.2, 8.6), Word("x", 9.5, 9.9)]
    right = [Word("y", 8.1, 8.3), Word("c", 9.4, 9.8), Word("d", 12.0, 12.3)]
    assert join_words(left, right, 8.0, 10.0) == (2, 1)
    assert join_words([], right, 8.0, 10.0)[1] <= 1
    assert join_words(left, [], 8.0, 10.0)[0] >= 2


@pytest.mark.parametrize(("longest", "overlap"), [(0.5, 0.0), (float("nan"), 0.0), (10.0, 6.0), (10.0, -1.0)])
def test_impossible_limits_are_refused(longest, overlap):
    with pytest.raises(UserError, match="give"):
        plan_pieces(Levels(decibels(0, 30.0, True), HOP, 30.0), longest, overlap)
