"""Training survives: it is killed, stopped, starved, fed with rubbish, and loses nothing that was made."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from lhotse import CutSet

from splitformer.checkpoint import load_checkpoint
from splitformer.data.cut_index import DataError
from splitformer.report.records import read_training_log
from splitformer.training import loop
from splitformer.training.loop import Trainer, TrainingError
from splitformer.training.saving import newest_first, save_epoch, save_step
from splitformer.training.stopping import Stopped
from tests.training_runs import (
    ALONE,
    ENV,
    TORCHRUN,
    command,
    options,
    same,
    small_config,
    train,
    training_data,
    weights,
)


def start(corpus, tmp_path, exp_dir, *more):
    return subprocess.Popen(
        command(corpus, tmp_path, exp_dir, *more), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENV
    )


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition(), process.communicate()[1]


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The last checkpoint of a run that nothing disturbed."""
    exp_dir = tmp_path_factory.mktemp("uninterrupted")
    run = train(corpus, exp_dir, exp_dir, "--num-workers", "1")
    assert run.returncode == 0, run.stderr
    return exp_dir / "epoch-2.pt"


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_weights(corpus, tmp_path, uninterrupted, seed):
    exp_dir = tmp_path / "exp"
    flags = ["--num-workers", "1", "--save-minutes", "0", "--resume"]
    chance = random.Random(seed)
    starts = 0
    while not (exp_dir / "epoch-2.pt").exists():
        process = start(corpus, tmp_path, exp_dir, *flags)
        starts += 1
        if starts <= 3:
            before = newest_first(exp_dir)[:1]
            # forward, backward, optimiser, writing of a checkpoint: wherever it happens to be
            wait_for(lambda before=before: newest_first(exp_dir)[:1] != before, process)
            time.sleep(chance.uniform(0.0, 0.15))
            process.kill()
        process.communicate()
    assert starts == 4
    assert same(weights(exp_dir / "epoch-2.pt"), weights(uninterrupted))
    ours, theirs = load_checkpoint(exp_dir / "epoch-2.pt"), load_checkpoint(uninterrupted)
    assert ours["progress"]["step"] == theirs["progress"]["step"]
    assert same(ours["average"], theirs["average"])
    for i, state in theirs["optimizer"].items():
        assert same(ours["optimizer"][i], state)
    first, second = (read_training_log(folder / "training.jsonl") for folder in (exp_dir, uninterrupted.parent))
    assert [e.train_loss for e in first] == [e.train_loss for e in second]
    assert [e.dev_wer_per_exit for e in first] == [e.dev_wer_per_exit for e in second]
    assert not list(exp_dir.glob("*-step-*")) and not list(exp_dir.glob(".*.tmp"))


def test_sigterm_saves_and_the_run_goes_on_from_there(corpus, tmp_path, uninterrupted):
    exp_dir = tmp_path / "exp"
    process = start(corpus, tmp_path, exp_dir, "--num-workers", "1")
    wait_for(lambda: (exp_dir / "epoch-1.pt").exists(), process)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    stopped = re.search(r"stopped by SIGTERM after step (\d+); the state is saved", told)
    assert stopped and "Traceback" not in told, told
    newest = newest_first(exp_dir)[0]
    assert load_checkpoint(newest)["progress"]["step"] == int(stopped[1])
    run = train(corpus, tmp_path, exp_dir, "--resume")
    assert run.returncode == 0 and "going on after epoch" in run.stderr
    assert same(weights(exp_dir / "epoch-2.pt"), weights(uninterrupted))


