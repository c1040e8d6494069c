"""How far a run has come, and what its steps add up to: part of every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class EpochTotals:
    """Sums over the steps of one epoch, over all ranks; part of every checkpoint."""

    steps: int = 0
    skipped: int = 0
    clipped: int = 0
    faults: int = 0
    frames: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    norm: float = 0.0
    loss: float = 0.0
    loss_per_exit: list[float] = field(default_factory=list)

    def add(self, step: StepResult, max_norm: float) -> None:
        self.steps += 1
        self.faults += step.faults
        self.frames += step.frames
        self.seconds += step.seconds
        self.waited += step.waited
        if step.skipped:  # a loss that is not finite would be the mean's end
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


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all ranks; losses per label token."""

    loss: float
    loss_per_exit: list[float]
    norm: float
    tokens: float
    frames: float
    faults: int
    skipped: bool
    """the gradients were not finite and the weights are as before"""
    bad: bool
    """and that was no matter of float16's loss scale"""
    stop: bool
    seconds: float
    waited: float


@dataclass
class Progress:
    """How far the run has come; saved in every checkpoint."""

    epoch: int = 0
    """epochs that are complete"""
    batch: int = 0
    """batches done of the epoch after them"""
    step: int = 0
    seconds: float = 0.0
    skipped_in_a_row: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    """the `EpochTotals` of the epoch that is not complete"""
