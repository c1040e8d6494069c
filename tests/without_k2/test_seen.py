"""SeenIds answers as a set of strings does, in a fraction of its memory."""

from __future__ import annotations

import random
import tracemalloc

from splitformer.data.cut_index import SeenIds


def test_it_answers_as_a_set_does() -> None:
    rng = random.Random(0)
    names = [f"utterance-{rng.randrange(30_000)}" for _ in range(60_000)]
    seen, reference = SeenIds(), set()
    for name in names:
        assert seen.add(name) == (name not in reference)
        reference.add(name)
    assert len(seen) == len(reference)


def test_an_id_takes_a_few_bytes() -> None:
    def memory(count: int) -> tuple[int, int]:
        tracemalloc.start()
        seen = SeenIds()
        for number in range(count):
            seen.add(f"some-speaker-some-chapter-{number}")
        found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(seen) == count
        return found

    kept, peak = memory(90_000)  # the table was doubled a moment before
    assert kept < 25 * 90_000 and peak < 40 * 90_000
