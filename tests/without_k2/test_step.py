"""A training step: the host does not wait for the device, and the device decides as the host would."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from splitformer.checkpoint import load_checkpoint
from splitformer.config import LossConfig, OptimConfig
from splitformer.data.batch import Batch
from splitformer.data.cut_index import DataError
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from splitformer.report.records import read_training_log
from splitformer.training import loop
from splitformer.training.distributed import Ranks
from splitformer.training.loop import Stopped, Trainer, TrainingError
from splitformer.training.optim import adamw
from splitformer.training.precision import Precision
from splitformer.training.saving import newest_first
from splitformer.training.step import Stepper, joined_buffers, silence
from tests.models import SMALL
from tests.training_runs import ALONE, options, same, small_config

# ---- waiting for the device

META = torch.device("meta")
"""Its tensors have no values: whatever has to read one fails, as it would have to wait on a GPU."""


class Device(TorchDispatchMode):
    """Takes META for a GPU: counts the copies for which the host would wait, and computes CTC losses without values."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), kwargs or {}
        if name.startswith("aten._ctc_loss_backward"):
            return torch.empty_like(args[1])
        if name.startswith("aten._ctc_loss"):
            log_probs, _, *lengths = args[:4]
            self.waits += [name for each in lengths if isinstance(each, torch.Tensor) and each.is_meta]
            frames, batch, _ = log_probs.shape
            return log_probs.new_empty(batch), log_probs.new_empty(batch, frames, 9)
        if name.startswith("aten.convolution_backward"):  # torch 1 has none for META
            grad, x, weight = args[:3]
            return torch.empty_like(x), torch.empty_like(weight), grad.new_empty(grad.size(1))
        if name.startswith("aten._to_copy") and "device" in kwargs:
            if not kwargs.get("non_blocking") and args[0].device != torch.device(kwargs["device"]):
                self.waits.append(name)
            if args[0].is_meta and torch.device(kwargs["device"]).type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class Optimizer(torch.optim.SGD):
    """Stands for an optimizer that leaves out steps on the device."""

    def step(self, closure=None):
        assert self.found_inf.is_meta and self.grad_scale is None


def batch(num=3, frames=120):
    x_lens, y_lens = torch.linspace(frames // 2, frames, num).long(), torch.arange(1, num + 1)
    y = torch.randint(1, SMALL.vocab_size, (num, num))
    return Batch(torch.randn(num, frames, SMALL.num_mel_bins), x_lens, y, y_lens, [], ["a"] * num, [1.0] * num, {})


def test_the_host_does_not_wait_for_the_device_inside_a_step():
    loss = MultiExitLoss(AsrModel(SMALL), LossConfig()).to(META).train()
    stepper = Stepper(loss, Optimizer(loss.parameters(), lr=0.1), Precision("fp32", META), Ranks(0, 1, META), 1.0)
    stepper.deferred = True
    with Device() as device:
        for number in (1, 2):
            step = stepper.gradients(number, [batch(), batch(2)], [(1,), (2,)], 9.0)
            stepper.update(step)
    assert device.waits == []
    assert len(stepper.read(step).per_exit) == len(SMALL.exit_layers)
    # the same counts what such a step must not do
    theirs = batch().to(META)
    with Device() as device:
        loss(theirs.x, theirs.x_lens, theirs.y, theirs.y_lens, 1, num_tokens=9.0)
    assert len(device.waits) == 2, "the loss of lengths on the device"


# ---- the device decides

needs_fused = pytest.mark.skipif(
    torch.__version__.startswith("1."), reason="this torch has no optimizer that leaves out steps on a CPU"
)


def fused_adamw(parameters, config):
    return torch.optim.AdamW(parameters, betas=(config.beta1, config.beta2), fused=True)


@pytest.fixture
def fused(monkeypatch):
    """Training uses the fused optimizer on a CPU, too."""
    monkeypatch.setattr(loop, "adamw", fused_adamw)


def trainer(corpus, exp_dir, deferred, **more):
    made = Trainer(small_config(num_epochs=1, average_period=3), options(corpus, exp_dir, **more), ALONE)
    assert made.stepper.deferred
    made.stepper.deferred = deferred
    return made


def poison(trainer, batches_to_poison, action, epoch_to_poison=1):
    """Call `action(batch)` on these batches of an epoch, counted from 1, before they are used."""
    real = trainer.data.batches

    def batches(plan, epoch, first, *args):
        for number, each in enumerate(real(plan, epoch, first, *args), start=first + 1):
            if epoch == epoch_to_poison and number in batches_to_poison:
                action(each)
            yield each

    trainer.data.batches = batches


def spoil(batch):
    batch.x[0, 3, 2] = float("nan")


def assert_same_state(ours, theirs):
    a, b = load_checkpoint(ours), load_checkpoint(theirs)
    assert same(a["model"], b["model"]) and same(a["average"], b["average"])
    assert (a["average_step"], a["progress"]["step"]) == (b["average_step"], b["progress"]["step"])
    for number, state in b["optimizer"].items():
        assert same(a["optimizer"][number], state)


@needs_fused
def test_where_the_device_decides_a_run_is_the_same(corpus, tmp_path, fused):
    for name, deferred in (("host", False), ("device", True)):
        run = trainer(corpus, tmp_path / name, deferred)
        poison(run, {2, 3, 6}, spoil)
        run.train()
    assert_same_state(tmp_path / "device" / "epoch-1.pt", tmp_path / "host" / "epoch-1.pt")
    host, device = (read_training_log(tmp_path / name / "training.jsonl") for name in ("host", "device"))
    assert [e.skipped_steps for e in device] == [3]
    for a, b in zip(host, device, strict=True):
        assert (a.train_loss_per_exit, a.gradient_norm, a.dev_wer_per_exit) == (
            b.train_loss_per_exit, b.gradient_norm, b.dev_wer_per_exit
        )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "device" / "bad-batches").iterdir()) == [
        f"step-{step}-rank-0.pt" for step in (2, 3, 6)
    ]