def test_a_stop_during_validation_is_heeded_too(corpus, tmp_path, monkeypatch):
    trainer = Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE)
    evaluate = loop.evaluate

    def stopped_meanwhile(loss, batches, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        seen = list(batches)
        assert not seen
        return evaluate(loss, seen, *rest)

    monkeypatch.setattr(loop, "evaluate", stopped_meanwhile)
    with pytest.raises(Stopped, match="SIGTERM"):
        trainer.train()
    monkeypatch.undo()
    again = Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE)
    assert again.progress.batch == len(again.data.plan(1)) and again.progress.epoch == 0
    again.train()
    [record] = read_training_log(tmp_path / "training.jsonl")
    assert record.train_loss > 0 and record.dev_wer_per_exit


def test_ctrl_c_saves_and_a_second_one_interrupts(corpus, tmp_path):
    trainer = Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE)
    with trainer.stop as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


SAME_ARITHMETIC = ["--set", "model.dropout=0.0", "--set", "augment.p=0.0", "--precision", "fp32"]


def losses_per_step(exp_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(exp_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss_step")]


def test_one_rank_two_ranks_and_accumulation_are_one_training(corpus, tmp_path, monkeypatch):
    """The same global batches give the same losses, whoever computes which part of them."""
    flags = [*SAME_ARITHMETIC, "--set", "training.num_epochs=4"]
    alone = train(corpus, tmp_path, tmp_path / "alone", *flags)
    assert alone.returncode == 0, alone.stderr
    run = subprocess.run(
        [sys.executable, *TORCHRUN, "--nproc_per_node", "2", *command(corpus, tmp_path, tmp_path / "two", *flags)[1:]],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert run.returncode == 0, run.stderr
    one, two = (read_training_log(tmp_path / name / "training.jsonl") for name in ("alone", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, abs=1e-4)
        assert a.train_loss_per_exit == pytest.approx(b.train_loss_per_exit, abs=1e-4)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)
        assert a.dev_wer_per_exit == b.dev_wer_per_exit
    ours, theirs = weights(tmp_path / "two" / "epoch-4.pt"), weights(tmp_path / "alone" / "epoch-4.pt")
    for name, tensor in theirs.items():
        if name.endswith(("depthwise.bias", "batch_norm.running_mean")):
            continue  # batch normalisation takes this bias out: its gradient is rounding, of which AdamW makes steps
        torch.testing.assert_close(ours[name], tensor, atol=2e-3, rtol=0, msg=name)
    assert losses_per_step(tmp_path / "alone")[0][1] == pytest.approx(losses_per_step(tmp_path / "two")[0][1], abs=1e-4)


def test_accumulated_gradients_are_those_of_the_whole_batch(corpus, tmp_path):
    config = small_config()
    config = replace(config, model=replace(config.model, dropout=0.0), augment=replace(config.augment, p=0.0))
    gradients = []
    for accum_grad in (1, 3):
        opts = replace(options(corpus, tmp_path / str(accum_grad)), accum_grad=accum_grad, precision="fp32")
        trainer = Trainer(config, opts, ALONE)
        for module in trainer.loss.modules():  # batch statistics are those of the part
            if isinstance(module, torch.nn.BatchNorm1d):
                module.eval()
        taken = []
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda *a, step=step, taken=taken, trainer=trainer: (
            taken.append([p.grad.clone() for p in trainer.loss.parameters()]),
            step(*a),
        )
        plan = trainer.data.plan(1)
        trainer._step(1, plan, trainer.data.batches(plan, 1, 0, accum_grad, trainer.mine))
        gradients.append(taken[0])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


def poisoned(trainer, bad_steps):
    """The trainer, whose batches hold a NaN in these steps."""
    real = trainer.data.batches

    def batches(*args):
        for number, batch in enumerate(real(*args), start=1):
            if number in bad_steps:
                batch.x[0, 3, 2] = float("nan")
            yield batch

    trainer.data.batches = batches
    return trainer


def test_batches_without_finite_gradients_are_skipped_counted_and_kept(corpus, tmp_path, caplog):
    trainer = poisoned(Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE), {2, 4})
    before = {}

    real = trainer._step

    def step(*args):
        state = {name: tensor.clone() for name, tensor in trainer.loss.state_dict().items()}
        result = real(*args)
        before[trainer.progress.step] = same(state, trainer.loss.state_dict())
        return result

    trainer._step = step
    trainer.train()
    assert {number for number, unchanged in before.items() if unchanged} == {2, 4}  # batch statistics too
    [record] = read_training_log(tmp_path / "training.jsonl")
    assert record.skipped_steps == 2 and np.isfinite(record.train_loss) and np.isfinite(record.gradient_norm)
    assert "step 2 is skipped: its gradients are not finite; cuts: train-" in caplog.text
    kept = torch.load(tmp_path / "bad-batches" / "step-2-rank-0.pt", weights_only=True)
    assert not torch.isfinite(kept["tensors"]["batch"]["x_0"]).all()
    cut_ids = json.loads(kept["plain"]["cut_ids"])[0]
    assert len(cut_ids) == len(kept["tensors"]["batch"]["x_0"])
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "epoch-1.pt").values())


