"""The batches of an epoch, drawn before it starts, from durations alone.

Because an epoch is a list that depends on nothing but the durations, the seed and the epoch's number, a run can go on
from any batch at once: nothing is read again to find the place. A batch of the plan is global: whatever the number of
ranks and of accumulated parts, a step sees the same utterances, and `share` says who takes which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from splitformer.errors import UserError


class PlanError(UserError):
    """The utterances cannot be cut into batches as the configuration says."""


@dataclass(frozen=True)
class EpochPlan:
    """The global batches of one epoch, in their order."""

    cuts: np.ndarray
    """(K,) numbers of the cuts, batch after batch, rising by duration inside a batch"""
    ends: np.ndarray
    """(B,) where each batch ends in `cuts`"""

    def __len__(self) -> int:
        return len(self.ends)

    def batch(self, number: int) -> np.ndarray:
        """The cuts of the batch `number`, counted from 0."""
        return self.cuts[self.ends[number - 1] if number else 0 : self.ends[number]]

    def share(self, number: int, part: int, parts: int) -> np.ndarray:
        """The cuts of that batch that fall to `part` of `parts`: every so-manieth, so that all take about as long.

        A batch of fewer cuts than parts is repeated, because every rank has to take part in every step.
        """
        return filled(self.batch(number), parts)[part::parts]


def filled(batch: np.ndarray, parts: int) -> np.ndarray:
    """`batch`, repeated where it has fewer cuts than `parts`."""
    return batch if len(batch) >= parts else np.resize(batch, parts)


def plan_epoch(durations: np.ndarray, max_duration: float, num_buckets: int, seed: int, epoch: int) -> EpochPlan:
    """Draw the batches of `epoch`.

    Cuts of similar length are put together: they are sorted into `num_buckets` of equal total duration, shuffled inside
    their bucket, and cut into batches; what is left of a bucket goes on into the next, longer one. Then the batches are
    shuffled. Every cut comes once.

    Args:
      durations: (K,) seconds.
      max_duration: seconds of one global batch, padding included.
    Raises:
      PlanError: an utterance is longer than a batch.
    """
    longest = float(durations.max(initial=0.0))
    if longest > max_duration:
        raise PlanError(
            f"an utterance of {longest:.1f} s does not fit into a batch of data.max_duration = {max_duration:g} s: "
            f"raise that to {math.ceil(longest)} or more, or lower data.max_utterance_seconds"
        )
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(durations))
    order = order[np.argsort(_buckets(durations, num_buckets)[order], kind="stable")]
    ends = _cut(durations[order], max_duration)
    # inside a batch by duration, so that shares are alike
    batch_of = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    order = order[np.lexsort((durations[order], batch_of))]
    shuffled = random.permutation(len(ends))
    starts = np.concatenate([[0], ends[:-1]])
    pieces = [order[starts[i] : ends[i]] for i in shuffled]
    cuts = np.concatenate(pieces) if pieces else order
    return EpochPlan(cuts.astype(np.int32), np.cumsum([len(piece) for piece in pieces], dtype=np.int64))


def _buckets(durations: np.ndarray, num_buckets: int) -> np.ndarray:
    """(K,) the bucket of each cut, from the short ones to the long; all buckets have about the same total duration."""
    by_length = np.argsort(durations, kind="stable")
    passed = np.cumsum(durations[by_length], dtype=np.float64)
    buckets = np.empty(len(durations), dtype=np.int32)
    total = passed[-1] if len(passed) else 1.0
    buckets[by_length] = np.minimum(passed / total * num_buckets, num_buckets - 1).astype(np.int32)
    return buckets


def _cut(durations: np.ndarray, max_duration: float) -> np.ndarray:
    """Where batches end that are filled one after the other, each to a length of max_duration with padding."""
    ends = []
    start, longest = 0, 0.0
    for i, duration in enumerate(memoryview(durations)):  # a list of them all would take four times the memory
        longest = max(longest, duration)
        if (i + 1 - start) * longest > max_duration:
            ends.append(i)
            start, longest = i, duration
    if len(durations):
        ends.append(len(durations))
    return np.array(ends, dtype=np.int64)
