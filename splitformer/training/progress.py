"""Progress of a run: the results of each step, the sums of an epoch, and the state saved in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepResult:
    """The result of one step over all ranks. Losses are per label token."""

    loss: float
    loss_per_exit: list[float]
    norm: float  # of the gradients, before clipping
    tokens: float
    frames: float
    unreadable: int  # cuts that were left out of the batch
    skipped: bool  # the gradients were not finite, and the weights did not change
    bad: bool  # skipped, and float16's loss scale was not the cause
    stop: bool  # a rank was asked to stop
    exact: bool  # weights and batch statistics are those after this step: the next has not begun
    seconds: float
    waited: float  # seconds of waiting for data


@dataclass
class EpochTotals:
    """Sums over the steps of one epoch and over all ranks."""

    steps: int = 0
    skipped: int = 0
    clipped: int = 0
    unreadable: int = 0
    frames: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    norm: float = 0.0
    loss: float = 0.0
    loss_per_exit: list[float] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochTotals:
        """Return the totals of a checkpoint; older ones call `unreadable` faults."""
        return cls(**{"unreadable" if name == "faults" else name: value for name, value in values.items()})

    def add(self, step: StepResult, max_norm: float) -> None:
        self.steps += 1
        self.unreadable += step.unreadable
        self.frames += step.frames
        self.seconds += step.seconds
        self.waited += step.waited
        if step.skipped:  # its loss may not be finite
            self.skipped += 1
            return
        self.tokens += step.tokens
        self.norm += step.norm
        self.clipped += step.norm > max_norm
        self.loss += step.loss * step.tokens
        sums = self.loss_per_exit or [0.0] * len(step.loss_per_exit)
        self.loss_per_exit = [total + loss * step.tokens for total, loss in zip(sums, step.loss_per_exit, strict=True)]

    def per_token(self, total: float) -> float:
        return total / max(self.tokens, 1.0)

    def per_good_step(self, total: float) -> float:
        return total / max(self.steps - self.skipped, 1)


@dataclass
class Progress:
    """The position of a run; saved in every checkpoint."""

    epoch: int = 0  # complete epochs
    batch: int = 0  # batches done of the next epoch
    step: int = 0
    seconds: float = 0.0
    skipped_in_a_row: int = 0
    totals: dict[str, Any] = field(default_factory=dict)  # `EpochTotals` of the incomplete epoch
