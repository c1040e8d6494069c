"""WER against cost: the curves of exit policies on a test set, with bootstrap intervals.

Settings are fitted on a calibration set; the test set only shows what they do. Intervals are of the bootstrap over
utterances (Bisani and Ney, ICASSP 2004): the test set is drawn anew, with replacement, and differences are taken
within each draw, because the systems compared hear the same utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from splitformer.early_exit.calibration import Family, Target, calibrate
from splitformer.early_exit.exit_table import ExitTable, Outcome, fixed, oracle, outcome
from splitformer.report.records import BudgetPoint, Saving, TradeoffPoint

ALLOWED = (0.0, 0.05, 0.10)
"""Relative increases of WER at which savings are told."""


class Curve(NamedTuple):
    """One policy at its settings, on the test set; from deep to shallow."""

    policy: str
    settings: list[str]
    outcomes: list[Outcome]


class Tradeoff(NamedTuple):
    points: tuple[TradeoffPoint, ...]
    savings: tuple[Saving, ...]
    budgets: tuple[BudgetPoint, ...]


def tradeoff(
    calibration: ExitTable,
    test: ExitTable,
    families: Sequence[Family],
    draws: int = 1000,
    seed: int = 0,
    progress: Callable[[Iterable[Family]], Iterable[Family]] = iter,
) -> Tradeoff:
    """Fit every family on `calibration`, and tell what it does on `test`.

    Raises:
      ValueError: the tables are of different exits, or share a speaker or an utterance, or the test set has no
        reference words.
    """
    check_disjoint(calibration, test)
    if calibration.layers != test.layers:
        raise ValueError(f"tables of different exits: {calibration.layers} and {test.layers}")
    if float(test.ref_words.sum()) == 0:
        raise ValueError("the test set has no reference words; check the supervisions' text")
    sample = Sample.draw(test, draws, seed)
    fixed_curve = Curve(
        "fixed", [f"layer {layer}" for layer in test.layers], [fixed(test, layer) for layer in test.layers]
    )
    points, savings, budgets = [sample.point("fixed", s, o) for s, o in zip(*fixed_curve[1:])], [], []
    prices = torch.logspace(-4, 3, 15, dtype=torch.float64).tolist()
    best = _different([(f"price {price:.2g}", oracle(test, price)) for price in prices])
    points += [sample.point("oracle", setting, found) for setting, found in best]
    for family in progress(families):
        policies = family.fit(calibration)
        settings = _spread(calibration, family, policies)
        curve = Curve(family.name, [], [])
        for setting in settings:
            curve.settings.append(family.describe(setting))
            curve.outcomes.append(outcome(policies(setting), test))
        points += [sample.point(family.name, s, o) for s, o in zip(*curve[1:])]
        for allowed in ALLOWED:
            fitted = calibrate(calibration, family, Target("max_relative_wer", allowed))
            found = outcome(fitted.policy, test)
            savings.append(sample.saving(family.name, allowed, fitted.setting, found, curve))
        budgets += sample.against_fixed(curve, fixed_curve)
    return Tradeoff(tuple(points), tuple(savings), tuple(budgets))


def check_disjoint(calibration: ExitTable, test: ExitTable) -> None:
    """Raises ValueError where the two share an utterance or a known speaker."""
    for what, shared in (
        ("utterances", set(calibration.utterances) & set(test.utterances)),
        ("speakers", (set(calibration.speakers) & set(test.speakers)) - {""}),
    ):
        if shared:
            raise ValueError(
                f"the calibration set and the test set share {len(shared)} {what} ({', '.join(sorted(shared)[:5])}): "
                "what is fitted on them is no result there; calibrate on a set of other speakers"
            )


def _spread(calibration: ExitTable, family: Family, policies: Callable, most: int = 14) -> list[float]:
    """Settings whose costs on the calibration set lie apart, evenly, from deep to shallow."""
    settings = family.settings(calibration)
    costs = torch.stack([outcome(policies(setting), calibration).macs.sum() for setting in settings])
    wanted = torch.linspace(float(costs.max()), float(costs.min()), most, dtype=torch.float64)
    nearest = (costs.unsqueeze(0) - wanted.unsqueeze(1)).abs().argmin(dim=1)
    return [settings[place] for place in sorted(set(nearest.tolist()))]


def _different(found: list[tuple[str, Outcome]]) -> list[tuple[str, Outcome]]:
    """One of each run of equal outcomes."""
    kept: list[tuple[str, Outcome]] = []
    for setting, each in found:
        if not kept or not torch.equal(kept[-1][1].taken, each.taken):
            kept.append((setting, each))
    return kept


class Sample(NamedTuple):
    """A test set with its bootstrap draws."""

    table: ExitTable
    counts: Tensor
    """(B, U) how often each draw has each utterance"""

    @classmethod
    def draw(cls, table: ExitTable, draws: int, seed: int) -> Sample:
        generator = torch.Generator().manual_seed(seed)
        size = len(table)
        drawn = torch.randint(size, (draws, size), generator=generator)
        counts = torch.zeros(draws, size, dtype=torch.float64)
        return cls(table, counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)))

    @property
    def last(self) -> Outcome:
        return fixed(self.table, self.table.layers[-1])

    def wers(self, found: Outcome) -> Tensor:
        """(B,) percent."""
        return 100.0 * (self.counts @ found.errors) / (self.counts @ self.table.ref_words).clamp(min=1.0)

    def wer(self, found: Outcome) -> float:
        return 100.0 * float(found.errors.sum() / self.table.ref_words.sum())

    def point(self, policy: str, setting: str, found: Outcome) -> TradeoffPoint:
        low, high = _interval(self.wers(found))
        audio = float(self.table.audio_seconds.sum())
        return TradeoffPoint(
            policy,
            setting,
            self.wer(found),
            low,
            high,
            layers=float(found.layers.mean()),
            macs_per_second=float(found.macs.sum()) / audio,
            rtf=float(found.seconds.sum()) / audio,
        )

    def saving(self, policy: str, allowed: float, setting: str, found: Outcome, curve: Curve) -> Saving:
        last = self.last
        # a last exit without an error counts as one with one: what is relative to nothing has no size
        relative = (self.counts @ (found.errors - last.errors)) / (self.counts @ last.errors).clamp(min=1.0)
        low, high = _interval(relative)
        limit = float(last.errors.sum()) * (1.0 + allowed) + 1e-9
        within = [each for each in [*curve.outcomes, found] if float(each.errors.sum()) <= limit]
        return Saving(
            policy,
            allowed,
            setting,
            wer=self.wer(found),
            relative_wer=float((found.errors - last.errors).sum() / last.errors.sum().clamp(min=1.0)),
            relative_wer_low=low,
            relative_wer_high=high,
            macs_saved=_saved(found.macs, last.macs),
            layers_saved=_saved(found.layers, last.layers),
            time_saved=_saved(found.seconds, last.seconds),
            hindsight_macs_saved=max((_saved(each.macs, last.macs) for each in within), default=None),
            hindsight_layers_saved=max((_saved(each.layers, last.layers) for each in within), default=None),
        )

    def against_fixed(self, curve: Curve, fixed_curve: Curve) -> list[BudgetPoint]:
        """The difference to the fixed exits at equal average multiply-accumulates, every tenth of the last exit's.

        Between two settings, and between two exits, lies what choosing one of them by lot would give. Every curve
        begins at the first exit and ends at the last.
        """
        ends = [fixed_curve.outcomes[0], fixed_curve.outcomes[-1]]
        first = float(ends[0].macs.sum() / ends[1].macs.sum())
        budgets = [tenth / 10 for tenth in range(1, 10) if tenth / 10 > first]
        grid = torch.tensor(budgets, dtype=torch.float64)
        whole = torch.ones(1, len(self.table), dtype=torch.float64)
        wer, fixed_wer = (
            self._interpolated(whole, each, grid)[0] for each in ([*ends, *curve.outcomes], fixed_curve.outcomes)
        )
        drawn = self._interpolated(self.counts, [*ends, *curve.outcomes], grid)
        drawn = drawn - self._interpolated(self.counts, fixed_curve.outcomes, grid)
        points = []
        for place, budget in enumerate(budgets):
            low, high = _interval(drawn[:, place])
            values = (float(wer[place]), float(fixed_wer[place]), float(wer[place] - fixed_wer[place]))
            points.append(BudgetPoint(curve.policy, budget, *values, low, high))
        return points

    def _interpolated(self, counts: Tensor, outcomes: Sequence[Outcome], budgets: Tensor) -> Tensor:
        """(B, G) WER in percent at budgets (G,), for each of counts (B, U)."""
        macs = torch.stack([each.macs for each in outcomes], dim=1)  # (U, P)
        errors = torch.stack([each.errors for each in outcomes], dim=1)
        costs = (counts @ macs) / (counts @ self.last.macs).unsqueeze(1)
        wers = 100.0 * (counts @ errors) / (counts @ self.table.ref_words).clamp(min=1.0).unsqueeze(1)
        costs, order = costs.sort(dim=1, stable=True)
        wers = wers.gather(1, order)
        wanted = budgets.expand(len(counts), -1).contiguous()
        right = torch.searchsorted(costs.contiguous(), wanted).clamp(1, costs.size(1) - 1)
        c0, c1, w0, w1 = (x.gather(1, i) for x in (costs, wers) for i in (right - 1, right))
        share = ((wanted - c0) / (c1 - c0).clamp(min=1e-12)).clamp(0.0, 1.0)
        return w0 + share * (w1 - w0)


def _interval(values: Tensor) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _saved(cost: Tensor, last: Tensor) -> float:
    return 1.0 - float(cost.sum() / last.sum())