def test_too_many_such_batches_in_a_row_end_the_run(corpus, tmp_path):
    opts = replace(options(corpus, tmp_path), max_skipped=2)
    trainer = poisoned(Trainer(small_config(num_epochs=1), opts, ALONE), {1, 3, 4, 5})
    with pytest.raises(TrainingError, match=r"3 batches in a row had no finite gradients, up to step 5; they are in"):
        trainer.train()


@pytest.fixture
def damaged(corpus, tmp_path):
    """Training cuts of which one has truncated features, one NaN in them, and one none at all; with their ids."""
    _, train_cuts, _, _ = corpus
    cuts = list(CutSet.from_file(train_cuts))
    chosen = cuts[5], cuts[40], cuts[77]
    for i, cut in enumerate(chosen):
        source = cut.features.storage_path + "/" + cut.features.storage_key
        features = np.load(source)
        folder = tmp_path / "features"
        folder.mkdir(exist_ok=True)
        target = folder / f"{i}.npy"
        np.save(target, features)
        if i == 0:
            target.write_bytes(target.read_bytes()[:2000])
        if i == 1:
            features[7, 3] = float("nan")
            np.save(target, features)
        if i == 2:
            target.unlink()
        cut.features.storage_path, cut.features.storage_key = str(folder), target.name
    path = tmp_path / "damaged.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return path, [cut.id for cut in chosen]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_read_is_left_out_and_named(corpus, tmp_path, damaged, num_workers):
    path, ids = damaged
    data = training_data(corpus, tmp_path / "index", [path], num_workers)
    batches = list(data.batches(data.plan(1), 1, 0, 1, range(1)))
    faults = {cut_id: reason for batch in batches for cut_id, reason in batch.faults.items()}
    assert set(faults) == set(ids)
    assert faults[ids[1]] == "its features are not finite"
    assert all("cannot be read" in faults[ids[i]] for i in (0, 2))
    assert all(torch.isfinite(batch.x).all() for batch in batches)
    assert sum(len(batch.cut_ids) for batch in batches) == 77
    # shares of one cut each: a lost share has a substitute
    alone = list(data.batches(data.plan(1), 1, 0, 40, range(40)))
    assert {cut_id for batch in alone for cut_id in batch.faults} == set(ids)
    assert all(len(batch.cut_ids) == 1 and batch.cut_ids[0] not in ids for batch in alone)


def test_training_counts_unreadable_cuts_and_goes_on(corpus, tmp_path, damaged, caplog):
    path, ids = damaged
    trainer = Trainer(
        small_config(num_epochs=1), replace(options(corpus, tmp_path / "exp"), train_cuts=[path]), ALONE
    )
    trainer.train()
    [record] = read_training_log(tmp_path / "exp" / "training.jsonl")
    assert record.unreadable_cuts == 3 and record.skipped_steps == 0
    for cut_id in ids:
        assert f"cut {cut_id} is left out: " in caplog.text


