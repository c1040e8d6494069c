"""The plan of an epoch: every cut once, batches of similar lengths that fit, the same for the same seed and epoch."""

from __future__ import annotations

import time

import numpy as np
import pytest

from splitformer.data.plan import PlanError, filled, plan_epoch


def durations(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.3, 16.0, count).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_every_cut_comes_once_and_every_batch_fits(seed):
    random = np.random.default_rng(seed)
    lengths = durations(seed, int(random.integers(1, 400)))
    max_duration = float(random.uniform(16.0, 200.0))
    plan = plan_epoch(lengths, max_duration, int(random.integers(1, 12)), seed, epoch=1)
    batches = [plan.batch(i) for i in range(len(plan))]
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) and len(batch) * lengths[batch].max() <= max_duration * (1 + 1e-6)
        assert (np.diff(lengths[batch]) >= 0).all()


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = durations(0, 300)
    first = plan_epoch(lengths, 60.0, 5, seed=1, epoch=1)
    again = plan_epoch(lengths.copy(), 60.0, 5, seed=1, epoch=1)
    assert np.array_equal(first.cuts, again.cuts) and np.array_equal(first.ends, again.ends)
    for other in (plan_epoch(lengths, 60.0, 5, 1, 2), plan_epoch(lengths, 60.0, 5, 2, 1)):
        assert not np.array_equal(first.cuts, other.cuts)
    # shuffled between batches and inside buckets: neighbours of one epoch are no neighbours in the next
    second = plan_epoch(lengths, 60.0, 5, 1, 2)
    together = {frozenset(plan.batch(i).tolist()) for plan in (first, second) for i in range(len(plan))}
    assert len(together) > 0.9 * (len(first) + len(second))


def test_bucketing_saves_padding():
    lengths = durations(3, 2000)

    def padding(num_buckets: int) -> float:
        plan = plan_epoch(lengths, 120.0, num_buckets, 0, 1)
        padded = sum(len(batch) * lengths[batch].max() for batch in map(plan.batch, range(len(plan))))
        return float(1 - lengths.sum() / padded)

    assert padding(1) > 0.35
    assert padding(30) < 0.06


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_micro_batches_are_alike_and_make_up_the_batch(count):
    lengths = durations(4, 500)
    plan = plan_epoch(lengths, 100.0, 8, 0, 1)
    for number in range(len(plan)):
        batch = plan.batch(number)
        parts = [plan.micro_batch(number, index, count) for index in range(count)]
        assert sorted(np.concatenate(parts)) == sorted(filled(batch, count))
        if len(batch) >= count:
            assert sorted(np.concatenate(parts)) == sorted(batch)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert min(map(len, parts)) >= 1


def test_an_utterance_longer_than_a_batch_is_an_error_with_both_remedies():
    with pytest.raises(PlanError, match=r"of 21\.5 s does not fit .* = 20 s: raise that to 22 or more, or lower"):
        plan_epoch(np.array([1.0, 21.5]), 20.0, 2, 0, 1)


def test_a_million_cuts_are_planned_within_seconds():
    lengths = durations(5, 1_000_000)
    started = time.perf_counter()
    plan = plan_epoch(lengths, 1200.0, 30, 0, 1)
    assert time.perf_counter() - started < 20  # about 2 on an idle core
    assert plan.cuts.nbytes == 4_000_000
