"""Exit policies: decide at each exit which utterances exit there.

A policy reads uncertainty statistics of the exits that an utterance has passed. `Meter` measures them while a batch
runs through the encoder. An `ExitTable` holds them for all exits of a set, so that the result of a policy can be
computed without running the model again. Both call the same `stops`.

An exit is named by the encoder layer that it follows. There is no decision at the last exit: all
remaining utterances exit there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from splitformer.early_exit.statistics import Statistics
from splitformer.errors import UserError
from splitformer.files import atomic_write, read_json


@dataclass(frozen=True)
class Policy:
    """Base class of the policies. `kind` names the class in policy.json."""

    kind: ClassVar[str]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that the policy reads."""
        raise NotImplementedError

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        """Return (n,) true where an utterance exits after `layer`; `statistics` are (n, e) each."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fixed(Policy):
    """All utterances exit at the first exit at or above `layer`."""

    kind = "fixed"
    needs = ("frames",)
    layer: int

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        return torch.full((len(statistics["frames"]),), layer >= self.layer)


@dataclass(frozen=True)
class Threshold(Policy):
    """Utterances exit where a statistic is at most the exit's threshold; without a threshold none exits.

    With `entropy` the policy of HuBERT-EE (arXiv 2204.06328), with `posterior` and `nbest_posterior` those of
    arXiv 2309.09546. These use one threshold for all exits. Here each exit has its own, because shallow exits are less
    certain of correct results.
    """

    kind = "threshold"
    statistic: str
    thresholds: dict[int, float]

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.statistic,)

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        return statistics[self.statistic][:, -1] <= self.thresholds.get(layer, -math.inf)


@dataclass(frozen=True)
class Patience(Policy):
    """Utterances exit where `consecutive` disagreements in a row are at most the threshold of the present exit.

    PABEE (arXiv 2006.04152) with edit distances in place of equal classes (arXiv 2211.08989).
    """

    kind = "patience"
    needs = ("disagreement",)
    thresholds: dict[int, float]
    consecutive: int = 1

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        recent = statistics["disagreement"][:, -self.consecutive :]  # NaN, at the first exit, is below no threshold
        enough = recent.size(1) == self.consecutive
        return (recent <= self.thresholds.get(layer, -math.inf)).all(dim=1) & enough


@dataclass(frozen=True)
class Regression:
    """A logistic regression of whether a deeper exit has fewer errors.

        logit P = intercepts[layer] + sum of weights[name] * feature(name, statistic)

    `means` of the features replace NaN. An exit without an intercept has no prediction.
    """

    weights: dict[str, float]
    means: dict[str, float]
    intercepts: dict[int, float]

    def logit(self, layer: int, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return (n,) logit P at the exit after `layer`, from its statistics (n,)."""
        first = next(iter(statistics.values()))
        logit = torch.full_like(first, self.intercepts[layer], dtype=torch.float64)
        for name, weight in self.weights.items():
            value = feature(name, statistics[name])
            logit = logit + weight * torch.where(value.isnan(), self.means[name], value)
        return logit


FLOOR = 1e-4
"""Added to a statistic before its logarithm is taken."""


def feature(name: str, value: Tensor) -> Tensor:
    """Return the logarithm of a statistic, or itself for `disagreement`, which may be 0."""
    return value.double() if name == "disagreement" else (value.double().clamp(min=0.0) + FLOOR).log()


@dataclass(frozen=True)
class Learned(Regression, Policy):
    """Utterances exit where the probability that a deeper exit has fewer errors is at most `probability`."""

    kind = "learned"
    probability: float

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        present = {name: values[:, -1] for name, values in statistics.items()}
        if layer not in self.intercepts:
            return torch.zeros(len(next(iter(present.values()))), dtype=torch.bool)
        return torch.sigmoid(self.logit(layer, present)) <= self.probability


@dataclass(frozen=True)
class Deadline(Policy):
    """Utterances exit where no deeper exit would give its words within `seconds` after the batch started.

    `encoder` holds for each layer (a, b): a + b * frames seconds from the start to the exit's log-probabilities.
    `answer` holds the same from there to the words. Both were measured on one machine. Where it runs slower than
    measured, the rest is expected to be slower by the same factor. Frames are those of the batch, since its utterances
    share one clock. The words of the first exit may come late.
    """

    kind = "deadline"
    needs = ("elapsed", "batch_frames")
    seconds: float
    encoder: dict[int, tuple[float, float]]
    answer: dict[int, tuple[float, float]]

    def predicted(self, layer: int, frames: Tensor) -> Tensor:
        """Return the seconds until the words of the exit after `layer`, for batches of `frames`."""
        return _line(self.encoder[layer], frames) + _line(self.answer[layer], frames)

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        elapsed, frames = statistics["elapsed"][:, -1], statistics["batch_frames"][:, -1]
        so_far = _line(self.encoder[layer], frames)
        slowness = (elapsed / so_far.clamp(min=1e-9)).clamp(min=1.0)
        # of any deeper exit, not only the next one: the lattice of an uncertain exit takes longer to search
        deeper = torch.stack([self.predicted(each, frames) for each in self.encoder if each > layer])
        rest = deeper.min(dim=0).values - so_far
        return elapsed + rest * slowness > self.seconds


