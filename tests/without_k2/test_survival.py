"""Training survives kills, signals, full disks, damaged checkpoints and data that cannot be used."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet

from splitformer.checkpoint import CheckpointError, load_checkpoint, load_contents, save_checkpoint
from splitformer.config import ConfigError
from splitformer.data.cut_index import DataError
from splitformer.data.training import default_workers
from splitformer.report.records import read_training_log
from splitformer.training import loop, saving
from splitformer.training.distributed import StopRequest
from splitformer.training.loop import Stopped, Trainer, TrainingError
from splitformer.training.precision import Precision, PrecisionError
from splitformer.training.progress import EpochTotals
from splitformer.training.saving import newest_first, save_epoch, save_step
from tests.training_runs import (
    ALONE,
    ENV,
    command,
    in_fork,
    options,
    same,
    small_config,
    train,
    training_data,
    wait_for,
    weights,
)

# ---- kills and signals


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The last checkpoint of an undisturbed run."""
    exp_dir = tmp_path_factory.mktemp("uninterrupted")
    Trainer(small_config(), options(corpus, exp_dir, num_workers=1), ALONE).train()
    return exp_dir / "epoch-2.pt"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(corpus, tmp_path, uninterrupted, seed):
    opts = options(corpus, tmp_path, num_workers=1, save_minutes=0.0)
    chance = random.Random(seed)
    starts = 0
    while not (tmp_path / "epoch-2.pt").exists():
        before = newest_first(tmp_path)[:1]
        process = in_fork(small_config(), opts)
        starts += 1
        if starts <= 3:
            wait_for(lambda before=before: newest_first(tmp_path)[:1] != before)
            time.sleep(chance.uniform(0.0, 0.15))  # forward, backward, optimizer, or while a checkpoint is written
            process.kill()
        process.join()
    assert starts == 4
    assert same(weights(tmp_path / "epoch-2.pt"), weights(uninterrupted))
    ours, theirs = load_checkpoint(tmp_path / "epoch-2.pt"), load_checkpoint(uninterrupted)
    assert ours["progress"]["step"] == theirs["progress"]["step"]
    assert same(ours["average"], theirs["average"])
    for i, state in theirs["optimizer"].items():
        assert same(ours["optimizer"][i], state)
    first, second = (read_training_log(folder / "training.jsonl") for folder in (tmp_path, uninterrupted.parent))
    assert [e.train_loss for e in first] == [e.train_loss for e in second]
    assert [e.dev_wer_per_exit for e in first] == [e.dev_wer_per_exit for e in second]
    assert not list(tmp_path.glob("*-step-*")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), [(1, "SIGTERM"), (2, "SIGTERM"), (2, "SIGINT")])
def test_a_signal_saves_the_state_and_ends_the_run_with_one_line(corpus, tmp_path, processes, name):
    exp_dir = tmp_path / "exp"
    flags = ["--set", "training.num_epochs=500", "--save-minutes", 0, "--num-processes", processes, "--num-workers", 2]
    run = subprocess.Popen(
        command(corpus, tmp_path, exp_dir, *flags), stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True
    )
    wait_for(lambda: newest_first(exp_dir))
    if processes == 1:
        run.terminate()
    else:  # Ctrl-C and run.sh signal every process of the group, those that load data too
        os.killpg(run.pid, getattr(signal, name))
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 143, stderr
    *_, last = stderr.splitlines()
    stopped = re.search(rf"stopped by {name} after step (\d+); the state is saved in .*: to resume, repeat", last)
    assert stopped and "Traceback" not in stderr, stderr
    assert load_checkpoint(newest_first(exp_dir)[0])["progress"]["step"] == int(stopped[1])


