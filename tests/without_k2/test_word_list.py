"""The nearest word of a list, against a comparison with every word."""

from __future__ import annotations

import random

import pytest

from splitformer.decoding.word_list import NearestWords, read_words
from splitformer.errors import UserError


def distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def nearest_of_all(word: str, words: list[str]) -> str:
    return word if word in words else min(words, key=lambda other: distance(word, other))  # the first of equals


def random_words(rng: random.Random, count: int, letters: str, longest: int) -> list[str]:
    return ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize(("letters", "longest"), [("AB", 4), ("ABCDE", 8), ("ETAOINSHRDLU'", 14)])
def test_the_nearest_word_equals_a_comparison_with_every_word(letters: str, longest: int) -> None:
    rng = random.Random(longest)
    words = random_words(rng, 150, letters, longest)
    nearest = NearestWords(words)
    asked = random_words(rng, 120, letters + "?Ü", longest + 3)
    expected = [nearest_of_all(word, words) for word in asked]
    assert nearest(asked) == expected
    assert nearest(asked + words) == expected + words  # again, with what was remembered


def test_of_equals_the_first_of_the_list_is_taken() -> None:
    assert NearestWords(["CAR", "BAT", "CAB"])(["CAT"]) == ["CAR"]
    assert NearestWords(["BAT", "CAR", "CAR"])(["CAT", "CAR", "", "???"]) == ["BAT", "CAR", "BAT", "BAT"]


def test_the_first_field_of_each_line_is_read(tmp_path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("<eps> 0\n<UNK> 1\nA 2\nTHE 3\n\n#0 4\n<s> 5\n</s> 6\n")
    assert read_words(path) == ["A", "THE"]
    path.write_text("<eps> 0\n")
    (tmp_path / "latin.txt").write_bytes("größer\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not text in UTF-8"):
        read_words(tmp_path / "latin.txt")
    with pytest.raises(UserError, match=r"words\.txt holds no words"):
        read_words(path)
    with pytest.raises(ValueError, match="word list is empty"):
        NearestWords([])
