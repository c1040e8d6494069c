"""From results to RESULTS.md: reads published figures, aggregates over seeds, renders tables.

`render` needs the files that `splitformer.report.runs.gather` wrote and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from splitformer.report.records import DecodeRecord
from splitformer.report.runs import ReportError, Run
from splitformer.report.tables import mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_METHODS = (
    "greedy_search",
    "greedy_search+lexicon",
    "prefix_beam_search",
    "ctc-decoding",
    "1best",
    "nbest",
    "nbest-rescoring",
    "whole-lattice-rescoring",
    "nbest-oracle",
    "transducer-greedy_search",
    "modified_beam_search",
    "fast_beam_search",
    "fast_beam_search_nbest",
    "fast_beam_search_nbest_LG",
)
_ORACLE = "nbest-oracle"


# ---- published figures


@dataclass(frozen=True)
class Published:
    """Figures somebody else published on the same test sets.

    wer: percent by test set, for a system without exits; wer_per_exit: percent by layer and test set.
    note: how they were obtained, where it differs from ours.
    """

    name: str
    source: str
    url: str
    note: str
    wer: dict[str, float]
    wer_per_exit: dict[int, dict[str, float]]


def load_published(path: str | Path) -> list[Published]:
    """Read `[[system]]` tables with name, source, url, optional note and either wer or wer_per_exit.

    Raises:
      ReportError: where the file is not TOML or a table has other keys.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ReportError(f"{path} is not valid TOML: {error}") from error
    if tables.keys() != {"system"} or not isinstance(tables["system"], list):
        raise ReportError(f"{path} has {sorted(tables)}; it is a list of [[system]] tables and nothing else")
    known = {field.name for field in fields(Published)}
    published = []
    for number, table in enumerate(tables["system"], start=1):
        where = f"{path}, [[system]] number {number}"
        unknown, missing = sorted(table.keys() - known), sorted({"name", "source", "url"} - table.keys())
        if unknown or missing:
            raise ReportError(f"{where}: unknown keys {unknown}, missing {missing}; keys are {sorted(known)}")
        if ("wer" in table) == ("wer_per_exit" in table):
            raise ReportError(f"{where}: give either wer (by test set) or wer_per_exit (by layer and test set)")
        per_exit = table.get("wer_per_exit", {})
        strangers = [layer for layer in per_exit if not layer.isdecimal()]
        if strangers:
            raise ReportError(f"{where}: wer_per_exit names {strangers}; an exit is the number of its layer")
        published.append(
            Published(
                name=table["name"],
                source=table["source"],
                url=table["url"],
                note=table.get("note", ""),
                wer=dict(table.get("wer", {})),
                wer_per_exit={int(layer): dict(per_exit[layer]) for layer in sorted(per_exit, key=int)},
            )
        )
    return published


# ---- aggregation


@dataclass(frozen=True)
class Results:
    """All runs of a corpus with the questions that tables and plots ask."""

    corpus: str
    runs: Sequence[Run]
    dev_sets: Sequence[str]

    def __post_init__(self) -> None:
        strangers = sorted(set(self.dev_sets) - {record.test_set for record in self._records()})
        if strangers and len(strangers) == len(set(self.dev_sets)):
            known = sorted({record.test_set for record in self._records()})
            raise ReportError(
                f"none of the dev sets {strangers} was decoded; decoded were {known}: decode the dev set "
                "too, or choose among these"
            )

    def _records(self) -> Iterable[DecodeRecord]:
        return (record for run in self.runs for record in run.decode)

    @property
    def systems(self) -> list[str]:
        return sorted({run.system for run in self.runs})

    @property
    def test_sets(self) -> list[str]:
        """Every set that is not for making choices."""
        return sorted({record.test_set for record in self._records()} - set(self.dev_sets))

    def methods(self, system: str | None = None) -> list[str]:
        """Decoding methods of one system, or of all: CTC's before the transducer's, the simple ones first."""
        found = {r.method for r in self._records() if system in (None, r.system)}
        return [method for method in _METHODS if method in found] + sorted(found - set(_METHODS))

    def runs_of(self, system: str) -> list[Run]:
        return [run for run in self.runs if run.system == system]

    def layers(self, system: str | None = None) -> list[int]:
        """The exits of one system, or of all."""
        return sorted({r.exit_layer for r in self._records() if system in (None, r.system)})

    def records(self, system: str, layer: int, test_set: str, method: str) -> list[DecodeRecord]:
        """The records of one cell, by seed."""
        wanted = (system, layer, test_set, method)
        return [r for r in self._records() if (r.system, r.exit_layer, r.test_set, r.method) == wanted]

    def wers(self, system: str, layer: int, test_set: str, method: str) -> list[float]:
        """WER in percent, by seed."""
        return [record.wer for record in self.records(system, layer, test_set, method)]

    def dev_wer(self, system: str, method: str) -> float | None:
        """WER at the last exit over all dev sets, mean over seeds; None where they were not decoded so."""
        layer = self.layers(system)[-1]
        records = [r for dev_set in self.dev_sets for r in self.records(system, layer, dev_set, method)]
        per_seed = [
            100.0 * sum(r.errors for r in own) / sum(r.ref_words for r in own)
            for own in ([r for r in records if r.seed == seed] for seed in {r.seed for r in records})
        ]
        return mean(per_seed) if per_seed else None

    def chosen_method(self, system: str) -> str | None:
        """The method with the lowest `dev_wer`; None where there is no dev set to choose on.

        The oracle has read the references and is no choice.
        """
        wers = {method: self.dev_wer(system, method) for method in self.methods(system) if method != _ORACLE}
        return min((method for method in wers if wers[method] is not None), key=lambda m: wers[m], default=None)
