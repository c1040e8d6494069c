"""Memory does not grow with the corpus, from manifests to the first batch's plan; docs/data_at_scale.md has more."""

from __future__ import annotations

from pathlib import Path

from benchmarks.memory import measured

FEW, MANY = 500, 6000
BYTES = 400
"""more, for each utterance: their index takes 16, ids that came before about 20, the plan of an epoch about 60"""


def test_memory_stays_as_the_corpus_grows(tmp_path: Path) -> None:
    steps = ["manifests", "validation", "cuts", "start"]
    few, many = (measured(steps, tmp_path / str(count), count)["bytes"] for count in (FEW, MANY))
    assert many - few < BYTES * (MANY - FEW), f"{few / 1e6:.1f} MB, then {many / 1e6:.1f} MB"
    # what it would be if all cuts were in memory, which also shows that the measurement sees such things
    whole = measured(["list"], tmp_path / str(MANY), MANY)["bytes"]
    assert whole - few > 3 * BYTES * (MANY - FEW)
