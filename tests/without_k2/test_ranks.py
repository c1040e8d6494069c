"""Several ranks: they train like one, agree on errors, and name the one that hangs. One run in a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from splitformer.checkpoint import load_checkpoint
from splitformer.cli import command
from splitformer.data.cut_index import DataError
from splitformer.errors import UserError
from splitformer.report.records import read_training_log
from splitformer.training import loop
from splitformer.training.distributed import process_group
from splitformer.training.loop import Trainer
from splitformer.training.saving import LockError, locked, newest_first
from splitformer.training.watch import RankState, Watch
from tests.training_runs import ALONE, ENV, in_fork, options, slow_disk, small_config, train, wait_for, weights
from tests.training_runs import command as command_of_training

# ---- one training, whatever the number of ranks

SAME_ARITHMETIC = ["--set", "model.dropout=0.0", "augment.p=0.0", "--precision", "fp32"]


@pytest.mark.slow
def test_two_ranks_train_like_one(corpus, tmp_path):
    flags = [*SAME_ARITHMETIC, "--set", "training.num_epochs=2"]
    run = train(corpus, tmp_path, tmp_path / "two", *flags, "--num-processes", "2")
    assert run.returncode == 0, run.stderr
    assert "2 rank(s) x 1 micro-batch(es)" in run.stderr
    config = small_config(num_epochs=2)
    config = replace(config, model=replace(config.model, dropout=0.0), augment=replace(config.augment, p=0.0))
    Trainer(config, options(corpus, tmp_path / "one", precision="fp32"), ALONE).train()
    one, two = (read_training_log(tmp_path / name / "training.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, abs=1e-4)
        assert a.train_loss_per_exit == pytest.approx(b.train_loss_per_exit, abs=1e-4)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)
        assert a.dev_wer_per_exit == b.dev_wer_per_exit
    ours, theirs = weights(tmp_path / "two" / "epoch-2.pt"), weights(tmp_path / "one" / "epoch-2.pt")
    for name, tensor in theirs.items():
        if name.endswith(("depthwise.bias", "batch_norm.running_mean")):
            continue  # batch normalisation cancels this bias: its gradient is rounding, of which AdamW makes steps
        torch.testing.assert_close(ours[name], tensor, atol=2e-3, rtol=0, msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch(corpus, tmp_path):
    config = small_config(num_epochs=1)
    config = replace(
        config,
        model=replace(config.model, dropout=0.0),
        augment=replace(config.augment, p=0.0),
        data=replace(config.data, max_duration=1000.0),  # one step
    )
    moments = []
    for accum_grad in (1, 3):
        opts = options(corpus, tmp_path / str(accum_grad), accum_grad=accum_grad, precision="fp32")
        trainer = Trainer(config, opts, ALONE)
        for module in trainer.loss.modules():  # batch statistics are those of a micro-batch
            if isinstance(module, torch.nn.BatchNorm1d):
                module.eval()
        trainer.train()
        assert trainer.progress.step == 1
        moments.append([trainer.optimizer.state[p]["exp_avg"] for p in trainer.loss.parameters()])
    for whole, micro in zip(*moments, strict=True):  # a tenth of the gradients
        torch.testing.assert_close(whole, micro, atol=1e-6, rtol=1e-4)


# ---- errors and ends


def in_ranks(body, before=None, timeout_minutes=30.0):
    """Run `body(ranks)` as a command in two forked ranks; returns their exit statuses."""

    def run(options: NoOptions) -> int | None:
        with process_group(timeout_minutes, before) as ranks:
            return body(ranks)

    def rank(number):
        torch.set_num_threads(1)
        os.environ.update(place, RANK=str(number))
        sys.exit(command(run, [], prog="test"))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@dataclass(frozen=True)
class NoOptions:
    """A command without options."""


def fail():
    raise UserError("no such thing")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda ranks: ranks.on_main(fail), "no such thing"),
        (lambda ranks: ranks.main_first(fail), "no such thing"),
        (lambda ranks: ranks.raise_first(UserError("second") if ranks.rank else None), "second"),
        (lambda ranks: ranks.raise_first(UserError(f"rank {ranks.rank}")), "rank 0"),
    ],
    ids=["on_main", "main_first", "one rank", "all ranks"],
)
def test_an_error_ends_all_ranks_and_is_printed_once(capfd, body, message):
    assert in_ranks(body) == [1, 1]
    assert capfd.readouterr().err == f"test: {message}\n"


def test_ranks_agree(capfd):
    def body(ranks):
        assert ranks.on_main(lambda: ranks.rank) == 0
        assert ranks.main_first(lambda: ranks.rank) == ranks.rank
        assert ranks.any(ranks.rank == 1) and not ranks.any(False)
        assert ranks.sum(torch.tensor([1.0 + ranks.rank])).tolist() == [3.0]
        ranks.raise_first(None)

    assert in_ranks(body) == [0, 0], capfd.readouterr().err


def rank():
    return int(os.environ["RANK"])


def test_what_ranks_do_before_their_group_exists_has_no_time_limit(tmp_path, capfd):
    """The main rank first: it takes longer than any collective operation may."""

    def prepare():
        if rank() == 0:
            time.sleep(6.0)
            (tmp_path / "index").write_text("made")
        assert (tmp_path / "index").exists()
        (tmp_path / f"rank-{rank()}").touch()

    def body(ranks):
        assert all((tmp_path / f"rank-{number}").exists() for number in range(2))
        assert ranks.any(ranks.rank == 1)

    assert in_ranks(body, prepare, timeout_minutes=3 / 60 - 1) == [0, 0], capfd.readouterr().err  # 3 s


def test_an_error_before_the_group_exists_ends_all_ranks_and_is_printed_once(capfd):
    assert in_ranks(lambda ranks: None, before=fail) == [1, 1]
    assert capfd.readouterr().err == "test: no such thing\n"


def test_a_barrier_waits_for_all(tmp_path):
    def body(ranks):
        if ranks.rank == 1:
            time.sleep(1.0)
            (tmp_path / "there").touch()
        ranks.barrier()
        assert (tmp_path / "there").exists()

    assert in_ranks(body) == [0, 0]


def test_a_run_that_cannot_index_its_cuts_says_so_once(corpus, tmp_path):
    folder, _, dev_cuts, lang_dir = corpus
    missing = folder, tmp_path / "nowhere.jsonl.gz", dev_cuts, lang_dir
    run = train(missing, tmp_path, tmp_path / "exp", "--num-processes", "2")
    assert run.returncode == 1
    assert run.stderr.count("nowhere.jsonl.gz") == 1 and len(run.stderr.splitlines()) == 1, run.stderr


def test_all_ranks_save_and_end_when_one_cannot_load(corpus, tmp_path, capfd):
    def body(ranks):
        trainer = Trainer(small_config(), options(corpus, tmp_path), ranks)
        real = trainer.data.batches

        def batches(*args):
            for number, batch in enumerate(real(*args)):
                if ranks.rank == 1 and number == 2:
                    raise DataError("the disk is gone")
                yield batch

        trainer.data.batches = batches
        trainer.train()

    assert in_ranks(body) == [1, 1]
    *_, last = capfd.readouterr().err.splitlines()
    assert last == "test: the disk is gone"
    assert load_checkpoint(newest_first(tmp_path)[0])["progress"]["step"] == 2


@pytest.mark.slow
def test_on_a_signal_no_rank_leaves_before_the_state_is_saved(corpus, tmp_path):
    """torchrun and `launch` kill the other ranks some time after the first has left; a disk may be slower."""
    exp_dir = tmp_path / "exp"
    flags = ["--set", "training.num_epochs=500", "--num-processes", "2"]
    run = subprocess.Popen(
        command_of_training(corpus, tmp_path, exp_dir, *flags),
        env=ENV | slow_disk(tmp_path, seconds=3.0),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: newest_first(exp_dir))
    ranks = children(run.pid)
    assert len(ranks) == 2
    run.send_signal(signal.SIGUSR1)
    wait_for(lambda: not all(map(alive, ranks)))
    saved = newest_first(exp_dir)[0]
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 143, stderr
    stopped = re.search(r"stopped by SIGTERM after step (\d+); the state is saved", stderr)
    assert stopped and load_checkpoint(saved)["progress"]["step"] == int(stopped[1]), stderr


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_ranks_save_and_end_when_one_cannot_evaluate(corpus, tmp_path, capfd, monkeypatch):
    batches = loop.evaluation_batches

    def unreadable(*args, rank, **kwargs):
        yield next(batches(*args, rank=rank, **kwargs))
        if rank == 1:
            raise DataError("the disk is gone")

    monkeypatch.setattr(loop, "evaluation_batches", unreadable)
    assert in_ranks(lambda ranks: Trainer(small_config(), options(corpus, tmp_path), ranks).train()) == [1, 1]
    *_, last = capfd.readouterr().err.splitlines()
    assert last == "test: the disk is gone"
    saved = load_checkpoint(newest_first(tmp_path)[0])["progress"]
    assert saved["epoch"] == 0 and saved["batch"] == saved["step"] > 0


def test_ranks_that_end_right_after_an_exchange_do_end():
    """In torch 1.13 three in four such pairs of processes hung, before `process_group` paused."""

    def body(ranks):
        model = DistributedDataParallel(torch.nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        for _ in range(200):
            ranks.sum(torch.zeros(30)).tolist()

    for _ in range(4):
        assert in_ranks(body) == [0, 0]


def test_a_rank_that_is_killed_ends_the_others_and_is_named(corpus, tmp_path):
    flags = ["--set", "training.num_epochs=500", "--save-minutes", "0", "--num-processes", "2"]
    run = subprocess.Popen(
        command_of_training(corpus, tmp_path, tmp_path / "exp", *flags), stderr=subprocess.PIPE, text=True, env=ENV
    )
    wait_for(lambda: newest_first(tmp_path / "exp"))
    ranks = {rank_of(pid): pid for pid in children(run.pid)}
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 137 and "train: rank 1 was killed by SIGKILL; was there too little memory?" in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


# ---- one run in a folder


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(corpus, tmp_path):
    exp_dir = tmp_path / "exp"
    first = in_fork(small_config(num_epochs=500), options(corpus, exp_dir, save_minutes=0.0, num_workers=1))
    try:
        wait_for(lambda: newest_first(exp_dir))
        half_written = exp_dir / ".epoch-1.pt.123.tmp"  # as the first run may have at any moment
        half_written.write_bytes(b"half")
        flags = ["--set", "training.num_epochs=500", "--resume", "--num-processes", "2"]
        second = train(corpus, tmp_path, exp_dir, *flags)
        assert second.returncode == 1
        assert re.fullmatch(
            rf"train: {exp_dir} is in use by another run: process {first.pid} on \S+, started 2\S+\. Wait for it to "
            r"end, stop it, or choose another --exp-dir\n",
            second.stderr,
        ), second.stderr
        assert half_written.exists() and first.is_alive()
    finally:
        first.kill()
        first.join()
    with locked(exp_dir):  # a killed run leaves no lock, although its loading processes may live for some seconds
        assert f"process {os.getpid()} " in (exp_dir / ".lock").read_text()
        with pytest.raises(LockError, match=f"in use by another run: process {os.getpid()} "), locked(exp_dir):
            raise AssertionError("not to be reached")
    with locked(exp_dir):
        pass


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    for exp_dir in (tmp_path / "file" / "below", Path("/proc/splitformer")):  # where not even root can write
        with pytest.raises(LockError, match=f"--exp-dir {exp_dir} cannot be written to"), locked(exp_dir):
            raise AssertionError("not to be reached")
    run = train(corpus, tmp_path, tmp_path / "file" / "below")
    assert run.returncode == 1 and "cannot be written to" in run.stderr and "training data" not in run.stderr


# ---- a rank that hangs


@pytest.mark.slow
@pytest.mark.parametrize("hanging", [1, 0])
def test_a_rank_that_hangs_is_named_by_the_others(corpus, tmp_path, hanging):
    exp_dir, log = tmp_path / "exp", tmp_path / "log"
    flags = ["--set", "training.num_epochs=500", "--save-minutes", "0", "--timeout-minutes", "0.1"]
    with log.open("w") as file:
        run = subprocess.Popen(
            command_of_training(corpus, tmp_path, exp_dir, *flags, "--num-processes", "2"), env=ENV, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    ranks = {}
    try:
        wait_for(lambda: newest_first(exp_dir))
        ranks = {rank_of(pid): pid for pid in children(run.pid)}
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[hanging], signal.SIGSTOP)
        wait_for(lambda: "--timeout-minutes" in log.read_text(), 40)
        assert run.wait(timeout=30) == 70, "the rank that hangs is killed"
    finally:
        for pid in (*ranks.values(), run.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait()
    text = log.read_text()
    assert re.search(
        rf"train: rank {1 - hanging} has waited \d+ s in epoch \d+, batch \d+ \(\w+\) for rank {hanging} "
        rf"\(process {ranks[hanging]} on \S+\), which hangs or is gone: look at that process.*--resume",
        text,
    ), text
    assert "_step" in text, "the stack of the rank that waited"


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid):
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        ("computing 7, loading 7", r"for rank 1 \(process 101 on node\), still loading in epoch 2, batch 7"),
        ("saving 7, computing 8", r"for rank 0 .*, still saving in epoch 2, batch 7"),
        ("waiting 7, validating 7, validating 7", r"for rank 1 .* and rank 2 .*, still validating"),
        ("computing 7, computing 7", r"same place \(rank 0 computing, rank 1 computing\), so it is unknown which"),
        ("loading 7, loading 7", r"it is unknown which of them hangs"),
    ],
)
def test_who_is_behind(tmp_path, states, verdict):
    states = [each.split() for each in states.split(", ")]
    watch = Watch(tmp_path, 0, len(states), 1.0)
    watch.report(states[0][0], 2, 7)
    for rank, (doing, batch) in enumerate(states):
        state = RankState(rank, "node", 100 + rank, [2, int(batch)], doing)
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(asdict(state)))
    found = watch.verdict(61.0)
    assert re.match(rf"rank 0 has waited 61 s in epoch 2, batch 7 .*{verdict}", found), found
    os.utime(tmp_path / "rank-1.json", (0, 0))
    assert re.search(r"for rank 1 \(process 101 on node\), which hangs or is gone", watch.verdict(61.0))
    (tmp_path / "rank-1.json").unlink()
    assert re.search(r"for rank 1 .*an unknown host\), which hangs or is gone", watch.verdict(61.0))