def _line(coefficients: tuple[float, float], frames: Tensor) -> Tensor:
    return coefficients[0] + coefficients[1] * frames


KINDS: dict[str, type[Policy]] = {kind.kind: kind for kind in (Fixed, Threshold, Patience, Learned, Deadline)}


class PolicyError(UserError):
    """A policy that cannot be read, or that was fitted for something else."""


class CannotFit(UserError):
    """No policy can be fitted to these sets, or shown on them. The recipe then continues without one."""

    status = 3


@dataclass(frozen=True)
class FittedPolicy:
    """The contents of policy.json: a policy, and what it was fitted for and on.

    title: name of the policy in tables, such as `entropy_non_blank` or `budget`.
    exit_layers, checkpoint: of the model (`checkpoint_id`) that it was fitted for.
    method, options: the search whose errors were counted, and its options at each exit.
    fitted_on: the set, its utterances and speakers, the target, and the result there.
    """

    title: str
    policy: Policy
    exit_layers: tuple[int, ...]
    checkpoint: str
    method: str
    options: dict[int, dict[str, float]] = field(default_factory=dict)
    fitted_on: dict[str, Any] = field(default_factory=dict)

    def check(self, exit_layers: Sequence[int], checkpoint: str, source: str = "the policy") -> None:
        """Raise PolicyError unless the policy was fitted for this checkpoint and a model with these exits."""
        if tuple(exit_layers) != self.exit_layers:
            ours, theirs = (", ".join(map(str, layers)) for layers in (self.exit_layers, exit_layers))
            raise PolicyError(
                f"{source} was fitted for exits after layers {ours}, and the model has exits after {theirs}; fit it "
                "again with bin/calibrate"
            )
        if checkpoint != self.checkpoint:
            raise PolicyError(
                f"{source} was fitted for checkpoint {self.checkpoint}, and this one is {checkpoint}: its thresholds "
                "do not fit; fit it again with bin/calibrate"
            )

    def save(self, path: str | Path) -> None:
        """Write policy.json."""
        contents = {**asdict(self), "policy": {"kind": self.policy.kind, **asdict(self.policy)}}
        with atomic_write(path) as file:
            json.dump(contents, file, indent=1, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls, path: str | Path) -> FittedPolicy:
        """Read policy.json. Raise PolicyError, naming the file, if it is missing or holds no policy."""
        if not Path(path).is_file():
            raise PolicyError(f"there is no exit policy {path}: bin/calibrate fits one")
        try:
            values = read_json(path)
            described = dict(values.pop("policy"))
            kind = described.pop("kind")
            if kind not in KINDS:
                raise ValueError(f"its kind {kind!r} is none of {', '.join(KINDS)}")
            policy = KINDS[kind](**{name: _from_json(value) for name, value in described.items()})
            values |= {"exit_layers": tuple(values["exit_layers"]), "options": _from_json(values["options"])}
            return cls(policy=policy, **values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PolicyError(f"{path} is not an exit policy ({error}); make it with bin/calibrate") from error


def _from_json(value: Any) -> Any:
    """Return JSON's keys as layers where all are numbers, and lists as tuples."""
    if isinstance(value, dict):
        by_layer = bool(value) and all(isinstance(key, str) and key.isdecimal() for key in value)
        return {int(key) if by_layer else key: _from_json(each) for key, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


def check_disjoint(
    fitted_on: str, utterances: Iterable[str], speakers: Iterable[str], test: str, test_speakers: Mapping[str, str]
) -> str:
    """Check that a test set has no utterance and no speaker of the set that a policy is fitted on.

    If splits were drawn by utterance, the sets share all speakers. Then disjoint utterances suffice, with a warning.

    Args:
      fitted_on, test: names of the sets, for messages.
      utterances, speakers: of the set that the policy is fitted on. Unknown speakers are "".
      test_speakers: {utterance: speaker} of the test set.
    Returns:
      the warning, or "".
    Raises:
      CannotFit: the sets share an utterance, or some of the known speakers but not all.
    """
    known = set(speakers) - {""}
    shared = known & set(test_speakers.values())
    same = set(utterances) & test_speakers.keys()
    if shared and shared == known and not same:
        return (
            f"{test} has all {len(known)} speakers of {fitted_on}, with other utterances: results may be worse for "
            "speakers that the policy was not fitted on"
        )
    for what, names in (("utterances", same), ("speakers", shared)):
        if names:
            raise CannotFit(
                f"{fitted_on} and {test} share {len(names)} {what} ({', '.join(sorted(names)[:5])}): a policy cannot "
                "be evaluated on what it was fitted to; calibrate on a set of other speakers"
            )
    return ""
