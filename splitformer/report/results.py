"""The results of a corpus: its runs, with the questions that tables and plots ask, and WERs that others published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from splitformer.config import tomllib
from splitformer.decoding.methods import METHODS
from splitformer.errors import UserError
from splitformer.report.records import DecodeRecord, Record
from splitformer.report.runs import Run
from splitformer.report.tables import mean

LONG_NAME = 24
"""Names of systems with more characters have a short form in tables, if they consist of a conf and overrides."""


@dataclass(frozen=True)
class Results:
    """All runs of a corpus.

    Raises:
      UserError: there are dev sets, and none of them was decoded.
    """

    corpus: str
    runs: Sequence[Run]
    dev_sets: Sequence[str]
    """sets on which choices are made; all others are test sets"""

    def __post_init__(self) -> None:
        decoded = {record.test_set for record in self._records()}
        if self.dev_sets and not decoded & set(self.dev_sets):
            raise UserError(f"none of --dev-sets {' '.join(self.dev_sets)} was decoded; decoded were {sorted(decoded)}")

    def _records(self, system: str | None = None) -> list[DecodeRecord]:
        return [record for run in self.runs if system in (None, run.system) for record in run.decode]

    @property
    def systems(self) -> list[str]:
        return sorted({run.system for run in self.runs})

    @property
    def test_sets(self) -> list[str]:
        return sorted({record.test_set for record in self._records()} - set(self.dev_sets))

    @property
    def notices(self) -> list[str]:
        """The distinct notices of all records: sentences that stand above every table."""
        runs = [(*run.decode, *run.tradeoffs, *run.early_exits) for run in self.runs]
        return list(dict.fromkeys(record.notice for records in runs for record in records if record.notice))

    def runs_of(self, system: str) -> list[Run]:
        return [run for run in self.runs if run.system == system]

    def methods(self, system: str | None = None) -> list[str]:
        """Return the search methods of one system, or of all, in the order of METHODS."""
        found = {record.method for record in self._records(system)}
        return [method for method in METHODS if method in found] + sorted(found - METHODS.keys())

    def layers(self, system: str | None = None) -> list[int]:
        """Return the exits of one system, or of all."""
        return sorted({record.exit_layer for record in self._records(system)})

    def records(self, system: str, layer: int, test_set: str, method: str) -> list[DecodeRecord]:
        """Return the records of one cell of a table, by seed."""
        cell = (layer, test_set, method)
        return [r for r in self._records(system) if (r.exit_layer, r.test_set, r.method) == cell]

    def wers(self, system: str, layer: int, test_set: str, method: str) -> list[float]:
        """Return the WERs of one cell of a table in percent, by seed."""
        return [record.wer for record in self.records(system, layer, test_set, method)]

    def dev_wers(self, system: str) -> dict[str, float]:
        """Return {method: WER at the last exit over all dev sets, mean over seeds} for methods that may be chosen."""
        layer, wers = self.layers(system)[-1], {}
        for method in self.methods(system):
            records = [r for dev_set in self.dev_sets for r in self.records(system, layer, dev_set, method)]
            per_seed = [[r for r in records if r.seed == seed] for seed in {r.seed for r in records}]
            if per_seed and (method not in METHODS or METHODS[method].selectable):
                wers[method] = mean(
                    [100.0 * sum(r.errors for r in own) / max(sum(r.ref_words for r in own), 1) for own in per_seed]
                )
        return wers

    def chosen_method(self, system: str) -> str | None:
        """Return the method with the lowest `dev_wers`; None if no dev set was decoded."""
        wers = self.dev_wers(system)
        return min(wers, key=lambda method: wers[method], default=None)

    # ---- names in tables

    def footnotes(self) -> dict[str, str]:
        """Return {system: letter} for systems whose names are too long for tables."""
        long = [system for system in self.systems if len(system) > LONG_NAME and "+" in system]
        return {system: chr(ord("a") + n % 26) + str(n // 26 or "") for n, system in enumerate(long)}

    def label(self, system: str) -> str:
        """Return the system's name in tables and legends: a long `conf+key=value+...` is `conf [letter]`."""
        letter = self.footnotes().get(system)
        return f"{system.partition('+')[0]} [{letter}]" if letter else system

    def seeds(self, runs: Sequence[Run]) -> str:
        """Return the seeds of the runs; own runs have a star where committed ones are shown beside them."""
        star = "\\*" if any(run.committed for run in self.runs) else ""
        return ", ".join(f"{run.seed}{'' if run.committed else star}" for run in runs)


# ---- published figures


@dataclass(frozen=True)
class Published(Record):
    """WERs that somebody else published on the same test sets."""

    name: str
    source: str
    url: str
    note: str = ""
    """how they were obtained, where that differs"""
    wer: dict[str, float] = field(default_factory=dict)
    """{test set: percent}, of a system without exits"""
    wer_per_exit: dict[int, dict[str, float]] = field(default_factory=dict)
    """{layer: {test set: percent}}, of a system with exits"""


def load_published(path: str | Path) -> list[Published]:
    """Read a TOML file of `[[system]]` tables, whose keys are the fields of Published.

    Raises:
      UserError: the file is not TOML, or a table has other keys.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    if tables.keys() != {"system"} or not isinstance(tables["system"], list):
        raise UserError(f"{path} has the keys {sorted(tables)}; it consists of [[system]] tables and nothing else")
    published = []
    for number, table in enumerate(tables["system"], start=1):
        source = f"{path}, [[system]] number {number}"
        if wrong := [layer for layer in table.get("wer_per_exit", {}) if not layer.isdecimal()]:
            raise UserError(f"{source}: wer_per_exit has {wrong}; an exit is named by the number of its layer")
        published.append(Published.from_dict(table, source))
        if bool(published[-1].wer) == bool(published[-1].wer_per_exit):
            raise UserError(f"{source}: give either wer (by test set) or wer_per_exit (by layer and test set)")
    return published
