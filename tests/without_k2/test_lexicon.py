"""The nearest word of a list, against a comparison with every word."""

from __future__ import annotations

import random
import time

import pytest
import torch

from splitformer.decoding.word_list import NearestWords, edit_distances, read_words


def slow_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def slow_nearest(word: str, words: list[str]) -> str:
    return word if word in words else min(words, key=lambda other: slow_distance(word, other))  # the first of equals


def some_words(rng: random.Random, count: int, letters: str, longest: int) -> list[str]:
    return ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize(("letters", "longest"), [("AB", 4), ("ABCDE", 8), ("ETAOINSHRDLU'", 14)])
def test_the_same_as_comparing_with_every_word(letters: str, longest: int) -> None:
    rng = random.Random(longest)
    words = some_words(rng, 150, letters, longest)
    nearest = NearestWords(words)
    asked = some_words(rng, 120, letters + "?Ü", longest + 3)
    assert nearest(asked) == [slow_nearest(word, words) for word in asked]
    assert nearest(asked + words) == nearest(asked) + words  # again, from what it remembers


def test_of_equals_the_first_of_the_list_is_taken() -> None:
    assert NearestWords(["CAR", "BAT", "CAB"])(["CAT"]) == ["CAR"]
    assert NearestWords(["BAT", "CAR", "CAR"])(["CAT", "CAR", "", "???"]) == ["BAT", "CAR", "BAT", "BAT"]


def test_distances_of_a_batch() -> None:
    others = torch.tensor([[1, 2, 3, 0], [0, 0, 0, 0], [3, 2, 1, 1], [1, 1, 2, 3]])
    lengths = torch.tensor([3, 0, 4, 4])
    assert edit_distances(torch.tensor([1, 2, 3]), others, lengths).tolist() == [0, 3, 3, 1]
    assert edit_distances(torch.tensor([], dtype=torch.int64), others, lengths).tolist() == [3, 0, 4, 4]


def test_a_long_list_is_searched_in_little_time() -> None:
    rng = random.Random(0)
    words = some_words(rng, 89_000, "EEETTAAOOIINNSSHHRRDDLLUUCMFWYGPBVKXJQZ", 14)
    nearest = NearestWords(words)
    asked = some_words(rng, 20, "EETTAAOOINSHRDLU", 12)
    started = time.perf_counter()
    found = nearest(asked)
    assert (time.perf_counter() - started) / len(asked) < 1.0  # a comparison with every word takes several seconds
    assert all(slow_distance(a, f) <= min(slow_distance(a, w) for w in words[::500]) for a, f in zip(asked, found))


def test_lists_are_read_whatever_stands_behind_the_words(tmp_path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("<eps> 0\n<UNK> 1\nA 2\nTHE 3\n\n#0 4\n<s> 5\n</s> 6\n")
    assert read_words(path) == ["A", "THE"]
    path.write_text("<eps> 0\n")
    with pytest.raises(ValueError, match=r"words\.txt holds no words"):
        read_words(path)
    with pytest.raises(ValueError, match="has no nearest"):
        NearestWords([])