@needs_fused
@pytest.mark.parametrize("first", ["plain", "fused"])
def test_a_checkpoint_does_not_decide_how_the_optimizer_computes(corpus, tmp_path, monkeypatch, first):
    for kind in (first, "fused" if first == "plain" else "plain"):
        with monkeypatch.context() as patch:
            if kind == "fused":
                patch.setattr(loop, "adamw", fused_adamw)
            epochs = 1 if kind == first else 2
            run = Trainer(small_config(num_epochs=epochs), options(corpus, tmp_path), ALONE)
            assert run.stepper.deferred == bool(run.optimizer.param_groups[0]["fused"]) == (kind == "fused")
            poison(run, {1}, spoil, epoch_to_poison=epochs)
            run.train()
    assert [record.skipped_steps for record in read_training_log(tmp_path / "training.jsonl")] == [1, 1]
    assert all(torch.isfinite(each).all() for each in load_checkpoint(tmp_path / "epoch-2.pt")["model"].values())


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The last checkpoint of an undisturbed run."""
    exp_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "adamw", fused_adamw)
        trainer(corpus, exp_dir, deferred=True).train()
    return exp_dir / "epoch-1.pt"


@needs_fused
@pytest.mark.parametrize("event", ["signal", "data", "too many", "memory"])
def test_where_the_device_decides_a_run_that_ends_early_resumes_exactly(corpus, tmp_path, fused, whole, event):
    def happen(batch):
        if event == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif event == "data":
            raise DataError("the disk is gone")
        elif event == "memory":
            run.loss.register_forward_pre_hook(no_memory)
        else:
            spoil(batch)

    run = trainer(corpus, tmp_path / "ended", deferred=True, max_skipped=0)
    poison(run, {5}, happen)
    with pytest.raises((Stopped, DataError, TrainingError)) as ended:
        run.train()
    if event == "too many":
        assert "up to step 5" in str(ended.value)
    else:
        steps = {"signal": 5, "data": 4, "memory": 4}[event]
        assert load_checkpoint(newest_first(tmp_path / "ended")[0])["progress"]["step"] == steps
    trainer(corpus, tmp_path / "ended", deferred=True).train()
    assert_same_state(tmp_path / "ended" / "epoch-1.pt", whole)


def no_memory(module, inputs):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 10.76 GiB total capacity)")


def test_memory_that_runs_out_in_a_step_saves_the_state_and_names_remedies(corpus, tmp_path):
    whole = Trainer(small_config(num_epochs=1), options(corpus, tmp_path / "whole"), ALONE)
    whole.train()
    run = Trainer(small_config(num_epochs=1), options(corpus, tmp_path / "ended"), ALONE)
    poison(run, {4}, lambda batch: run.loss.model.encoder.layers[1].register_forward_pre_hook(no_memory))
    with pytest.raises(TrainingError, match=r"rank 0 ran out after step 3 \(CUDA out of memory.*--accum-grad 2"):
        run.train()
    Trainer(small_config(num_epochs=1), options(corpus, tmp_path / "ended"), ALONE).train()
    assert_same_state(tmp_path / "ended" / "epoch-1.pt", tmp_path / "whole" / "epoch-1.pt")


def test_a_rank_without_data_changes_no_weights():
    loss = MultiExitLoss(AsrModel(replace(SMALL, cmvn="utterance")), LossConfig()).train()
    stepper = Stepper(loss, adamw(loss.parameters(), OptimConfig()), Precision("fp32", ALONE.device), ALONE, 1.0)
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    step = stepper.gradients(1, [silence(SMALL.num_mel_bins)], [(1,)], 5.0, without_data=True)
    stepper.update(step)
    assert stepper.read(step).without_data == 1 and stepper.read(step).finite
    assert same(dict(loss.state_dict()), before)


def test_joined_buffers_are_those_of_the_module():
    module = AsrModel(SMALL)
    expected = {name: buffer.clone() for name, buffer in module.named_buffers()}
    joined = joined_buffers(module)
    assert len(joined) == 2, "float32 and int64"
    assert all(torch.equal(buffer, expected[name]) for name, buffer in module.named_buffers())
    for each in joined:
        each.add_(1)
    assert all(torch.equal(buffer, expected[name] + 1) for name, buffer in module.named_buffers())
