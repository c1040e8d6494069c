"""Markdown tables, and numbers as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from splitformer.report.records import SetRecord


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with the first `left` columns aligned left and the others right."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], form: Callable[[float], str], seeds: int = 0, to: str = "–") -> str:
    """Return `7.37` for one value, `7.37 (7.10–7.60)` for the mean and range of several, `–` for none.

    Args:
      seeds: number of values that there should be; `[1 of 2 seeds]` is added if some are missing.
      to: stands between the ends of the range; a word where values may be negative.
    """
    if not values:
        return "–"
    text = form(mean(values))
    if len(values) > 1:
        text += f" ({form(min(values))}{to}{form(max(values))})"
    return text + (f" [{len(values)} of {seeds} seeds]" if len(values) < seeds else "")


def percent(value: float) -> str:
    """Return a WER as text."""
    return f"{value:.2f}"


def share(value: float | None, digits: int = 1) -> str:
    """Return 0.382 as `38.2 %`, and None as `–`."""
    return "–" if value is None else f"{round(100 * value, digits) + 0.0:.{digits}f} %"  # + 0.0: no negative zero


def change(value: float) -> str:
    """Return 0.031 as `+3.1 %`."""
    return f"{round(100 * value, 1) + 0.0:+.1f} %"


def commands(records: Iterable[SetRecord]) -> str:
    """Return the commands that wrote these records, folded away."""
    by_command: dict[str, list[SetRecord]] = {}
    for record in records:
        by_command.setdefault(record.command, []).append(record)
    blocks = []
    for command, own in by_command.items():
        names = ({f"seed {r.seed}" for r in own}, {r.test_set for r in own}, {r.method for r in own})
        blocks.append(f"# {'; '.join(', '.join(sorted(each)) for each in names)}\n{command}")
    text = "\n\n".join(blocks)
    return f"<details><summary>Commands that produced these numbers</summary>\n\n```\n{text}\n```\n\n</details>"
