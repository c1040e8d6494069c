"""Word error rate with kaldialign, and icefall's `recogs-*` and `errs-*` files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kaldialign import align

from splitformer.errors import UserError
from splitformer.files import atomic_write

_NOTHING = ""
"""Stands for "no word" in an alignment; no word of split() is empty."""


@dataclass(frozen=True)
class Utterance:
    """One scored utterance."""

    cut_id: str
    ref_words: tuple[str, ...]
    hyp_words: tuple[str, ...]
    alignment: tuple[tuple[str, str], ...]
    """pairs of a reference and a hypothesis word, "" for a missing one"""


@dataclass(frozen=True)
class Score:
    """Error counts of a test set, from alignments of minimum edit distance."""

    utterances: tuple[Utterance, ...]
    """sorted by cut id"""
    insertions: int
    deletions: int
    substitutions: int
    ref_words: int

    @property
    def errors(self) -> int:
        """The sum of insertions, deletions and substitutions."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def wer(self) -> float:
        """The word error rate in percent."""
        return 100.0 * self.errors / self.ref_words


def score(results: Iterable[tuple[str, Sequence[str], Sequence[str]]]) -> Score:
    """Align the utterances of a test set and count the errors.

    Args:
      results: (cut_id, ref_words, hyp_words) per utterance, in any order. Either list of words may be empty.
    Raises:
      UserError: two utterances have the same cut id, or there is no reference word at all.
      ValueError: a word is the empty string.
    """
    utterances: list[Utterance] = []
    for cut_id, ref, hyp in sorted(results, key=lambda result: result[0]):
        if utterances and utterances[-1].cut_id == cut_id:
            raise UserError(f"there are two results for cut {cut_id!r}: cut ids must be unique in a test set")
        if _NOTHING in ref or _NOTHING in hyp:
            raise ValueError(f"cut {cut_id!r} has an empty word; pass text.split(), not text.split(' ')")
        alignment = tuple((r, h) for r, h in align(list(ref), list(hyp), _NOTHING))
        utterances.append(Utterance(cut_id, tuple(ref), tuple(hyp), alignment))

    ref_words = sum(len(utterance.ref_words) for utterance in utterances)
    if ref_words == 0:
        raise UserError(
            f"the {len(utterances)} utterances have no reference word, so there is no WER: check the supervisions' text"
        )
    pairs = [pair for utterance in utterances for pair in utterance.alignment]
    return Score(
        utterances=tuple(utterances),
        insertions=sum(ref == _NOTHING for ref, _ in pairs),
        deletions=sum(hyp == _NOTHING for _, hyp in pairs),
        substitutions=sum(ref != hyp and _NOTHING not in (ref, hyp) for ref, hyp in pairs),
        ref_words=ref_words,
    )


def write_recogs(path: str | Path, scored: Score) -> None:
    """Write the reference and the hypothesis of every utterance, one line each."""
    with atomic_write(path) as file:
        for utterance in scored.utterances:
            file.write(f"{utterance.cut_id}:\tref={list(utterance.ref_words)}\n")
            file.write(f"{utterance.cut_id}:\thyp={list(utterance.hyp_words)}\n")


def write_errs(path: str | Path, scored: Score) -> None:
    """Write the counts, the alignment of every utterance, the errors by frequency, and statistics of every word.

    In alignments, "(ref->hyp)" is an error and "*" stands for no word. Ties in frequency are in alphabetical order.
    """
    substitutions: Counter[tuple[str, str]] = Counter()
    deletions: Counter[str] = Counter()
    insertions: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for utterance in scored.utterances:
        for ref, hyp in utterance.alignment:
            if ref == hyp:
                correct[ref] += 1
            elif ref == _NOTHING:
                insertions[hyp] += 1
            elif hyp == _NOTHING:
                deletions[ref] += 1
            else:
                substitutions[ref, hyp] += 1

    with atomic_write(path) as file:
        print(f"%WER = {scored.wer:.2f}", file=file)
        print(
            f"Errors: {scored.insertions} insertions, {scored.deletions} deletions, {scored.substitutions} "
            f"substitutions, over {scored.ref_words} reference words ({sum(correct.values())} correct)",
            file=file,
        )
        print(
            "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, "
            "INSERTIONS:, PER-WORD STATS:\n",
            file=file,
        )
        print("PER-UTT DETAILS: corr or (ref->hyp)", file=file)
        for utterance in scored.utterances:
            words = [
                ref if ref == hyp else f"({ref or '*'}->{hyp or '*'})" for ref, hyp in utterance.alignment
            ]
            print(f"{utterance.cut_id}:\t{' '.join(words)}", file=file)
        print("\nSUBSTITUTIONS: count ref -> hyp", file=file)
        for (ref, hyp), count in _by_frequency(substitutions):
            print(f"{count}   {ref} -> {hyp}", file=file)
        print("\nDELETIONS: count ref", file=file)
        for ref, count in _by_frequency(deletions):
            print(f"{count}   {ref}", file=file)
        print("\nINSERTIONS: count hyp", file=file)
        for hyp, count in _by_frequency(insertions):
            print(f"{count}   {hyp}", file=file)
        print("\nPER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp", file=file)
        for word, errors, in_ref, in_hyp in _word_stats(correct, substitutions, deletions, insertions):
            print(f"{word}   {correct[word]} {errors} {in_ref} {in_hyp}", file=file)


def _by_frequency(counts: Counter) -> list[tuple]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _word_stats(
    correct: Counter[str],
    substitutions: Counter[tuple[str, str]],
    deletions: Counter[str],
    insertions: Counter[str],
) -> list[tuple[str, int, int, int]]:
    """Return (word, errors, count in references, count in hypotheses), most errors first."""
    missed, invented = Counter(deletions), Counter(insertions)
    for (ref, hyp), count in substitutions.items():
        missed[ref] += count
        invented[hyp] += count
    stats = [
        (word, missed[word] + invented[word], correct[word] + missed[word], correct[word] + invented[word])
        for word in correct.keys() | missed.keys() | invented.keys()
    ]
    return sorted(stats, key=lambda row: (-row[1], row[0]))
