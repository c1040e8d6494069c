"""WER against cost: the curves of exit policies on a test set, with bootstrap intervals.

Settings are fitted on a calibration set; the test set only shows the result. Intervals come from the bootstrap over
utterances (Bisani and Ney, ICASSP 2004). Differences are taken within each draw, because the systems that are compared
decode the same utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from splitformer.early_exit.calibration import Family, Target, calibrate
from splitformer.early_exit.exit_table import ExitTable, Outcome, fixed, oracle, outcome
from splitformer.early_exit.policies import CannotFit, check_disjoint
from splitformer.errors import UserError
from splitformer.report.records import BudgetPoint, Saving, TradeoffPoint

ALLOWED = (0.0, 0.05, 0.10)
"""Relative increases of WER at which savings are reported."""


class Curve(NamedTuple):
    """A policy at its settings, from deep to shallow, on the test set."""

    policy: str
    settings: list[str]
    outcomes: list[Outcome]


class Tradeoff(NamedTuple):
    """The fields of a TradeoffRecord that come from tables."""

    exit_layers: tuple[int, ...]
    num_utterances: int
    ref_words: int
    audio_seconds: float
    last_wer: float
    last_macs_per_second: float
    last_rtf: float
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
    """Fit every family on `calibration`, and compute its curve and its savings on `test`.

    Args:
      draws: number of bootstrap samples.
      progress: wraps the families, to show a progress bar.
    Raises:
      CannotFit: the tables share utterances or speakers (`check_disjoint`), or the test set has no reference words.
      UserError: the tables have different exits.
    """
    speakers = dict(zip(test.utterances, test.speakers))
    check_disjoint("the calibration set", calibration.utterances, calibration.speakers, "the test set", speakers)
    if calibration.layers != test.layers:
        raise UserError(f"tables of different exits: {calibration.layers} and {test.layers}")
    if float(test.ref_words.sum()) == 0:
        raise CannotFit("the test set has no reference words; check the text of its supervisions")
    sample = Sample.draw(test, draws, seed)
    exits = Curve("fixed", [f"layer {layer}" for layer in test.layers], [fixed(test, layer) for layer in test.layers])
    points, savings, budgets = sample.points(exits) + sample.points(_oracle_curve(test)), [], []
    for family in progress(families):
        policies = family.fit(calibration)
        settings = _spread(calibration, family, policies)
        names = [family.describe(setting) for setting in settings]
        curve = Curve(family.name, names, [outcome(policies(setting), test) for setting in settings])
        points += sample.points(curve)
        targets = [Target("max_relative_wer", allowed) for allowed in ALLOWED]
        for allowed, fitted in zip(ALLOWED, calibrate(calibration, family, targets)):
            savings.append(sample.saving(allowed, fitted.setting, outcome(fitted.policy, test), curve))
        budgets += sample.against_fixed(curve, exits)
    last = sample.points(exits)[-1]
    return Tradeoff(
        exit_layers=test.layers,
        num_utterances=len(test),
        ref_words=int(test.ref_words.sum()),
        audio_seconds=float(test.audio_seconds.sum()),
        last_wer=last.wer,
        last_macs_per_second=last.macs_per_second,
        last_rtf=last.rtf,
        points=tuple(points),
        savings=tuple(savings),
        budgets=tuple(budgets),
    )


def _oracle_curve(test: ExitTable) -> Curve:
    """Return the oracle over a range of prices; of several prices with the same outcome the first."""
    curve = Curve("oracle", [], [])
    for price in torch.logspace(-4, 3, 15, dtype=torch.float64).tolist():
        best = oracle(test, price)
        if not curve.outcomes or not torch.equal(curve.outcomes[-1].taken, best.taken):
            curve.settings.append(f"price {price:.2g}")
            curve.outcomes.append(best)
    return curve


def _spread(calibration: ExitTable, family: Family, policies: Callable, most: int = 14) -> list[float]:
    """Return settings whose costs on the calibration set are about evenly spaced, from deep to shallow."""
    settings = family.settings(calibration)
    costs = torch.stack([outcome(policies(setting), calibration).macs.sum() for setting in settings])
    wanted = torch.linspace(float(costs.max()), float(costs.min()), most, dtype=torch.float64)
    nearest = (costs.unsqueeze(0) - wanted.unsqueeze(1)).abs().argmin(dim=1)
    return [settings[place] for place in sorted(set(nearest.tolist()))]


class Sample(NamedTuple):
    """A test set with its bootstrap draws."""

    table: ExitTable
    counts: Tensor
    """(B, U) number of times that each draw has each utterance"""

    @classmethod
    def draw(cls, table: ExitTable, draws: int, seed: int) -> Sample:
        size = len(table)
        drawn = torch.randint(size, (draws, size), generator=torch.Generator().manual_seed(seed))
        counts = torch.zeros(draws, size, dtype=torch.float64)
        return cls(table, counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)))

    @property
    def last(self) -> Outcome:
        return fixed(self.table, self.table.layers[-1])

    def wers(self, result: Outcome) -> Tensor:
        """Return (B,) the WER in percent of each draw."""
        return 100.0 * (self.counts @ result.errors) / (self.counts @ self.table.ref_words).clamp(min=1.0)

    def wer(self, result: Outcome) -> float:
        return 100.0 * float(result.errors.sum() / self.table.ref_words.sum())

    def points(self, curve: Curve) -> list[TradeoffPoint]:
        audio = float(self.table.audio_seconds.sum())
        return [
            TradeoffPoint(
                curve.policy,
                setting,
                self.wer(result),
                *_interval(self.wers(result)),
                layers=float(result.layers.mean()),
                macs_per_second=float(result.macs.sum()) / audio,
                rtf=float(result.seconds.sum()) / audio,
            )
            for setting, result in zip(curve.settings, curve.outcomes)
        ]

    def saving(self, allowed: float, setting: str, result: Outcome, curve: Curve) -> Saving:
        """Return what the calibrated `setting` saves, and what the settings of the curve save in hindsight."""
        last = self.last
        # a draw in which the last exit makes no error counts as one with one error, as the change would be infinite
        relative = (self.counts @ (result.errors - last.errors)) / (self.counts @ last.errors).clamp(min=1.0)
        low, high = _interval(relative)
        limit = float(last.errors.sum()) * (1.0 + allowed) + 1e-9
        within = [each for each in [*curve.outcomes, result] if float(each.errors.sum()) <= limit]
        return Saving(
            curve.policy,
            allowed,
            setting,
            wer=self.wer(result),
            relative_wer=float((result.errors - last.errors).sum() / last.errors.sum().clamp(min=1.0)),
            relative_wer_low=low,
            relative_wer_high=high,
            macs_saved=_saved(result.macs, last.macs),
            layers_saved=_saved(result.layers, last.layers),
            time_saved=_saved(result.seconds, last.seconds),
            hindsight_macs_saved=max((_saved(each.macs, last.macs) for each in within), default=None),
            hindsight_layers_saved=max((_saved(each.layers, last.layers) for each in within), default=None),
        )

    def against_fixed(self, curve: Curve, exits: Curve) -> list[BudgetPoint]:
        """Return the difference to the fixed exits at every tenth of the last exit's multiply-accumulates.

        WERs between two settings, and between two exits, are interpolated: choosing one of them at random for each
        utterance gives that on average. Every curve begins at the first exit and ends at the last.
        """
        ends = [exits.outcomes[0], exits.outcomes[-1]]
        first = float(ends[0].macs.sum() / ends[1].macs.sum())
        budgets = [tenth / 10 for tenth in range(1, 10) if tenth / 10 > first]
        own, whole = [*ends, *curve.outcomes], torch.ones(1, len(self.table), dtype=torch.float64)
        wers, fixed_wers = (self._interpolated(whole, each, budgets)[0] for each in (own, exits.outcomes))
        drawn = self._interpolated(self.counts, own, budgets) - self._interpolated(self.counts, exits.outcomes, budgets)
        return [
            BudgetPoint(
                curve.policy,
                budget,
                float(wers[place]),
                float(fixed_wers[place]),
                float(wers[place] - fixed_wers[place]),
                *_interval(drawn[:, place]),
            )
            for place, budget in enumerate(budgets)
        ]

    def _interpolated(self, counts: Tensor, outcomes: Sequence[Outcome], budgets: Sequence[float]) -> Tensor:
        """Return (B, G) the WER in percent at G budgets, for each of counts (B, U)."""
        macs = torch.stack([each.macs for each in outcomes], dim=1)  # (U, P)
        errors = torch.stack([each.errors for each in outcomes], dim=1)
        costs = (counts @ macs) / (counts @ self.last.macs).unsqueeze(1)
        wers = 100.0 * (counts @ errors) / (counts @ self.table.ref_words).clamp(min=1.0).unsqueeze(1)
        costs, order = costs.sort(dim=1, stable=True)
        wers = wers.gather(1, order)
        wanted = torch.tensor(budgets, dtype=torch.float64).expand(len(counts), -1).contiguous()
        right = torch.searchsorted(costs.contiguous(), wanted).clamp(1, costs.size(1) - 1)
        c0, c1, w0, w1 = (x.gather(1, i) for x in (costs, wers) for i in (right - 1, right))
        share = ((wanted - c0) / (c1 - c0).clamp(min=1e-12)).clamp(0.0, 1.0)
        return w0 + share * (w1 - w0)


def _interval(values: Tensor) -> tuple[float, float]:
    """Return the middle 95 %."""
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _saved(cost: Tensor, last: Tensor) -> float:
    return 1.0 - float(cost.sum() / last.sum())