def test_a_stopped_run_resumes_with_the_next_batch(corpus, tmp_path, uninterrupted):
    process = in_fork(small_config(), options(corpus, tmp_path, num_workers=1, save_minutes=0.0))
    wait_for(lambda: newest_first(tmp_path))
    process.terminate()
    process.join()
    assert not (tmp_path / "epoch-2.pt").exists()
    resumed = Trainer(small_config(), options(corpus, tmp_path), ALONE)
    assert resumed.progress.step > 0
    resumed.train()
    assert same(weights(tmp_path / "epoch-2.pt"), weights(uninterrupted))


def test_a_signal_during_validation_stops_the_run_too(corpus, tmp_path, monkeypatch):
    batches = loop.evaluation_batches

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluation_batches", signalled)
    trainer = Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE)
    with pytest.raises(Stopped, match="SIGTERM"):
        trainer.train()
    monkeypatch.undo()
    again = Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE)
    assert again.progress.batch == len(again.data.plan(1)) and again.progress.epoch == 0
    again.train()
    [record] = read_training_log(tmp_path / "training.jsonl")
    assert record.train_loss > 0 and record.dev_wer_per_exit


def test_a_second_ctrl_c_interrupts(monkeypatch):
    monkeypatch.setattr(StopRequest, "ONE_CTRL_C", 0.2)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, forwarded
        assert stop.name == "SIGINT"
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# ---- checkpoints


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(corpus, tmp_path, caplog):
    Trainer(small_config(), options(corpus, tmp_path), ALONE).train()
    newest = tmp_path / "epoch-2.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    trainer = Trainer(small_config(), options(corpus, tmp_path), ALONE)
    assert trainer.progress.epoch == 1
    assert "epoch-2.pt cannot be read: it is damaged" in caplog.text
    (tmp_path / "epoch-1.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be read"):
        Trainer(small_config(), options(corpus, tmp_path), ALONE)


def test_another_configuration_seed_or_vocabulary_in_the_same_exp_dir_is_refused(corpus, tmp_path):
    Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE).train()
    with pytest.raises(ConfigError, match=r"training\.average_period: 2 there, 3 now.*--seed: 7 there, 0 now"):
        Trainer(small_config(num_epochs=1, average_period=3), options(corpus, tmp_path, seed=0), ALONE)
    path = tmp_path / "epoch-1.pt"
    contents = load_contents(path)
    contents["tokens"][5] = "Ω"
    save_checkpoint(path, contents)
    with pytest.raises(ConfigError, match=r"1 tokens, the first is 5: 'Ω' there, '\w' now"):
        Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE)
    with pytest.raises(TrainingError, match=r"1 checkpoint\(s\), up to epoch-1\.pt: add --resume"):
        Trainer(small_config(num_epochs=1), options(corpus, tmp_path, resume=False), ALONE)


def test_totals_of_older_checkpoints_are_read():
    assert EpochTotals.from_dict({"steps": 3, "faults": 2}) == EpochTotals(steps=3, unreadable=2)


def checkpoint(size):
    return {"model": {"w": torch.zeros(size)}, "config": {}}


def test_a_write_that_fails_keeps_the_previous_checkpoint_and_says_so(tmp_path, caplog):
    assert save_step(tmp_path, 1, 10, checkpoint(100_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))  # bytes in a file
    try:
        assert not save_step(tmp_path, 1, 20, checkpoint(200_000))
        with pytest.raises(CheckpointError, match=r"cannot save .*epoch-1\.pt .*epoch-1-step-10\.pt is kept\. Free"):
            save_epoch(tmp_path, 1, checkpoint(200_000), 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot save" in caplog.text and "epoch-1-step-10.pt is kept" in caplog.text
    assert newest_first(tmp_path) == [tmp_path / "epoch-1-step-10.pt"]
    load_checkpoint(newest_first(tmp_path)[0])
    assert not list(tmp_path.glob(".*"))


def test_at_the_end_of_an_epoch_checkpoints_inside_it_make_room(tmp_path, monkeypatch):
    save = saving.save_checkpoint

    def on_a_disk_of_a_megabyte(path, contents):
        used = sum(each.stat().st_size for each in tmp_path.iterdir())
        if used + 4 * contents["model"]["w"].numel() > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, contents)

    monkeypatch.setattr(saving, "save_checkpoint", on_a_disk_of_a_megabyte)
    for step in (10, 20, 30):
        assert save_step(tmp_path, 1, step, checkpoint(80_000))
    assert len(newest_first(tmp_path)) == 2, "the newest inside an epoch"
    save_epoch(tmp_path, 1, checkpoint(150_000), 5)
    assert newest_first(tmp_path) == [tmp_path / "epoch-1.pt"]


