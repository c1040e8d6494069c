"""Random text."""

from __future__ import annotations

import random


def random_sentences(seed: int, number: int = 60) -> list[list[str]]:
    """Return sentences of a few words of very different frequency, with many repetitions."""
    rng = random.Random(seed)
    words, weights = ["a", "b", "c", "d", "e", "f", "g"], [40, 20, 10, 5, 4, 2, 1]
    return [rng.choices(words, weights, k=rng.randint(1, 7)) for _ in range(number)]
