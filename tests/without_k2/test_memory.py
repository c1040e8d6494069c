"""The dry run on the largest batches: what it measures, what it proposes, and that it leaves nothing behind."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from splitformer.data.plan import plan_epoch
from splitformer.training import memory
from splitformer.training.loop import Trainer
from splitformer.training.memory import DoesNotFit, DryRun, Shape, check_memory, pessimistic_shapes
from tests.training_runs import ALONE, options, same, small_config

MIB = 2**20


@pytest.fixture
def trainer(corpus, tmp_path):
    config = small_config(num_epochs=1)
    config = replace(config, model=replace(config.model, subsampling_channels=128))  # needs much memory
    return Trainer(config, options(corpus, tmp_path / "exp"), ALONE)


@pytest.fixture
def dry_run(trainer):
    return DryRun(trainer.loss, trainer.optimizer, trainer.precision, ALONE)


def set_max_duration(data, seconds):
    data.config = replace(data.config, data=replace(data.config.data, max_duration=seconds))


@pytest.mark.parametrize("count", [1, 3])
def test_no_micro_batch_is_larger_than_the_pessimistic_shapes(count):
    random = np.random.default_rng(0)
    durations = random.gamma(4.0, 3.0, size=500).clip(0.5, 38)
    tokens = random.integers(1, 200, size=500)
    plan = plan_epoch(durations, 120.0, 10, seed=3, epoch=1)
    shapes = pessimistic_shapes(plan, durations, tokens, count)
    assert 1 <= len(shapes) <= 3
    for number in range(len(plan)):
        for index in range(count):
            cuts = plan.micro_batch(number, index, count)
            n, frames, labels = len(cuts), durations[cuts].max() * 100, tokens[cuts].max()
            assert n * frames <= max(s.utterances * s.frames for s in shapes)
            assert n * frames**2 <= max(s.utterances * s.frames**2 for s in shapes)
            assert n * frames * labels <= max(s.utterances * s.frames * s.labels for s in shapes)


def test_the_peak_grows_with_the_batch_and_nothing_is_left(trainer, dry_run):
    before = {name: tensor.clone() for name, tensor in trainer.loss.state_dict().items()}
    small = dry_run.peak([Shape(2, 500, 5)])
    large = dry_run.peak([Shape(2, 500, 5), Shape(32, 500, 5)])
    again = dry_run.peak([Shape(2, 500, 5)])
    feature_bytes = 32 * 500 * 80 * 4
    assert large.used - small.used > feature_bytes, "less than the features alone"
    assert again.used < large.used, "this is the peak of an earlier trial"
    assert same(before, trainer.loss.state_dict())
    assert all(parameter.grad is None for parameter in trainer.loss.parameters())


@pytest.mark.slow
def test_the_error_says_what_would_fit(trainer, dry_run, monkeypatch):
    data = trainer.data
    set_max_duration(data, 10_000.0)  # the whole corpus in one batch
    whole = check_memory(dry_run, data, 1, 1)
    room = (whole.used - dry_run.peak([Shape(1, 300, 3)]).used) / 2

    def available(device):
        memory.reset_peak(device)  # oneDNN keeps the kernels of all shapes so far: they count as in use
        return memory.process_memory("VmRSS") + room

    monkeypatch.setattr(memory, "available_memory", available)
    monkeypatch.setattr(memory, "TRIALS", 3)
    with pytest.raises(DoesNotFit, match=r"--accum-grad (\d+) makes it fit with the same batches; otherwise, the "
                                         r"largest data\.max_duration that fits is \d+$") as caught:  # fmt: skip
        check_memory(dry_run, data, 1, 1)
    proposed = re.search(r"--accum-grad (\d+) .* is (\d+)$", str(caught.value))
    # libraries keep much of the memory for so small a model, so that less fits than half the batch
    assert int(proposed[1]) > 1 and 1.8 < int(proposed[2]) < 145, "between one utterance and the whole corpus"
    check_memory(dry_run, data, 1, int(proposed[1]))
    set_max_duration(data, float(proposed[2]))
    check_memory(dry_run, data, 1, 1)
    monkeypatch.setattr(memory, "available_memory", lambda device: 10 * MIB)
    with pytest.raises(DoesNotFit, match=r"nor does a batch of the longest utterance alone.*max_utterance_seconds"):
        check_memory(dry_run, data, 1, 1)


def test_an_allocation_that_fails_ends_the_run_before_it_starts(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "TRIALS", 2)
    trainer = Trainer(small_config(num_epochs=1), options(corpus, tmp_path / "exp"), ALONE)
    forward = trainer.loss.forward

    def allocate(x, *args, **kwargs):
        if x.size(0) > 40:
            torch.empty(2**55)  # fails like a real allocation
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(trainer.loss, "forward", allocate)
    set_max_duration(trainer.data, 200.0)
    before = {name: tensor.clone() for name, tensor in trainer.loss.state_dict().items()}
    with pytest.raises(DoesNotFit, match=r"batch of 80 x 1.8 s does not fit into.*allocate.*--accum-grad 2"):
        trainer.train()
    assert same(before, trainer.loss.state_dict())
    assert not list(trainer.options.exp_dir.glob("*.pt")) and not (trainer.options.exp_dir / "training.jsonl").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(trainer, dry_run, monkeypatch):
    monkeypatch.setattr(trainer.loss, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dry_run.peak([Shape(1, 100, 1)])
