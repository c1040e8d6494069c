"""Replacing words that a list lacks by the nearest word of the list, as the authors' released decoding does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from splitformer.decoding.lang import RESERVED_WORDS, UNKNOWN_WORD
from splitformer.errors import UserError
from splitformer.files import read_text


def read_words(path: str | Path) -> list[str]:
    """Return the first field of each line, so that words.txt and lexicons serve as well as plain lists.

    Raises:
      UserError: there is no word.
    """
    reserved = {*RESERVED_WORDS, UNKNOWN_WORD}
    lines = read_text(path).splitlines()
    words = [fields[0] for line in lines if (fields := line.split()) and fields[0] not in reserved]
    if not words:
        raise UserError(f"{path} holds no words: write one per line")
    return words


class NearestWords:
    """Maps words to the nearest words of a list by edit distance (Levenshtein); ties go to the first of the list."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = list(dict.fromkeys(words))
        if not self._words:
            raise ValueError("the word list is empty")
        self._nearest = {word: word for word in self._words}  # a cache

    def __call__(self, words: Sequence[str]) -> list[str]:
        """Return the words, each that the list lacks replaced by its nearest one."""
        for word in words:
            if word not in self._nearest:
                self._nearest[word] = process.extractOne(word, self._words, scorer=Levenshtein.distance)[0]
        return [self._nearest[word] for word in words]
