"""Exit policies: when an utterance has been heard well enough to leave the encoder.

A policy reads statistics of the exits that an utterance has passed and answers stop or go on. Statistics are numbers
of doubt: the lower, the surer. `Meter` computes them as a batch goes through the exits; a table of them, made once from
all exits of a set, answers what any policy would have done (`splitformer.calibration`). Both ask the same `stops`.

An exit is named by the encoder layer that it follows. The last exit is never asked: whatever gets there leaves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from splitformer.early_exit.statistics import Statistics
from splitformer.errors import UserError
from splitformer.files import atomic_write, read_json

# ---- policies


class Policy(Protocol):
    """What every policy has: a name, the statistics it reads, and the answer."""

    name: ClassVar[str]

    @property
    def needs(self) -> tuple[str, ...]: ...

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        """(n,) true where an utterance leaves at the exit after `layer`; `statistics` holds (n, e) of what it needs."""


@dataclass(frozen=True)
class Fixed:
    """Everything leaves after one layer."""

    name: ClassVar[str] = "fixed"
    layer: int

    @property
    def needs(self) -> tuple[str, ...]:
        return ("frames",)

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        return torch.full((len(statistics["frames"]),), layer >= self.layer)


@dataclass(frozen=True)
class Threshold:
    """Leave where a statistic is at most the exit's threshold.

    With `entropy` the policy of HuBERT-EE (arXiv 2204.06328), with `posterior` and `nbest_posterior` the two of
    arXiv 2309.09546; there one threshold serves all exits. Here each has its own, because a shallow exit is less sure
    of what it has right. An exit without one lets nothing go.
    """

    name: ClassVar[str] = "threshold"
    statistic: str
    thresholds: dict[int, float]

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.statistic,)

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        return statistics[self.statistic][:, -1] <= self.thresholds.get(layer, -math.inf)


@dataclass(frozen=True)
class Patience:
    """Leave where the hypotheses of `consecutive` + 1 exits in a row are each within `tolerance` of the one before.

    PABEE (arXiv 2006.04152) with edit distances for equal classes (arXiv 2211.08989). The tolerance, of `disagreement`,
    is the exit's own, and applies to each of the comparisons.
    """

    name: ClassVar[str] = "patience"
    thresholds: dict[int, float]
    consecutive: int = 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("disagreement",)

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        passed = statistics["disagreement"]
        recent = passed[:, -self.consecutive :]
        enough = recent.size(1) == self.consecutive  # NaN, of the first exit, is within no tolerance
        return (recent <= self.thresholds.get(layer, -math.inf)).all(dim=1) & enough


@dataclass(frozen=True)
class Learned:
    """Leave where the probability that a deeper exit does better is at most `probability`.

    A logistic regression: logit P = intercepts[layer] + sum of weights[name] * f(statistic), f the logarithm (of the
    value plus `FLOOR`), but for `disagreement`, which may be 0 and is taken as it is. What a first exit lacks counts as
    the training's mean, `means`.
    """

    name: ClassVar[str] = "learned"
    weights: dict[str, float]
    means: dict[str, float]
    intercepts: dict[int, float]
    probability: float

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        if layer not in self.intercepts:
            return torch.zeros(len(next(iter(statistics.values()))), dtype=torch.bool)
        logit = self.intercepts[layer]
        for name, weight in self.weights.items():
            value = feature(name, statistics[name][:, -1])
            logit = logit + weight * torch.where(value.isnan(), self.means[name], value)
        return torch.sigmoid(logit) <= self.probability


FLOOR = 1e-4
"""Added before a logarithm: doubts below it are all alike."""


def feature(name: str, value: Tensor) -> Tensor:
    """A statistic as the regressions see it."""
    return value.double() if name == "disagreement" else (value.double().clamp(min=0.0) + FLOOR).log()


@dataclass(frozen=True)
class Deadline:
    """The deepest exit whose answer is due within `seconds` of the batch setting out; always an answer.

    `encoder` gives for each layer (a, b): a + b * frames seconds from setting out to this exit's log-probabilities, and
    `answer` likewise from there to the words, both measured on the machine that runs it. Where it runs slower than it
    was measured, the rest is expected to be slower by as much. Frames are those of the batch, which shares one clock.
    """

    name: ClassVar[str] = "deadline"
    seconds: float
    encoder: dict[int, tuple[float, float]]
    answer: dict[int, tuple[float, float]]

    @property
    def needs(self) -> tuple[str, ...]:
        return ("elapsed", "batch_frames")

    def predicted(self, layer: int, frames: Tensor) -> Tensor:
        """Seconds until the words of the exit after `layer`, of batches of `frames`."""
        return _line(self.encoder[layer], frames) + _line(self.answer[layer], frames)

    def stops(self, layer: int, statistics: Statistics) -> Tensor:
        elapsed, frames = statistics["elapsed"][:, -1], statistics["batch_frames"][:, -1]
        so_far = _line(self.encoder[layer], frames)
        slowness = (elapsed / so_far.clamp(min=1e-9)).clamp(min=1.0)
        # of any deeper exit, not of the next one only: doubtful exits take longer to search
        deeper = torch.stack([self.predicted(each, frames) for each in self.encoder if each > layer])
        rest = deeper.min(dim=0).values - so_far
        return elapsed + rest * slowness > self.seconds


def _line(coefficients: tuple[float, float], frames: Tensor) -> Tensor:
    return coefficients[0] + coefficients[1] * frames


POLICIES: tuple[type[Policy], ...] = (Fixed, Threshold, Patience, Learned, Deadline)


# ---- policy.json


class PolicyError(UserError):
    """A policy that cannot be read, or that was fitted for something else."""


@dataclass(frozen=True)
class FittedPolicy:
    """A policy with what it was fitted for and on; `policy.json` holds it.

    title: what it is called in tables, such as `entropy_non_blank` or `budget`.
    exit_layers, checkpoint: of the model (`checkpoint_id`) that it was fitted for.
    method, options: the search whose errors counted, and its options at each exit.
    fitted_on: the set, its speakers and utterances, the target, and what the policy did there.
    """

    title: str
    policy: Policy
    exit_layers: tuple[int, ...]
    checkpoint: str
    method: str
    options: dict[int, dict[str, float]] = field(default_factory=dict)
    fitted_on: dict[str, Any] = field(default_factory=dict)

    def check(self, exit_layers: Sequence[int], checkpoint: str, source: str = "the policy") -> None:
        """Raises PolicyError unless the policy was fitted for a model with these exits, from this checkpoint."""
        if tuple(exit_layers) != self.exit_layers:
            raise PolicyError(
                f"{source} was fitted for exits after layers {_listed(self.exit_layers)}, and the model has exits "
                f"after {_listed(exit_layers)}; fit it again with bin/calibrate"
            )
        if checkpoint != self.checkpoint:
            raise PolicyError(
                f"{source} was fitted for checkpoint {self.checkpoint}, and this one is {checkpoint}; its thresholds "
                "would mean something else: fit it again with bin/calibrate"
            )

    def save(self, path: str | Path) -> None:
        contents = {**asdict(self), "policy": {"kind": self.policy.name, **asdict(self.policy)}}
        with atomic_write(path) as file:
            json.dump(contents, file, indent=1, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls, path: str | Path) -> FittedPolicy:
        """Raises PolicyError that names the file where it is no policy of this version."""
        try:
            values = read_json(path)
            described = dict(values.pop("policy"))
            kinds = {each.name: each for each in POLICIES}
            kind = kinds.get(described.pop("kind"))
            if kind is None:
                raise PolicyError(f"its kind is none of {', '.join(kinds)}")
            policy = kind(**{name: _with_layers(value) for name, value in described.items()})
            values |= {"exit_layers": tuple(values["exit_layers"]), "options": _with_layers(values["options"])}
            return cls(policy=policy, **values)
        except (PolicyError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise PolicyError(
                f"{path} is no exit policy of this version ({error}); make it with bin/calibrate"
            ) from error


def _with_layers(value: Any) -> Any:
    """JSON's string keys as layers, where all are; lists as tuples."""
    if isinstance(value, dict):
        by_layer = bool(value) and all(isinstance(key, str) and key.isdecimal() for key in value)
        return {int(key) if by_layer else key: _with_layers(each) for key, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