def test_a_clock_that_jumps_changes_nothing(corpus, tmp_path, uninterrupted, monkeypatch):
    draw, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + draw.uniform(-1e6, 1e6))
    Trainer(small_config(), options(corpus, tmp_path, save_minutes=1e-4), ALONE).train()
    assert same(weights(tmp_path / "epoch-2.pt"), weights(uninterrupted))
    for record in read_training_log(tmp_path / "training.jsonl"):
        assert 0 < record.seconds < 120 and 0 <= record.data_wait_share <= 1 and record.frames_per_second > 0


# ---- gradients that are not finite


class Watched:
    """Training batches of `trainer`, in which a step can be poisoned; records which steps changed the weights."""

    def __init__(self, trainer, bad_steps=()):
        self.trainer, self.bad_steps, self.states = trainer, bad_steps, []
        self.real = trainer.data.batches
        trainer.data.batches = self.batches

    def batches(self, *args):
        for number, batch in enumerate(self.real(*args), start=1):
            self.record()
            if number in self.bad_steps:
                batch.x[0, 3, 2] = float("nan")
            yield batch
        self.record()

    def record(self):
        self.states.append({name: tensor.clone() for name, tensor in self.trainer.loss.state_dict().items()})

    def unchanged(self):
        return {i for i, pair in enumerate(zip(self.states, self.states[1:]), start=1) if same(*pair)}


def test_batches_without_finite_gradients_are_skipped_counted_and_kept(corpus, tmp_path, caplog):
    trainer = Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE)
    watched = Watched(trainer, {2, 4})
    trainer.train()
    watched.record()
    assert watched.unchanged() == {2, 4}, "weights and batch statistics"
    [record] = read_training_log(tmp_path / "training.jsonl")
    assert record.skipped_steps == 2 and np.isfinite(record.train_loss) and np.isfinite(record.gradient_norm)
    assert "step 2 is skipped: its gradients are not finite; cuts: train-" in caplog.text
    kept = torch.load(tmp_path / "bad-batches" / "step-2-rank-0.pt", weights_only=True)
    assert not torch.isfinite(kept["tensors"]["batch"]["x_0"]).all()
    cut_ids = json.loads(kept["plain"]["cut_ids"])[0]
    assert len(cut_ids) == len(kept["tensors"]["batch"]["x_0"])
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "epoch-1.pt").values())


def test_too_many_such_batches_in_a_row_end_the_run(corpus, tmp_path):
    trainer = Trainer(small_config(num_epochs=1), options(corpus, tmp_path, max_skipped=2), ALONE)
    Watched(trainer, {1, 3, 4, 5})
    with pytest.raises(TrainingError, match=r"3 batches in a row had no finite gradients, up to step 5; they are in"):
        trainer.train()


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="this torch has no loss scale for CPUs")
def test_a_loss_scale_that_underflows_is_an_error(corpus, tmp_path):
    opts = options(corpus, tmp_path, precision="fp16", max_skipped=1000)
    trainer = Trainer(small_config(num_epochs=20), opts, ALONE)
    with torch.no_grad():
        trainer.loss.model.ctc_heads["2"].weight.fill_(1e30)  # overflows at any scale
    with pytest.raises(PrecisionError, match=r"overflow in float16 .* Lower optim\.base_lr, or train with --precision"):
        trainer.train()


