"""Word error rate by kaldialign, and the `recogs-*` and `errs-*` files as icefall lays them out.

Tier: kaldialign, results. Neither torch nor k2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kaldialign import align, edit_distance

from splitformer.files import atomic_write

# Stands for "no word" in an alignment. Words come from split(), so none of them is the empty string.
_NOTHING = ""


@dataclass(frozen=True)
class Utterance:
    """One scored utterance; `alignment` pairs reference and hypothesis words, "" where one side has none."""

    cut_id: str
    ref_words: tuple[str, ...]
    hyp_words: tuple[str, ...]
    alignment: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Score:
    """Counts over a test set, from minimum edit distance alignments; `utterances` are sorted by cut id."""

    utterances: tuple[Utterance, ...]
    insertions: int
    deletions: int
    substitutions: int
    ref_words: int

    @property
    def errors(self) -> int:
        """Insertions, deletions and substitutions together."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def wer(self) -> float:
        """Word error rate in percent of the reference words."""
        return 100.0 * self.errors / self.ref_words


def score(results: Iterable[tuple[str, Sequence[str], Sequence[str]]]) -> Score:
    """Align and count the errors of a test set.

    Args:
      results: (cut_id, ref_words, hyp_words) per utterance, in any order. Either list of words may be empty.
    Raises:
      ValueError: two utterances of one cut id, an empty string among the words, or no reference word at all.
    """
    utterances = []
    for cut_id, ref, hyp in sorted(results, key=lambda result: result[0]):
        if utterances and utterances[-1].cut_id == cut_id:
            raise ValueError(f"two results for cut {cut_id!r}; every cut of a test set is scored once")
        if _NOTHING in ref or _NOTHING in hyp:
            raise ValueError(f"cut {cut_id!r} has an empty word; pass text.split(), not text.split(' ')")
        alignment = tuple((r, h) for r, h in align(list(ref), list(hyp), _NOTHING))
        utterances.append(Utterance(cut_id, tuple(ref), tuple(hyp), alignment))

    ref_words = sum(len(utterance.ref_words) for utterance in utterances)
    if ref_words == 0:
        raise ValueError(
            f"{len(utterances)} utterances hold no reference word, and the WER is a share of those; "
            "check the supervisions' text"
        )
    pairs = [pair for utterance in utterances for pair in utterance.alignment]
    return Score(
        utterances=tuple(utterances),
        insertions=sum(ref == _NOTHING for ref, _ in pairs),
        deletions=sum(hyp == _NOTHING for _, hyp in pairs),
        substitutions=sum(ref != hyp and _NOTHING not in (ref, hyp) for ref, hyp in pairs),
        ref_words=ref_words,
    )


def word_errors(ref: Sequence[str], hyp: Sequence[str]) -> int:
    """Insertions, deletions and substitutions of a minimum edit distance alignment."""
    return edit_distance(list(ref), list(hyp))["total"]


def write_recogs(path: str | Path, scored: Score) -> None:
    """Write reference and hypothesis of every utterance, one line each."""
    with atomic_write(path) as file:
        for utterance in scored.utterances:
            file.write(f"{utterance.cut_id}:\tref={list(utterance.ref_words)}\n")
            file.write(f"{utterance.cut_id}:\thyp={list(utterance.hyp_words)}\n")


def write_errs(path: str | Path, scored: Score) -> None:
    """Write the counts, every utterance's alignment, the errors by frequency and statistics of every word.

    In alignments "(ref->hyp)" is an error and "*" no word. Ties in frequency are in alphabetical order.
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
    """(word, errors, count in references, count in hypotheses), the word with the most errors first."""
    missed, invented = Counter(deletions), Counter(insertions)
    for (ref, hyp), count in substitutions.items():
        missed[ref] += count
        invented[hyp] += count
    stats = [
        (word, missed[word] + invented[word], correct[word] + missed[word], correct[word] + invented[word])
        for word in correct.keys() | missed.keys() | invented.keys()
    ]
    return sorted(stats, key=lambda row: (-row[1], row[0]))
