"""What all tables of a report have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first `left` columns aligned left and the others right."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], form: Callable[[float], str], seeds: int = 0, to: str = "–") -> str:
    """One value as `7.37`, several as `7.37 (7.10–7.60)`, none as `–`; too few for `seeds` are counted.

    `to` stands between the lowest and the highest: a word where values may have a minus.
    """
    if not values:
        return "–"
    text = form(mean(values))
    if len(values) > 1:
        text += f" ({form(min(values))}{to}{form(max(values))})"
    return text + (f" [{len(values)} of {seeds} seeds]" if len(values) < seeds else "")


def percent(value: float) -> str:
    return f"{value:.2f}"


class Commanded(Protocol):
    """Any record of something decoded."""

    @property
    def seed(self) -> int: ...
    @property
    def test_set(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def command(self) -> str: ...


def commands(records: Iterable[Commanded]) -> str:
    """The commands behind the numbers, folded away."""
    made: dict[str, list[Commanded]] = {}
    for record in records:
        made.setdefault(record.command, []).append(record)
    blocks = []
    for command, own in made.items():
        names = ({f"seed {r.seed}" for r in own}, {r.test_set for r in own}, {r.method for r in own})
        blocks.append(f"# {'; '.join(', '.join(sorted(each)) for each in names)}\n{command}")
    text = "\n\n".join(blocks)
    return f"<details><summary>Commands that made these numbers</summary>\n\n```\n{text}\n```\n\n</details>"