def test_float16_without_a_loss_scale_is_refused():
    if hasattr(torch.amp, "GradScaler"):
        assert Precision("fp16", torch.device("cpu")).name == "fp16"
    else:
        with pytest.raises(PrecisionError, match="on GPUs only"):
            Precision("fp16", torch.device("cpu"))
    with pytest.raises(PrecisionError, match="choose one of auto, bf16, fp16, fp32"):
        Precision("fp8", torch.device("cpu"))


# ---- data that cannot be read


@pytest.fixture
def damaged(corpus, tmp_path):
    """Training cuts of which one has truncated features, one has a NaN, and one has none, with their ids."""
    _, train_cuts, _, _ = corpus
    cuts = list(CutSet.from_file(train_cuts))
    chosen = cuts[5], cuts[40], cuts[77]
    folder = tmp_path / "features"
    folder.mkdir()
    truncated, with_nan, missing = (folder / f"{i}.npy" for i in range(3))
    for cut, target in zip(chosen, (truncated, with_nan, missing)):
        features = np.load(f"{cut.features.storage_path}/{cut.features.storage_key}")
        features[7, 3] = float("nan") if target == with_nan else 0.0
        np.save(target, features)
        cut.features.storage_path, cut.features.storage_key = str(folder), target.name
    truncated.write_bytes(truncated.read_bytes()[:2000])
    missing.unlink()
    path = tmp_path / "damaged.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return path, [cut.id for cut in chosen]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cuts_that_cannot_be_read_are_left_out_and_named(corpus, tmp_path, damaged, num_workers):
    path, ids = damaged
    data = training_data(corpus, tmp_path / "index", [path], num_workers)
    batches = list(data.batches(data.plan(1), 1, 0, 1, range(1)))
    errors = {cut_id: reason for batch in batches for cut_id, reason in batch.errors.items()}
    assert set(errors) == set(ids)
    assert errors[ids[1]] == "its features are not finite"
    assert all("cannot be read" in errors[ids[i]] for i in (0, 2))
    assert all(torch.isfinite(batch.x).all() for batch in batches)
    assert sum(len(batch.cut_ids) for batch in batches) == 77
    # micro-batches of one cut each: a lost one is replaced
    alone = list(data.batches(data.plan(1), 1, 0, 40, range(40)))
    assert {cut_id for batch in alone for cut_id in batch.errors} == set(ids)
    assert all(len(batch.cut_ids) == 1 and batch.cut_ids[0] not in ids for batch in alone)


def test_training_counts_unreadable_cuts_and_continues(corpus, tmp_path, damaged, caplog):
    path, ids = damaged
    opts = replace(options(corpus, tmp_path / "exp"), train_cuts=(path,))
    Trainer(small_config(num_epochs=1), opts, ALONE).train()
    [record] = read_training_log(tmp_path / "exp" / "training.jsonl")
    assert record.unreadable_cuts == 3 and record.skipped_steps == 0
    for cut_id in ids:
        assert f"cut {cut_id} is left out: " in caplog.text


def test_features_that_disappear_end_the_run_with_the_state_saved(corpus, tmp_path):
    _, train_cuts, _, _ = corpus
    cuts = list(CutSet.from_file(train_cuts))
    features = tmp_path / "features"
    features.mkdir()
    for cut in cuts:
        shutil.copy(f"{cut.features.storage_path}/{cut.features.storage_key}", features / f"{cut.id}.npy")
        cut.features.storage_path, cut.features.storage_key = str(features), f"{cut.id}.npy"
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    opts = replace(options(corpus, tmp_path / "exp"), train_cuts=(tmp_path / "cuts.jsonl.gz",))
    trainer = Trainer(small_config(), opts, ALONE)
    real = trainer.data.batches

    def batches(*args):
        for number, batch in enumerate(real(*args), start=1):
            if number == 3:
                features.rename(tmp_path / "moved")
            yield batch

    trainer.data.batches = batches
    with pytest.raises(DataError, match=r"nor can the 20 cuts after it be read.*prepare\.sh --stage fbank"):
        trainer.train()
    assert load_checkpoint(newest_first(tmp_path / "exp")[0])["progress"]["step"] == 3


