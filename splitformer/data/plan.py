"""The batches of an epoch, drawn from durations before the epoch starts.

An epoch is a list that depends only on the durations, the seed and the epoch's number. So a run can resume from any
batch at once, without reading data to find its place. Batches are global: a step sees the same utterances whatever the
number of ranks and of accumulated micro-batches; `micro_batch` divides them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from splitformer.errors import UserError


class PlanError(UserError):
    """The utterances do not fit into batches of the configured size."""


@dataclass(frozen=True)
class EpochPlan:
    """The global batches of one epoch, in their order."""

    cuts: np.ndarray
    """(K,) numbers of the cuts, batch after batch, sorted by duration inside a batch"""
    ends: np.ndarray
    """(B,) where each batch ends in `cuts`"""

    def __len__(self) -> int:
        return len(self.ends)

    def batch(self, number: int) -> np.ndarray:
        """Return the cuts of batch `number`, counted from 0."""
        return self.cuts[self.ends[number - 1] if number else 0 : self.ends[number]]

    def micro_batch(self, number: int, index: int, count: int) -> np.ndarray:
        """Return the cuts of micro-batch `index` of the `count` that batch `number` is divided into.

        It takes every `count`-th cut, so that all micro-batches take about as long. Every rank takes part in every
        step: a batch with fewer than `count` cuts is repeated.
        """
        return filled(self.batch(number), count)[index::count]


def filled(batch: np.ndarray, count: int) -> np.ndarray:
    """Return `batch`, repeated to `count` cuts if it has fewer."""
    return batch if len(batch) >= count else np.resize(batch, count)


def plan_epoch(durations: np.ndarray, max_duration: float, num_buckets: int, seed: int, epoch: int) -> EpochPlan:
    """Draw the batches of `epoch`, with cuts of similar length together.

    Cuts are sorted into `num_buckets` of equal total duration, shuffled inside their bucket, and divided into batches;
    the rest of a bucket continues into the next, longer one. Then the batches are shuffled. Every cut comes once.

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
    ends = _batch_ends(durations[order], max_duration)
    # sort each batch by duration, so that micro-batches are alike
    batch_of = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    order = order[np.lexsort((durations[order], batch_of))]
    shuffled = random.permutation(len(ends))
    starts = np.concatenate([[0], ends[:-1]])
    pieces = [order[starts[i] : ends[i]] for i in shuffled]
    cuts = np.concatenate(pieces) if pieces else order
    return EpochPlan(cuts.astype(np.int32), np.cumsum([len(piece) for piece in pieces], dtype=np.int64))


def _buckets(durations: np.ndarray, num_buckets: int) -> np.ndarray:
    """Return the bucket (K,) of each cut, short to long; all buckets have about the same total duration."""
    by_length = np.argsort(durations, kind="stable")
    passed = np.cumsum(durations[by_length], dtype=np.float64)
    buckets = np.empty(len(durations), dtype=np.int32)
    total = passed[-1] if len(passed) else 1.0
    buckets[by_length] = np.minimum(passed / total * num_buckets, num_buckets - 1).astype(np.int32)
    return buckets


def _batch_ends(durations: np.ndarray, max_duration: float) -> np.ndarray:
    """Return where batches end that are filled in order, each up to `max_duration` with padding."""
    ends = []
    start, longest = 0, 0.0
    for i, duration in enumerate(durations.data):  # a list of them all would take four times the memory
        longest = max(longest, duration)
        if (i + 1 - start) * longest > max_duration:
            ends.append(i)
            start, longest = i, duration
    if len(durations):
        ends.append(len(durations))
    return np.array(ends, dtype=np.int64)
