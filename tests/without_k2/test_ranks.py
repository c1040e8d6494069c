"""Ranks that wait for one another, and runs that want the same folder: who it is, is said by name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from splitformer.training.lock import LockError, locked
from splitformer.training.saving import newest_first
from splitformer.training.watch import RankState, Watch
from tests.training_runs import ENV, TORCHRUN, command, train


def wait_for(condition, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.1)


# ---- two runs in one folder


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(corpus, tmp_path):
    exp_dir = tmp_path / "exp"
    flags = ["--set", "training.num_epochs=500", "--save-minutes", "0"]
    first = subprocess.Popen(command(corpus, tmp_path, exp_dir, *flags), env=ENV, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: newest_first(exp_dir))
        half_written = exp_dir / ".epoch-1.pt.123.tmp"  # as the first run may have at any moment
        half_written.write_bytes(b"half")
        second = train(corpus, tmp_path, exp_dir, *flags, "--resume")
        assert second.returncode == 1
        assert re.search(
            rf"train: {exp_dir} is in use by another run: process {first.pid} on \S+, started 2\S+\. Wait for its end, "
            r"stop it, or choose another --exp-dir",
            second.stderr,
        ), second.stderr
        assert half_written.exists() and first.poll() is None
    finally:
        first.kill()  # and no stale lock is left by that
        first.wait()
    third = train(corpus, tmp_path, exp_dir, "--set", "training.num_epochs=500", "--resume", "--max-skipped", "x")
    assert "is in use" not in third.stderr
    with locked(exp_dir):
        assert f"process {os.getpid()} " in (exp_dir / ".lock").read_text()


@pytest.fixture
def read_only(tmp_path):
    folder = tmp_path / "read_only"
    folder.mkdir()
    for options in ("size=1m", "remount,ro"):
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        assert made.returncode == 0, f"this test mounts a read-only tmpfs: {made.stderr}"
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(read_only, corpus, tmp_path):
    for exp_dir in (read_only, read_only / "new", tmp_path / "system.toml" / "below-a-file"):
        started = time.monotonic()
        run = train(corpus, tmp_path, exp_dir)
        assert run.returncode == 1 and f"--exp-dir {exp_dir} cannot be written to" in run.stderr, run.stderr
        assert "training data" not in run.stderr and time.monotonic() - started < 60
    with pytest.raises(LockError, match=r"Read-only file system.*Give another --exp-dir"), locked(read_only):
        raise AssertionError("not to be reached")


# ---- ranks


@pytest.mark.parametrize("stuck", [1, 0])
def test_a_rank_that_stands_still_is_named_by_the_others(corpus, tmp_path, stuck):
    exp_dir = tmp_path / "exp"
    flags = ["--set", "training.num_epochs=500", "--save-minutes", "0", "--timeout-minutes", "0.1"]
    ranks = [sys.executable, *TORCHRUN, "--nproc_per_node", "2", *command(corpus, tmp_path, exp_dir, *flags)[1:]]
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(ranks, env=ENV, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: newest_first(exp_dir))
        workers = {rank_of(pid): pid for pid in children(run.pid)}
        assert sorted(workers) == [0, 1]
        os.kill(workers[stuck], signal.SIGSTOP)
        wait_for(lambda: "--timeout-minutes" in log.read_text(), 40)
    finally:
        for pid in (*children(run.pid), run.pid):
            os.kill(pid, signal.SIGKILL)
        run.wait()
    told = log.read_text()
    assert re.search(
        rf"train: rank {1 - stuck} has waited \d+ s in epoch \d+, batch \d+ \(\w+\) for rank {stuck}(, or its "
        rf"torchrun, through which .* does not answer| \(process {workers[stuck]} on \S+\), which stands still or is "
        r"gone): "
        "look at that process.*--resume",
        told,
    ), told
    assert "_step" in told, "the stack of the rank that waited"


ENDS_AFTER_AN_EXCHANGE = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from splitformer.training.distributed import process_group

def main():
    with process_group() as ranks:
        model = DistributedDataParallel(torch.nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        for _ in range(200):
            ranks.sum(torch.zeros(30)).tolist()

main()
"""


def test_ranks_that_end_right_after_an_exchange_do_end(tmp_path):
    """Three in four such pairs of processes waited for ever, before `process_group` waited for half a second."""
    script = tmp_path / "script.py"
    script.write_text(ENDS_AFTER_AN_EXCHANGE)
    runs = [subprocess.Popen([sys.executable, *TORCHRUN, "--nproc_per_node", "2", script], env=ENV) for _ in range(4)]
    try:
        assert [run.wait(timeout=60) for run in runs] == [0] * 4
    finally:
        for run in runs:
            for pid in (*(children(run.pid) if run.poll() is None else ()), run.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid):
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)


def state(rank, place, doing):
    return RankState(rank, "node", 100 + rank, place, doing)


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ("computing 7, loading 7", r"for rank 1 \(process 101 on node\), still loading in epoch 2, batch 7"),
        ("saving 7, computing 8", r"for rank 0 .*, still saving in epoch 2, batch 7"),
        ("waiting 7, validating 7, validating 7", r"for rank 1 .* and rank 2 .*, still validating"),
        ("computing 7, computing 7", r"same place \(rank 0 computing, rank 1 computing\), which of them is stuck"),
        ("loading 7, loading 7", r"which of them is stuck cannot be told"),
    ],
)
def test_who_is_behind(states, told):
    states = [each.split() for each in states.split(", ")]
    watch = Watch(0, len(states), 1.0)
    watch.report(states[0][0], 2, 7)
    now = time.monotonic()
    heard = {rank: (state(rank, [2, int(batch)], doing), now) for rank, (doing, batch) in enumerate(states)}
    verdict = watch._verdict(heard, 61.0)
    assert re.match(rf"rank 0 has waited 61 s in epoch 2, batch 7 .*{told}", verdict), verdict
    assert "does not answer" in watch._verdict({}, 61.0)
