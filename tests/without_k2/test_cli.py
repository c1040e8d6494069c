"""Options of commands: repeated, with an equals sign, and in any order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from splitformer.cli import EXTRAS, command


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


def test_the_extras_are_those_of_the_package(repo_root: Path) -> None:
    section = (repo_root / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    lines = section.partition("\n\n")[0].splitlines()
    declared = {line.partition(" = ")[0]: set(re.findall(r'"([\w-]+)', line)) for line in lines}
    assert declared.keys() == EXTRAS.keys()
    earlier: set[str] = set()
    for extra, packages in EXTRAS.items():
        assert set(packages) == declared[extra] - earlier, extra
        earlier |= declared[extra]
