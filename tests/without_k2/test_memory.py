"""The dry run on the largest batches: what it measures, what it says where they do not fit, that it leaves nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from splitformer.data.plan import plan_epoch
from splitformer.training import memory
from splitformer.training.loop import Trainer, TrainingError
from splitformer.training.memory import DoesNotFit, DryRun, Shape, check_memory, pessimistic_shapes
from tests.training_runs import ALONE, options, same, small_config, weights

MIB = 2**20


@pytest.fixture
def trainer(corpus, tmp_path):
    config = small_config(num_epochs=1)
    config = replace(config, model=replace(config.model, subsampling_channels=128))  # takes much memory
    return Trainer(config, options(corpus, tmp_path / "exp"), ALONE)


@pytest.fixture
def dry_run(trainer):
    return DryRun(trainer.loss, trainer.optimizer, trainer.config.model, trainer.precision, ALONE)


@pytest.mark.parametrize("parts", [1, 3])
def test_no_share_of_any_part_is_larger_than_the_pessimistic_ones(parts):
    random = np.random.default_rng(0)
    durations = random.gamma(4.0, 3.0, size=500).clip(0.5, 38)
    tokens = random.integers(1, 200, size=500)
    plan = plan_epoch(durations, 120.0, 10, seed=3, epoch=1)
    shapes = pessimistic_shapes(plan, durations, tokens, parts)
    assert 1 <= len(shapes) <= 3
    for number in range(len(plan)):
        for part in range(parts):
            share = plan.micro_batch(number, part, parts)
            n, frames, labels = len(share), durations[share].max() * 100, tokens[share].max()
            assert n * frames <= max(s.utterances * s.frames for s in shapes)
            assert n * frames**2 <= max(s.utterances * s.frames**2 for s in shapes)
            assert n * frames * labels <= max(s.utterances * s.frames * s.labels for s in shapes)


def test_training_is_the_same_with_and_without_a_dry_run(corpus, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    config = small_config(num_epochs=2)
    Trainer(config, options(corpus, tmp_path / "with"), ALONE).train()
    told = re.search(
        r"dry run on the largest batches \(\d+ x [\d.]+ s.*\): peak memory ([\d.]+) of ([\d.]+) GiB", caplog.text
    )
    assert told and 0.05 < float(told[1]) < float(told[2])
    monkeypatch.setattr(Trainer, "_dry_run", lambda self: None)
    Trainer(config, options(corpus, tmp_path / "without"), ALONE).train()
    assert same(weights(tmp_path / "with/epoch-2.pt"), weights(tmp_path / "without/epoch-2.pt"))


def test_the_peak_grows_with_the_batch_and_nothing_is_left(trainer, dry_run):
    before = {name: tensor.clone() for name, tensor in trainer.loss.state_dict().items()}
    small = dry_run.peak([Shape(2, 500, 5)])
    large = dry_run.peak([Shape(2, 500, 5), Shape(96, 500, 5)])
    again = dry_run.peak([Shape(2, 500, 5)])
    frame_bytes = 96 * 500 * 80 * 4
    assert large.used - small.used > frame_bytes, "less than the features alone"
    assert again.used < large.used, "the peak of an earlier trial"
    assert same(before, trainer.loss.state_dict())
    assert all(parameter.grad is None for parameter in trainer.loss.parameters())


def test_what_does_not_fit_is_told_with_what_does(trainer, dry_run, monkeypatch):
    data = trainer.data
    data.data = replace(data.data, max_duration=10_000.0)  # all of the corpus in one batch
    whole = check_memory(dry_run, data, 1, 1)
    room = (whole.used - dry_run.peak([Shape(1, 300, 3)]).used) / 2

    def available(device):
        memory._reset_peak(device)  # kernels of every shape seen are kept: they count as had
        return memory._resident() + room

    monkeypatch.setattr(memory, "_available", available)
    monkeypatch.setattr(memory, "TRIALS", 3)
    with pytest.raises(DoesNotFit, match=r"--accum-grad (\d+) makes it fit with the same batches; without, the "
                                         r"largest data\.max_duration that fits is \d+$") as caught:  # fmt: skip
        check_memory(dry_run, data, 1, 1)
    told = re.search(r"--accum-grad (\d+) .* is (\d+)$", str(caught.value))
    # half the memory would do for two parts; of so small a model, what libraries keep is no small part
    assert 1 < int(told[1]) <= 16 and 4 < int(told[2]) < 145, "of 1.8 s to 80 times as much"
    check_memory(dry_run, data, 1, int(told[1]))
    data.data = replace(data.data, max_duration=float(told[2]))
    check_memory(dry_run, data, 1, 1)
    monkeypatch.setattr(memory, "_available", lambda device: 10 * MIB)
    with pytest.raises(DoesNotFit, match=r"nor does a batch of the longest utterance alone.*max_utterance_seconds"):
        check_memory(dry_run, data, 1, 1)


def test_an_allocation_that_fails_is_told_and_nothing_is_left(corpus, tmp_path, trainer, monkeypatch):
    forward = trainer.loss.forward

    def allocate(x, *args, **kwargs):
        if x.size(0) > 40:
            torch.empty(2**55)  # fails as the real thing does, being it
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(trainer.loss, "forward", allocate)
    trainer.data.data = replace(trainer.data.data, max_duration=200.0)
    before = {name: tensor.clone() for name, tensor in trainer.loss.state_dict().items()}
    with pytest.raises(TrainingError, match=r"batch of 80 x 1.8 s does not fit into.*allocate.*--accum-grad 2"):
        trainer.train()
    assert same(before, trainer.loss.state_dict())
    assert not list(trainer.options.exp_dir.glob("*.pt")) and not (trainer.options.exp_dir / "training.jsonl").exists()


def test_another_error_than_memory_is_not_taken_for_it(trainer, dry_run, monkeypatch):
    monkeypatch.setattr(trainer.loss, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dry_run.peak([Shape(1, 100, 1)])
