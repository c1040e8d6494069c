"""Fitting exit policies: from a table of what every exit would have given to thresholds that meet a target.

All utterances of a calibration set are run through all exits once; the table keeps statistics, errors and costs. What a
policy would do is then arithmetic on the table, so that thousands of settings cost seconds.

How thresholds are found. A threshold for each exit, chosen freely to minimise errors on a hundred utterances, learns
those utterances: exits that happen to be better than deeper ones are taken everywhere. Instead, what a statistic s says
at an exit is made comparable between exits by a logistic regression over all of them,

    logit P(a deeper exit has fewer errors) = a_exit + w f(s),

one slope for all exits and an intercept for each, drawn towards a common one (Platt's calibration, pooled). One
probability p for all exits then is a threshold of its own for each: leave where a_exit + w f(s) <= logit p. So a curve
of WER against cost has one free number, and that is chosen by the target with the speakers left out in turn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from splitformer.early_exit.exit_table import ExitTable, Outcome, fixed, outcome
from splitformer.early_exit.policies import FLOOR, Deadline, Fixed, Learned, Patience, Policy, Threshold, feature

# ---- the benefit of going on

_NO_CTC = "use the policy fixed or deadline: this one is fitted to what the model's CTC heads give, and there is no"


@dataclass(frozen=True)
class Benefit:
    """logit P(a deeper exit has fewer errors) = intercepts[layer] + sum of weights[name] * feature(name, statistic).

    means: of the features; what an utterance lacks counts as that.
    """

    weights: dict[str, float]
    means: dict[str, float]
    intercepts: dict[int, float]

    @classmethod
    def fit(cls, table: ExitTable, names: Sequence[str], penalty: float = 1.0) -> Benefit:
        """Penalised maximum likelihood by Newton's method, over all utterances at all exits but the last.

        Minimised is the sum of log-losses + penalty / 2 * (sum of squares of the weights, of features scaled to
        variance 1, and of the intercepts' differences from a common one, which is free).
        Exits at which none of the statistics is known (`disagreement`, at the first) are left out; a statistic that no
        exit knows gets the weight 0.
        """
        missing = [name for name in names if name not in table.statistics]
        if missing:
            raise ValueError(f"{_NO_CTC} {', '.join(missing)}")
        features = torch.stack(
            [feature(name, table.statistics[name][:, :-1]) for name in names], dim=2
        )  # (U, E - 1, K)
        known = ~features.isnan().all(dim=2).all(dim=0)
        layers = list(itertools.compress(table.layers[:-1], known.tolist()))
        features = features[:, known]
        # the means of nothing are NaN
        means = features.flatten(0, 1).nanmean(dim=0).nan_to_num()
        features = torch.where(features.isnan(), means, features) - means
        scales = features.flatten(0, 1).square().mean(dim=0).sqrt().nan_to_num().clamp(min=1e-9)
        best_deeper = table.errors.flip(1).cummin(dim=1).values.flip(1)[:, 1:]
        target = (best_deeper < table.errors[:, :-1])[:, known].double().flatten()

        exits = torch.eye(len(layers), dtype=torch.float64).repeat(len(table), 1)
        x = torch.cat([torch.ones(len(target), 1), exits, (features / scales).flatten(0, 1)], dim=1)
        penalties = torch.full((x.size(1),), penalty, dtype=torch.float64)
        penalties[0] = 1e-6
        found = _logistic_regression(x, target, penalties)
        weights = found[1 + len(layers) :] / scales
        intercepts = found[0] + found[1 : 1 + len(layers)] - (weights * means).sum()
        return cls(
            dict(zip(names, weights.tolist())), dict(zip(names, means.tolist())), dict(zip(layers, intercepts.tolist()))
        )

    def log_loss(self, table: ExitTable) -> float:
        """The sum of log-losses over utterances and exits."""
        total = 0.0
        for place, layer in enumerate(table.layers[:-1]):
            if layer in self.intercepts:
                logit = torch.full((len(table),), self.intercepts[layer], dtype=torch.float64)
                for name, weight in self.weights.items():
                    value = feature(name, table.statistics[name][:, place])
                    logit += weight * torch.where(value.isnan(), self.means[name], value)
                better = (table.errors[:, place + 1 :].amin(dim=1) < table.errors[:, place]).double()
                total += float(torch.nn.functional.binary_cross_entropy_with_logits(logit, better, reduction="sum"))
        return total

    def thresholds(self, probability: float) -> dict[int, float]:
        """Of one statistic: for each exit the largest value at which P is at most `probability`.

        Empty where P falls with the statistic, which then is no doubt at all, and for probability 0.
        """
        [(name, weight)] = self.weights.items()
        if weight <= 0 or probability == 0:
            return {}
        edges = {layer: (_logit(probability) - intercept) / weight for layer, intercept in self.intercepts.items()}
        if name == "disagreement":
            return edges
        return {layer: math.exp(min(edge, 50.0)) - FLOOR for layer, edge in edges.items()}


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


def _logistic_regression(x: Tensor, target: Tensor, penalties: Tensor, steps: int = 50) -> Tensor:
    """The minimum of sum of log-losses of x @ b against target (0 or 1) + sum of penalties / 2 * b^2.

    Newton's method; a step that does not lower the objective is halved. The objective is strictly convex.
    """

    def objective(b: Tensor) -> Tensor:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(x @ b, target, reduction="sum")
        return losses + 0.5 * (penalties * b.square()).sum()

    b = torch.zeros(x.size(1), dtype=torch.float64)
    value = objective(b)
    for _ in range(steps):
        p = torch.sigmoid(x @ b)
        gradient = x.T @ (p - target) + penalties * b
        hessian = (x * (p * (1 - p)).unsqueeze(1)).T @ x + torch.diag(penalties)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while objective(b - size * step) > value and size > 1e-6:
            size /= 2
        b = b - size * step
        before, value = value, objective(b)
        if before - value < 1e-10:
            break
    return b


# ---- families: policies with one free number, the setting


class Family(NamedTuple):
    """Policies of one kind. `fit(table)` learns all but the setting; settings go from the deepest, at which nothing
    leaves before the last exit, to the shallowest."""

    name: str
    fit: Callable[[ExitTable], Callable[[float], Policy]]
    settings: Callable[[ExitTable], list[float]]
    describe: Callable[[float], str]


LEARNED_FROM = ("entropy", "posterior", "disagreement", "frames")
"""Statistics of the learned policy; the length in frames is one of them. `learned_nbest` reads nbest_posterior too, for
which every exit that is asked must be searched."""

FAMILY_NAMES = (
    "entropy",
    "entropy_non_blank",
    "posterior",
    "nbest_posterior",
    "patience",
    "learned",
    "learned_nbest",
    "budget",
    "deadline",
    "fixed",
)

WITHOUT_CTC = ("deadline", "fixed")
"""Those of a model without CTC head, too."""


def make_family(name: str, cost: str = "macs") -> Family:
    """The family of that name.

    Args:
      cost: what a `budget` is of: layers or macs. (Not seconds: a doubtful exit may take longer to search than the
        last one takes for everything.)
    Raises:
      ValueError: an unknown name.
    """
    if name in ("entropy", "entropy_non_blank", "posterior", "nbest_posterior"):
        return _by_probability(name, lambda table: _threshold_policies(table, name))
    if name == "patience":
        return _by_probability(name, _patience_policies)
    if name in ("learned", "learned_nbest"):
        names = (*LEARNED_FROM, "nbest_posterior") if name == "learned_nbest" else LEARNED_FROM
        return _by_probability(name, lambda table: _learned_policies(table, names))
    if name == "budget":
        return Family(
            name,
            lambda table: _budget_policies(table, cost),
            lambda table: torch.linspace(1.0, float(_shares_of_cost(table, cost)[0]), 41, dtype=torch.float64).tolist(),
            lambda budget: f"{100 * budget:.0f} % of {cost}",
        )
    if name == "deadline":
        return Family(
            name,
            _deadline_policies,
            _deadline_settings,
            lambda s: "no limit" if s == _NO_LIMIT else f"{1000 * s:.1f} ms",
        )
    if name == "fixed":
        return Family(
            name,
            lambda table: lambda layer: Fixed(int(layer)),
            lambda table: [float(layer) for layer in reversed(table.layers)],
            lambda layer: f"layer {layer:.0f}",
        )
    raise ValueError(f"unknown policy {name!r}; there are {', '.join(FAMILY_NAMES)}")


def _by_probability(name: str, fit: Callable[[ExitTable], Callable[[float], Policy]]) -> Family:
    probabilities = [0.0, *torch.sigmoid(torch.linspace(-10.0, 4.0, 113, dtype=torch.float64)).tolist()]
    return Family(name, fit, lambda table: probabilities, lambda p: f"probability {p:.2g}")


def _threshold_policies(table: ExitTable, statistic: str) -> Callable[[float], Policy]:
    benefit = Benefit.fit(table, [statistic])
    return lambda probability: Threshold(statistic, benefit.thresholds(probability))


def _patience_policies(table: ExitTable) -> Callable[[float], Policy]:
    benefit = Benefit.fit(table, ["disagreement"])
    return lambda probability: Patience(benefit.thresholds(probability))


def _learned_policies(table: ExitTable, names: Sequence[str]) -> Callable[[float], Policy]:
    """The penalty is the one of the lowest log-loss on speakers that the fit has not seen."""
    parts = folds(table)

    def unseen_loss(penalty: float) -> float:
        return sum(Benefit.fit(table.some(~part), names, penalty).log_loss(table.some(part)) for part in parts)

    benefit = Benefit.fit(table, names, min((0.3, 1.0, 3.0, 10.0, 30.0), key=unseen_loss))
    return lambda probability: Learned(benefit.weights, benefit.means, benefit.intercepts, probability)


def _budget_policies(table: ExitTable, cost: str) -> Callable[[float], Policy]:
    """Thresholds that let a fixed share of utterances, the surest, go at each exit; errors are not looked at.

    The shares are exponential weights exp(-rate * cost), the rate such that their mean cost is the budget: of all
    distributions over exits with that cost the one of the largest entropy. EERO (Valade, Hebiri and Gay, UAI 2025)
    has such weights, with the exits' risks in them too; without, audio that nobody transcribed is enough.
    """
    statistic = "nbest_posterior" if "nbest_posterior" in table.statistics else "posterior"
    if statistic not in table.statistics:
        raise ValueError(f"{_NO_CTC} {statistic}")
    doubt, costs = table.statistics[statistic], _shares_of_cost(table, cost)

    def policy(budget: float) -> Policy:
        shares = _exponential_weights(costs, budget)
        left, thresholds = torch.ones(len(table), dtype=torch.bool), {}
        for place, layer in enumerate(table.layers[:-1]):
            leaving = round(float(shares[: place + 1].sum()) * len(table)) - int((~left).sum())
            if leaving > 0:
                here = doubt[left, place].sort().values
                thresholds[layer] = float(here[min(leaving, len(here)) - 1])
                left &= doubt[:, place] > thresholds[layer]  # those of equal doubt leave together
            if not left.any():
                break
        return Threshold(statistic, thresholds)

    return policy


def _exponential_weights(costs: Tensor, budget: float) -> Tensor:
    """softmax(-rate * costs) of mean cost `budget`, by bisection; costs rise."""
    low, high = -1e3, 1e3
    for _ in range(100):
        rate = (low + high) / 2
        if float((torch.softmax(-rate * costs, dim=0) * costs).sum()) > budget:
            low = rate
        else:
            high = rate
    return torch.softmax(-rate * costs, dim=0)


def _shares_of_cost(table: ExitTable, cost: str) -> Tensor:
    """(E,) what each exit costs, as a share of the last one."""
    by_exit = [fixed(table, layer) for layer in table.layers]
    costs = torch.stack([{"layers": each.layers, "macs": each.macs}[cost].sum() for each in by_exit])
    return costs / costs[-1]


def _deadline_policies(table: ExitTable) -> Callable[[float], Policy]:
    """Lines through the measured seconds against frames: block by block, so that deeper exits take longer."""
    frames = table.statistics["frames"]
    blocks = torch.cat([table.encoder_seconds[:, :1], table.encoder_seconds.diff(dim=1)], dim=1) + table.head_seconds
    encoder, answer, so_far = {}, {}, (0.0, 0.0)
    for place, layer in enumerate(table.layers):
        a, b = _rising_line(frames[:, place], blocks[:, place])
        so_far = encoder[layer] = (so_far[0] + a, so_far[1] + b)
        answer[layer] = _rising_line(frames[:, place], table.search_seconds[:, place])
    return lambda seconds: Deadline(seconds, encoder, answer)


def _rising_line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """a, b >= 0 of a + b x, by least squares; without the one that would be negative."""
    centred = x - x.mean()
    b = float((centred * y).sum() / centred.square().sum().clamp(min=1e-12))
    a = float(y.mean() - b * x.mean())
    if b < 0:
        return float(y.mean()), 0.0
    return (a, b) if a >= 0 else (0.0, float((x * y).sum() / x.square().sum().clamp(min=1e-12)))


_NO_LIMIT = 1e6
"""seconds, of a deadline that cuts nothing short (JSON has no infinity)"""


def _deadline_settings(table: ExitTable) -> list[float]:
    seconds = [fixed(table, layer).seconds for layer in (table.layers[0], table.layers[-1])]
    limits = torch.linspace(float(seconds[1].max()) * 1.2, float(seconds[0].min()), 41, dtype=torch.float64)
    return [_NO_LIMIT, *limits.tolist()]


# ---- choosing the setting by a target


class Target(NamedTuple):
    """What a policy is fitted to."""

    kind: str
    """max_relative_wer, layers, macs (a share of the last exit's) or rtf"""
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


class Fitted(NamedTuple):
    """A policy, its setting, and what it does on the calibration set with each speaker left out of the fit in turn."""

    policy: Policy
    setting: str
    wer: float
    last_wer: float
    layers: float
    macs_share: float
    rtf: float


def folds(table: ExitTable, most: int = 10) -> list[Tensor]:
    """Masks (U,) that part the utterances: by speakers, where three or more are known, else by turns."""
    speakers = sorted(set(table.speakers))
    if len(speakers) < 3 or "" in speakers:
        groups = [number % min(most, len(table)) for number in range(len(table))]
    else:
        groups = [speakers.index(speaker) % min(most, len(speakers)) for speaker in table.speakers]
    found = torch.tensor(groups)
    return [found == group for group in sorted(set(groups))]


def calibrate(table: ExitTable, family: Family, target: Target) -> Fitted:
    """The family's policy, fitted to all of `table`, with the setting that meets `target`.

    Every setting is judged on utterances that the fit has not seen: the speakers are left out in turn.

    For max_relative_wer x, the errors that leaving early adds may be x times the last exit's errors. What it takes away
    elsewhere is not set against them: utterances that an earlier exit happens to have right are as many on a small set
    as those that it loses, and other ones on the next set. Taken is the shallowest setting before the first, from the
    deepest on, that adds more. For a cost it is the deepest setting that costs no more.

    Raises:
      ValueError: fewer than two utterances, no reference words, or a cost below that of the first exit.
    """
    if len(table) < 2:
        raise ValueError(f"{len(table)} utterances to calibrate on; give two at the least, and better hundreds")
    if float(table.ref_words.sum()) == 0:
        raise ValueError("the calibration set has no reference words; check the supervisions' text")
    settings = family.settings(table)
    unseen, last_unseen = _unseen(table, family, settings)
    errors, layers, macs, seconds = (torch.stack([o[i].sum() for o in unseen]) for i in (1, 2, 3, 4))
    last = fixed(table, table.layers[-1])
    audio = float(table.audio_seconds.sum())
    if target.kind == "max_relative_wer":
        added = torch.stack([(each.errors - last_unseen.errors).clamp(min=0.0).sum() for each in unseen])
        over = (added > float(last.errors.sum()) * target.value + 1e-9).nonzero().flatten().tolist()
        chosen = max(0, (over[0] if over else len(settings)) - 1)
    else:
        costs = {
            "layers": layers / len(table),
            "macs": macs / last.macs.sum(),
            "rtf": seconds / audio,
        }[target.kind]
        within = (costs <= target.value + 1e-9).nonzero().flatten().tolist()
        if not within:
            raise ValueError(
                f"no setting of {family.name} costs at most {target}; the least is {float(costs.min()):.3g}: give "
                "more, or take another policy"
            )
        chosen = within[0]
    words = float(table.ref_words.sum())
    return Fitted(
        family.fit(table)(settings[chosen]),
        family.describe(settings[chosen]),
        wer=100.0 * float(errors[chosen]) / words,
        last_wer=100.0 * float(last.errors.sum()) / words,
        layers=float(layers[chosen]) / len(table),
        macs_share=float(macs[chosen] / last.macs.sum()),
        rtf=float(seconds[chosen]) / audio,
    )


def _unseen(table: ExitTable, family: Family, settings: Sequence[float]) -> tuple[list[Outcome], Outcome]:
    """For each setting the outcome over all utterances, each by a policy fitted without its speaker; and the last
    exit's, in the same order."""
    by_part = []
    for part in folds(table):
        policies, rest = family.fit(table.some(~part)), table.some(part)
        by_part.append([*(outcome(policies(setting), rest) for setting in settings), fixed(rest, table.layers[-1])])
    *unseen, last = (Outcome(*(torch.cat(values) for values in zip(*each))) for each in zip(*by_part))
    return unseen, last