def test_features_that_are_all_gone_end_the_run_with_the_state_saved(corpus, tmp_path):
    _, train_cuts, _, _ = corpus
    cuts = list(CutSet.from_file(train_cuts))
    features = tmp_path / "features"
    features.mkdir()
    for cut in cuts:
        shutil.copy(f"{cut.features.storage_path}/{cut.features.storage_key}", features / f"{cut.id}.npy")
        cut.features.storage_path, cut.features.storage_key = str(features), f"{cut.id}.npy"
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    trainer = Trainer(
        small_config(), replace(options(corpus, tmp_path / "exp"), train_cuts=[tmp_path / "cuts.jsonl.gz"]), ALONE
    )
    real, seen = trainer._step, []

    def step(*args):
        if len(seen) == 3:
            features.rename(tmp_path / "moved")
        seen.append(real(*args))
        return seen[-1]

    trainer._step = step
    with pytest.raises(DataError, match=r"nor can the 20 cuts after it be read.*prepare\.sh --stage fbank"):
        trainer.train()
    assert load_checkpoint(newest_first(tmp_path / "exp")[0])["progress"]["step"] == 3


def test_a_loading_process_that_dies_is_replaced_and_nothing_is_left_out(corpus, tmp_path, caplog):
    data = training_data(corpus, tmp_path, num_workers=2)
    plan = data.plan(1)
    expected = [batch.cut_ids for batch in data.batches(plan, 1, 0, 2, range(2))]
    found = []
    batches = data.batches(plan, 1, 0, 2, range(2))
    for batch in batches:
        found.append(batch.cut_ids)
        if len(found) == 2:
            children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
            workers = [int(child) for child in children if is_this_program(child)]
            os.kill(workers[0], signal.SIGKILL)
    assert found == expected
    assert "loading is started again where it stopped" in caplog.text


def is_this_program(pid: str) -> bool:
    try:
        return b"pytest" in open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return False


def checkpoint(size: int) -> dict:
    return {"model": {"w": torch.zeros(size)}, "config": {}}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:  # not root: a limit on the size of files has the same effect on one file
        pytest.fail(f"this test mounts a small tmpfs: {made.stderr}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(small_disk, caplog):
    assert save_step(small_disk, 1, 10, checkpoint(100_000))
    assert not save_step(small_disk, 1, 20, checkpoint(200_000))
    assert "cannot save" in caplog.text and "epoch-1-step-10.pt is kept" in caplog.text
    assert newest_first(small_disk) == [small_disk / "epoch-1-step-10.pt"]
    load_checkpoint(newest_first(small_disk)[0])
    assert not list(small_disk.glob(".*"))


def test_the_end_of_an_epoch_makes_room_by_what_lies_inside_it(small_disk):
    for step in (10, 20, 30):
        assert save_step(small_disk, 1, step, checkpoint(80_000))
    assert len(newest_first(small_disk)) == 2  # the newest of their kind
    save_epoch(small_disk, 1, checkpoint(150_000), 5)
    assert newest_first(small_disk) == [small_disk / "epoch-1.pt"]


def test_a_clock_that_jumps_changes_nothing(corpus, tmp_path, monkeypatch):
    """Clocks are set while a run goes on, by hours where a machine woke up: time is taken from one that only runs."""
    config = small_config(num_epochs=2)
    Trainer(config, replace(options(corpus, tmp_path / "steady"), save_minutes=1e-4), ALONE).train()
    draw, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + draw.uniform(-1e6, 1e6))
    Trainer(config, replace(options(corpus, tmp_path / "jumping"), save_minutes=1e-4), ALONE).train()
    assert same(weights(tmp_path / "steady/epoch-2.pt"), weights(tmp_path / "jumping/epoch-2.pt"))
    for record in read_training_log(tmp_path / "jumping/training.jsonl"):
        assert 0 < record.seconds < 120 and 0 <= record.data_wait_share <= 1 and record.frames_per_second > 0
