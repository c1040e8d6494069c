"""Options of commands: repeated, with an equals sign, and in any order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from splitformer.cli import command


@dataclass(frozen=True)
class Options:
    """A command."""

    set: tuple[str, ...] = ()
    seed: int = 42
    num_jobs: int = 1


@pytest.mark.parametrize(
    ("arguments", "values", "seed"),
    [
        ("--set a=1 b=2", ("a=1", "b=2"), 42),
        ("--set a=1 --set b=2", ("a=1", "b=2"), 42),
        ("--set=a=1 --set=b=2", ("a=1", "b=2"), 42),
        ("--set a=1 --seed 3 --set=b=2 c=3", ("a=1", "b=2", "c=3"), 3),
        ("--seed 1 --num-jobs 2 --seed=5", (), 5),
    ],
)
def test_no_value_of_a_repeated_option_is_lost(arguments: str, values: tuple[str, ...], seed: int) -> None:
    seen = []

    def run(options: Options) -> None:
        seen.append(options)

    run.__annotations__["options"] = Options
    assert command(run, arguments.split(), prog="test") == 0
    assert (seen[0].set, seen[0].seed) == (values, seed)
