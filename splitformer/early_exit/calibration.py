"""Fitting an exit policy to a table of exits, so that it meets a target.

A calibration set runs through all exits once. Its `ExitTable` keeps statistics, errors and costs, so that the result of
a policy is computed without the model, and thousands of settings take seconds.

A threshold for each exit, chosen freely for the fewest errors on a hundred utterances, overfits: exits that are better
than deeper ones by chance are taken everywhere. Instead, a logistic regression over all exits makes a statistic s
comparable between them,

    logit P(a deeper exit has fewer errors) = a_exit + w f(s),

with one slope for all exits, and an intercept for each that is drawn towards a common one (pooled Platt scaling). One
probability p for all exits then gives a threshold for each: exit where a_exit + w f(s) <= logit p. The curve of WER
against cost therefore has one free number, the setting, which is chosen by cross-validation over speakers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from splitformer.early_exit.exit_table import ExitTable, Outcome, fixed, outcome
from splitformer.early_exit.names import POLICIES
from splitformer.early_exit.policies import (
    FLOOR,
    CannotFit,
    Deadline,
    Fixed,
    Learned,
    Patience,
    Policy,
    Regression,
    Threshold,
    feature,
)
from splitformer.errors import UserError

# ---- the regression


def fit_regression(table: ExitTable, names: Sequence[str], penalty: float = 1.0) -> Regression:
    """Fit the regression on statistics `names` to all utterances at all exits but the last.

    Minimises the sum of log-losses + penalty / 2 * (sum of squares of the weights, for features scaled to variance 1,
    and of the intercepts' differences from a common one, which is free). Exits at which no statistic is known, as
    `disagreement` at the first, are left out.
    """
    features = torch.stack([feature(name, table.statistics[name][:, :-1]) for name in names], dim=2)  # (U, E - 1, K)
    known = ~features.isnan().all(dim=2).all(dim=0)
    layers = list(itertools.compress(table.layers[:-1], known.tolist()))
    features = features[:, known]
    means = features.flatten(0, 1).nanmean(dim=0).nan_to_num()  # the mean of nothing is NaN
    features = torch.where(features.isnan(), means, features) - means
    scales = features.flatten(0, 1).square().mean(dim=0).sqrt().nan_to_num().clamp(min=1e-9)
    best_deeper = table.errors.flip(1).cummin(dim=1).values.flip(1)[:, 1:]
    target = (best_deeper < table.errors[:, :-1])[:, known].double().flatten()

    exits = torch.eye(len(layers), dtype=torch.float64).repeat(len(table), 1)
    x = torch.cat([torch.ones(len(target), 1), exits, (features / scales).flatten(0, 1)], dim=1)
    penalties = torch.full((x.size(1),), penalty, dtype=torch.float64)
    penalties[0] = 1e-6
    b = logistic_regression(x, target, penalties)
    weights = b[1 + len(layers) :] / scales
    intercepts = b[0] + b[1 : 1 + len(layers)] - (weights * means).sum()
    return Regression(
        dict(zip(names, weights.tolist())), dict(zip(names, means.tolist())), dict(zip(layers, intercepts.tolist()))
    )


def log_loss(regression: Regression, table: ExitTable) -> float:
    """Return the sum of log-losses over utterances and exits."""
    total = 0.0
    for place, layer in enumerate(table.layers[:-1]):
        if layer in regression.intercepts:
            logit = regression.logit(layer, {name: table.statistics[name][:, place] for name in regression.weights})
            better = (table.errors[:, place + 1 :].amin(dim=1) < table.errors[:, place]).double()
            total += float(binary_cross_entropy_with_logits(logit, better, reduction="sum"))
    return total


def thresholds(regression: Regression, probability: float) -> dict[int, float]:
    """Return for each exit the largest value of the one statistic at which P is at most `probability`.

    Empty for probability 0, and where P falls with the statistic, which then does not measure uncertainty.
    """
    [(name, weight)] = regression.weights.items()
    if weight <= 0 or probability == 0:
        return {}
    logit = math.log(probability / (1.0 - probability))
    edges = {layer: (logit - intercept) / weight for layer, intercept in regression.intercepts.items()}
    if name == "disagreement":
        return edges
    return {layer: math.exp(min(edge, 50.0)) - FLOOR for layer, edge in edges.items()}


def logistic_regression(x: Tensor, target: Tensor, penalties: Tensor, steps: int = 50) -> Tensor:
    """Return the b that minimises the sum of log-losses of x @ b for target (0 or 1) + sum of penalties / 2 * b^2.

    Newton's method on a strictly convex objective; a step that does not lower it is halved.
    """

    def objective(b: Tensor) -> Tensor:
        losses = binary_cross_entropy_with_logits(x @ b, target, reduction="sum")
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


# ---- families: policies of one kind with one free number


Fit = Callable[[ExitTable], Callable[[float], Policy]]


class Family(NamedTuple):
    """Policies that differ in one number, the setting.

    fit: learns all else from a table, and returns the policy of a setting.
    settings: from the deepest, with which all utterances reach the last exit, to the shallowest.
    describe: formats a setting.
    """

    name: str
    fit: Fit
    settings: Callable[[ExitTable], list[float]]
    describe: Callable[[float], str]


LEARNED_FROM = ("entropy", "posterior", "disagreement", "frames")
"""Statistics of `learned`. `learned_nbest` reads nbest_posterior too, for which every exit on the way is searched."""

Cost = Literal["layers", "macs"]


def make_family(name: str, cost: Cost = "macs") -> Family:
    """Return the family of the policy `name`, one of `names.POLICIES`.

    The setting of `budget` is a share of `cost`. That cannot be seconds, because an uncertain exit may take longer to
    search than the last exit takes altogether.
    """
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}; choose among {', '.join(POLICIES)}")
    by_probability = (_probabilities, "probability {:.2g}".format)
    families: dict[str, tuple[Fit, Callable[[ExitTable], list[float]], Callable[[float], str]]] = {
        "fixed": (lambda table: lambda layer: Fixed(int(layer)), _layers, "layer {:.0f}".format),
        "entropy": (partial(_threshold_policies, statistic="entropy"), *by_probability),
        "entropy_non_blank": (partial(_threshold_policies, statistic="entropy_non_blank"), *by_probability),
        "posterior": (partial(_threshold_policies, statistic="posterior"), *by_probability),
        "nbest_posterior": (partial(_threshold_policies, statistic="nbest_posterior"), *by_probability),
        "patience": (_patience_policies, *by_probability),
        "learned": (partial(_learned_policies, names=LEARNED_FROM), *by_probability),
        "learned_nbest": (partial(_learned_policies, names=(*LEARNED_FROM, "nbest_posterior")), *by_probability),
        "budget": (
            partial(_budget_policies, cost=cost),
            partial(_budgets, cost=cost),
            lambda share: f"{100 * share:.0f} % of {cost}",
        ),
        "deadline": (_deadline_policies, _deadlines, _describe_deadline),
    }
    return Family(name, *families[name])


def _layers(table: ExitTable) -> list[float]:
    return [float(layer) for layer in reversed(table.layers)]


def _probabilities(table: ExitTable) -> list[float]:
    return [0.0, *torch.sigmoid(torch.linspace(-10.0, 4.0, 113, dtype=torch.float64)).tolist()]


def _threshold_policies(table: ExitTable, statistic: str) -> Callable[[float], Policy]:
    regression = fit_regression(table, [statistic])
    return lambda probability: Threshold(statistic, thresholds(regression, probability))


def _patience_policies(table: ExitTable) -> Callable[[float], Policy]:
    regression = fit_regression(table, ["disagreement"])
    return lambda probability: Patience(thresholds(regression, probability))


def _learned_policies(table: ExitTable, names: Sequence[str]) -> Callable[[float], Policy]:
    """The penalty is the one with the lowest log-loss in cross-validation."""
    held_out = folds(table)

    def unseen_loss(penalty: float) -> float:
        return sum(log_loss(fit_regression(table.some(~fold), names, penalty), table.some(fold)) for fold in held_out)

    regression = fit_regression(table, names, min((0.3, 1.0, 3.0, 10.0, 30.0), key=unseen_loss))
    return lambda probability: Learned(**vars(regression), probability=probability)


def _budget_policies(table: ExitTable, cost: Cost) -> Callable[[float], Policy]:
    """Return thresholds with which a given share of the utterances, the most certain, exits at each exit.

    The shares are exponential weights exp(-rate * cost), with the rate at which their mean cost is the budget: of all
    distributions over exits with this cost the one of the largest entropy. EERO (Valade, Hebiri and Gay, UAI 2025) has
    the exits' risks in the weights too. Without them audio without transcripts is enough.
    """
    statistic = "nbest_posterior" if "nbest_posterior" in table.statistics else "posterior"
    uncertainty, costs = table.statistics[statistic], _cost_shares(table, cost)

    def policy(budget: float) -> Policy:
        shares = exponential_weights(costs, budget)
        active, limits = torch.ones(len(table), dtype=torch.bool), {}
        for place, layer in enumerate(table.layers[:-1]):
            exiting = round(float(shares[: place + 1].sum()) * len(table)) - int((~active).sum())
            if exiting > 0:
                here = uncertainty[active, place].sort().values
                limits[layer] = float(here[min(exiting, len(here)) - 1])
                active &= uncertainty[:, place] > limits[layer]  # utterances with equal values exit together
            if not active.any():
                break
        return Threshold(statistic, limits)

    return policy


def _budgets(table: ExitTable, cost: Cost) -> list[float]:
    return torch.linspace(1.0, float(_cost_shares(table, cost)[0]), 41, dtype=torch.float64).tolist()


def exponential_weights(costs: Tensor, budget: float) -> Tensor:
    """Return softmax(-rate * costs) with the mean cost `budget`, by bisection of the rate; `costs` rise."""
    low, high = -1e3, 1e3
    for _ in range(100):
        rate = (low + high) / 2
        if float((torch.softmax(-rate * costs, dim=0) * costs).sum()) > budget:
            low = rate
        else:
            high = rate
    return torch.softmax(-rate * costs, dim=0)


def _cost_shares(table: ExitTable, cost: Cost) -> Tensor:
    """Return (E,) the cost of each exit as a share of the last one's."""
    costs = torch.stack([getattr(fixed(table, layer), cost).sum() for layer in table.layers])
    return costs / costs[-1]


def _deadline_policies(table: ExitTable) -> Callable[[float], Policy]:
    """Fit lines to seconds against frames, block by block, so that deeper exits take longer."""
    frames = table.statistics["frames"]
    blocks = torch.cat([table.encoder_seconds[:, :1], table.encoder_seconds.diff(dim=1)], dim=1) + table.head_seconds
    encoder, answer, so_far = {}, {}, (0.0, 0.0)
    for place, layer in enumerate(table.layers):
        a, b = rising_line(frames[:, place], blocks[:, place])
        so_far = encoder[layer] = (so_far[0] + a, so_far[1] + b)
        answer[layer] = rising_line(frames[:, place], table.search_seconds[:, place])
    return lambda seconds: Deadline(seconds, encoder, answer)


def rising_line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return a, b >= 0 of the least-squares line a + b x; where one would be negative, of the best line without it."""
    centred = x - x.mean()
    b = float((centred * y).sum() / centred.square().sum().clamp(min=1e-12))
    a = float(y.mean() - b * x.mean())
    if b < 0:
        return float(y.mean()), 0.0
    return (a, b) if a >= 0 else (0.0, float((x * y).sum() / x.square().sum().clamp(min=1e-12)))


NO_LIMIT = 1e6
"""Seconds of a deadline that is never reached; JSON has no infinity."""


def _deadlines(table: ExitTable) -> list[float]:
    first, last = (fixed(table, layer).seconds for layer in (table.layers[0], table.layers[-1]))
    limits = torch.linspace(float(last.max()) * 1.2, float(first.min()), 41, dtype=torch.float64)
    return [NO_LIMIT, *limits.tolist()]


def _describe_deadline(seconds: float) -> str:
    return "no limit" if seconds == NO_LIMIT else f"{1000 * seconds:.1f} ms"


# ---- choosing the setting


TargetKind = Literal["max_relative_wer", "layers", "macs", "rtf", "deadline_ms"]


@dataclass(frozen=True)
class Target:
    """The target of fitting a policy.

    max_relative_wer: the errors that early exits may add, as a share of the last exit's errors.
    layers: mean layer; macs: share of the last exit's multiply-accumulates; rtf: real-time factor. At most these.
    deadline_ms: milliseconds for each batch, with the policy `deadline`; they are the setting.
    """

    kind: TargetKind
    value: float

    def __post_init__(self) -> None:
        positive = self.value > 0 or (self.value == 0 and self.kind == "max_relative_wer")
        if not (positive and math.isfinite(self.value) and (self.kind != "macs" or self.value <= 1)):
            allowed = {"max_relative_wer": "0 or above", "macs": "a share above 0 and at most 1"}
            raise UserError(f"the target {self} must be {allowed.get(self.kind, 'above 0')}")

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


class Fitted(NamedTuple):
    """A policy and its setting, with the result on the calibration set by cross-validation."""

    policy: Policy
    setting: str
    wer: float
    last_exit_wer: float
    layers: float
    macs_share: float
    rtf: float


def split_by(table: ExitTable) -> Literal["speakers", "utterances"]:
    """Return what the folds of cross-validation separate: speakers, if there are three or more and all are known."""
    return "speakers" if len(set(table.speakers)) >= 3 and "" not in table.speakers else "utterances"


def folds(table: ExitTable, most: int = 10) -> list[Tensor]:
    """Return masks (U,) that partition the utterances; see `split_by`."""
    speakers = sorted(set(table.speakers))
    if split_by(table) == "utterances":
        groups = [number % min(most, len(table)) for number in range(len(table))]
    else:
        groups = [speakers.index(speaker) % min(most, len(speakers)) for speaker in table.speakers]
    of_utterance = torch.tensor(groups)
    return [of_utterance == group for group in sorted(set(groups))]


def calibrate(table: ExitTable, family: Family, targets: Sequence[Target]) -> list[Fitted]:
    """Fit the family's policy to `table`, and for each target choose the setting that meets it.

    Every setting is judged by cross-validation: on utterances of speakers that the fit has not seen, or on other
    utterances if there are too few speakers (`split_by`).

    For max_relative_wer only the errors that early exits add are counted. Errors that they remove elsewhere do not make
    up for them: on a small set an earlier exit is better by chance as often as it is worse, and for other utterances on
    the next set. Of the settings from the deepest on, the last before the first that adds too many errors is chosen.
    For a cost it is the deepest setting that costs no more than the target.

    Raises:
      CannotFit: fewer than two utterances, or no reference words.
      UserError: a cost below that of the cheapest setting.
    """
    if len(table) < 2:
        raise CannotFit(f"the calibration set has {len(table)} utterance(s); give at least two, better hundreds")
    words, audio = float(table.ref_words.sum()), float(table.audio_seconds.sum())
    if words == 0:
        raise CannotFit("the calibration set has no reference words; check the text of its supervisions")
    settings = family.settings(table)
    unseen, last_unseen = _cross_validated(table, family, settings)
    last, policies = fixed(table, table.layers[-1]), family.fit(table)
    last_errors = float(last.errors.sum())
    errors = torch.stack([each.errors.sum() for each in unseen])
    added = torch.stack([(each.errors - last_unseen.errors).clamp(min=0.0).sum() for each in unseen])
    costs = {
        "layers": torch.stack([each.layers.sum() for each in unseen]) / len(table),
        "macs": torch.stack([each.macs.sum() for each in unseen]) / last.macs.sum(),
        "rtf": torch.stack([each.seconds.sum() for each in unseen]) / audio,
    }

    def choose(target: Target) -> int:
        if target.kind == "max_relative_wer":
            over = (added > last_errors * target.value + 1e-9).nonzero().flatten().tolist()
            return max(0, (over[0] if over else len(settings)) - 1)
        within = (costs[target.kind] <= target.value + 1e-9).nonzero().flatten().tolist()
        if not within:
            raise UserError(
                f"no setting of {family.name} costs at most {target}; the cheapest costs "
                f"{float(costs[target.kind].min()):.3g}: raise the target, or choose another policy"
            )
        return within[0]

    return [
        Fitted(
            policies(settings[place]),
            family.describe(settings[place]),
            wer=100.0 * float(errors[place]) / words,
            last_exit_wer=100.0 * last_errors / words,
            layers=float(costs["layers"][place]),
            macs_share=float(costs["macs"][place]),
            rtf=float(costs["rtf"][place]),
        )
        for place in map(choose, targets)
    ]


def _cross_validated(table: ExitTable, family: Family, settings: Sequence[float]) -> tuple[list[Outcome], Outcome]:
    """Return each setting's outcome, by policies that were fitted without the utterance's fold, and the last exit's."""
    by_fold = []
    for fold in folds(table):
        policies, rest = family.fit(table.some(~fold)), table.some(fold)
        by_fold.append([*(outcome(policies(setting), rest) for setting in settings), fixed(rest, table.layers[-1])])
    *unseen, last = (Outcome(*(torch.cat(values) for values in zip(*each))) for each in zip(*by_fold))
    return unseen, last
