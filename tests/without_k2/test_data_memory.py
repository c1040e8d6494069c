"""Memory does not grow with the corpus, from manifests to the plan of an epoch; see docs/data_at_scale.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import measure_in_new_process

FEW, MANY = 300, 3000
BYTES = 400
"""Limit per utterance: the index takes 16, the ids seen before about 20, drawing an epoch about 60."""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    steps = ["manifests", "validation", "cuts", "start"]
    few, many = (measure_in_new_process(steps, tmp_path / str(count), count)["bytes"] for count in (FEW, MANY))
    assert many - few < BYTES * (MANY - FEW), f"{few / 1e6:.1f} MB, then {many / 1e6:.1f} MB"
    # with all cuts in memory, which shows that the measurement would notice
    whole = measure_in_new_process(["list"], tmp_path / str(MANY), MANY)["bytes"]
    assert whole - few > 3 * BYTES * (MANY - FEW)
