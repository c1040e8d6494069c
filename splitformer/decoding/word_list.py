"""Words that a list lacks become its nearest words: what the authors' released code does to what it decoded.

Tier: torch. A letter count bounds the edit distance from below, so that few words of a long list are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

SPECIAL_WORDS = frozenset({"<eps>", "<UNK>", "#0", "<s>", "</s>"})
"""Of a words.txt: nobody says them."""


def read_words(path: str | Path) -> list[str]:
    """The words of a list, one a line: its first field, so that words.txt and lexicons serve too.

    Raises ValueError where there is none.
    """
    with open(path, encoding="utf-8") as file:
        words = [fields[0] for line in file if (fields := line.split()) and fields[0] not in SPECIAL_WORDS]
    if not words:
        raise ValueError(f"{path} holds no words: it is to have one a line")
    return words


class NearestWords:
    """For a word its nearest one of a list, by edit distance (Levenshtein); of equals the first of the list.

    Answers are kept: what a model misspells, it misspells often.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(dict.fromkeys(words))
        if not self.words:
            raise ValueError("a list without words has no nearest one")
        letters = sorted(set().union(*self.words))
        self._code = {letter: i for i, letter in enumerate(letters, 1)}
        self._lengths = torch.tensor([len(word) for word in self.words])
        # (words, longest) letters as numbers from 1; 0 behind the end
        self._letters = torch.zeros(len(self.words), int(self._lengths.max()), dtype=torch.int32)
        self._counts = torch.zeros(len(self.words), len(letters) + 1, dtype=torch.int16)
        flat = torch.tensor([self._code[letter] for word in self.words for letter in word], dtype=torch.int32)
        rows = torch.arange(len(self.words)).repeat_interleave(self._lengths)
        places = torch.arange(len(flat)) - (self._lengths.cumsum(0) - self._lengths).repeat_interleave(self._lengths)
        self._letters[rows, places] = flat
        self._counts.index_put_((rows, flat.long()), torch.ones(len(flat), dtype=torch.int16), accumulate=True)
        self._answers = {word: word for word in self.words}

    def __call__(self, words: Sequence[str]) -> list[str]:
        """Each word that the list lacks replaced by its nearest one there."""
        return [self._answers.get(word) or self._answers.setdefault(word, self._nearest(word)) for word in words]

    def _nearest(self, word: str) -> str:
        code = torch.tensor([self._code.get(letter, -1) for letter in word], dtype=torch.int32)
        bounds = self._bounds(code)
        best, place = len(word) + self._letters.size(1) + 1, -1  # farther than any
        for bound in range(int(bounds.min()), int(bounds.max()) + 1):
            if bound > best:
                break  # those that are left are farther
            rows = (bounds == bound).nonzero().flatten()
            if len(rows):
                distances = edit_distances(code, self._letters[rows], self._lengths[rows])
                least, first = distances.min(), int((distances == distances.min()).nonzero()[0])
                best, place = min((best, place), (int(least), int(rows[first])))
        return self.words[place]

    def _bounds(self, code: Tensor) -> Tensor:
        """(words,) what the edit distance is at least: the letters that one has and the other lacks, the greater.

        An edit brings at most one such letter of each of the two into agreement.
        """
        known = code[code > 0].long()
        counts = torch.bincount(known, minlength=self._counts.size(1)).to(self._counts.dtype)
        difference = self._counts - counts
        missing = difference.clamp(max=0).sum(dim=1).neg() + (len(code) - len(known))
        return torch.maximum(difference.clamp(min=0).sum(dim=1), missing)


def edit_distances(word: Tensor, others: Tensor, lengths: Tensor) -> Tensor:
    """(N,) insertions, deletions and substitutions between `word` (S,) and each of `others` (N, L) with `lengths` (N,).

    All N tables (Wagner and Fischer, 1974) are filled at once, a row for each letter of `word`.
    """
    longest = int(lengths.max()) if len(lengths) else 0
    row = torch.arange(longest + 1, dtype=torch.int32).expand(len(others), -1)
    for i, letter in enumerate(word.tolist(), 1):
        different = (others[:, :longest] != letter).to(torch.int32)
        # from above or from the diagonal; then from the left, where each step costs 1: least of (value - place) + place
        new = torch.full_like(row, i)
        new[:, 1:] = torch.minimum(row[:, 1:] + 1, row[:, :-1] + different)
        places = torch.arange(longest + 1, dtype=torch.int32)
        row = (new - places).cummin(dim=1).values + places
    return row.gather(1, lengths.unsqueeze(1).to(torch.int64)).squeeze(1)