def test_a_loading_process_that_dies_is_replaced_and_nothing_is_left_out(corpus, tmp_path, caplog):
    data = training_data(corpus, tmp_path, num_workers=2)
    plan = data.plan(1)
    expected = [batch.cut_ids for batch in data.batches(plan, 1, 0, 2, range(2))]
    found = []
    for batch in data.batches(plan, 1, 0, 2, range(2)):
        found.append(batch.cut_ids)
        if len(found) == 2:
            children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
            workers = [int(child) for child in children if command_line(child) == command_line("self")]
            os.kill(workers[0], signal.SIGKILL)
    assert found == expected
    assert "loading is started again where it stopped" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_dies_in_the_thread_that_pins_memory_is_replaced(corpus, tmp_path, monkeypatch, caplog):
    """Without a GPU that thread fails at once: torch raises what it raises when the thread meets a dead process."""
    data = training_data(corpus, tmp_path, num_workers=1)
    plan = data.plan(1)
    expected = [batch.cut_ids for batch in data.batches(plan, 1, 0, 1, range(1))]
    modules = [torch.cuda, *([torch.accelerator] if hasattr(torch, "accelerator") else [])]
    for module in modules:
        monkeypatch.setattr(module, "is_available", lambda: "started again" not in caplog.text)
        monkeypatch.setattr(module, "current_device" if module is torch.cuda else "current_device_index", lambda: 0)
    assert [batch.cut_ids for batch in data.batches(plan, 1, 0, 1, range(1))] == expected
    assert "loading is started again where it stopped" in caplog.text
    assert "Pin memory thread exited" in caplog.text


def test_shared_memory_that_is_too_small_is_named_before_loading(corpus, tmp_path, caplog):
    data = training_data(corpus, tmp_path, num_workers=2, max_duration=1e9)
    with pytest.raises(DataError, match=r"/dev/shm has \d+ MB free.*--shm-size=\d+g\), or give --num-workers 0"):
        next(iter(data.batches(data.plan(1), 1, 0, 1, range(1))))
    alone = training_data(corpus, tmp_path, num_workers=0, max_duration=1e9)
    assert len(list(alone.batches(alone.plan(1), 1, 0, 1, range(1)))) == len(alone.plan(1))
    assert default_workers(torch.device("cpu"), data.config, 1) == 0 and "--shm-size" in caplog.text


def test_a_gpu_gets_its_share_of_the_cores_to_load_data(monkeypatch):
    config, cpu, gpu = small_config(), torch.device("cpu"), torch.device("cuda", 0)
    cores = len(os.sched_getaffinity(0))
    assert default_workers(cpu, config, 1) == 1
    assert default_workers(gpu, config, 1) == max(1, min(16, cores - 1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers(gpu, config, 2) == max(1, min(16, cores // 2 - 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers(gpu, config, 8) == 11


def command_line(pid):
    """Return the command line of a process; a forked loading process has that of its parent."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None


def test_a_seed_must_not_be_negative(corpus, tmp_path):
    assert Trainer(small_config(), options(corpus, tmp_path, seed=0), ALONE).data.seed == 0
    with pytest.raises(TrainingError, match="--seed -1 must be 0 or greater"):
        Trainer(small_config(), options(corpus, tmp_path, seed=-1), ALONE)


def test_the_command_prints_an_error_in_one_line(corpus, tmp_path):
    run = train(corpus, tmp_path, tmp_path / "exp", "--set", "model.d_modle=3", "--num-processes", "2")
    assert run.returncode == 1 and "did you mean model.d_model?" in run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr
