"""examples/train.sbatch with two torchrun agents on this machine, and commands in the place of Slurm's."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from splitformer.checkpoint import load_checkpoint
from splitformer.training.saving import newest_first
from tests.training_runs import ENV, command, wait_for

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train.sbatch"
# As Slurm's: starts the command once for each node, forwards SIGUSR1, and fails if one of them does.
SRUN = r"""#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
pids=()
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
failed=0
for pid in "${pids[@]}"; do
    wait "$pid"; status=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; status=$?; done
    ((status == 0)) || failed=$status
done
exit "$failed"
"""
SCONTROL = r"""#!/usr/bin/env bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@pytest.fixture
def sbatch(tmp_path):
    """Start the script as a job of two nodes with one rank each."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "RANKS_PER_NODE": "1"}
    job |= {"SPLITFORMER_PYTHON": sys.executable, "RENDEZVOUS_PORT": str(port), "REQUEUED": str(tmp_path / "requeued")}
    started = []

    def start(arguments):
        run = subprocess.Popen(
            [SCRIPT, *arguments],
            env={**ENV, **job, "PATH": f"{programs}:{os.environ['PATH']}"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(run)
        return run

    yield start
    for run in started:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_job_saves_before_its_time_limit_and_resumes_when_it_is_queued_again(corpus, tmp_path, sbatch):
    exp_dir = tmp_path / "exp"
    arguments = command(corpus, tmp_path, exp_dir, "--save-minutes", "0", "--set", "training.num_epochs=4")[3:]
    run = sbatch(arguments)
    wait_for(lambda: newest_first(exp_dir))
    run.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@600 does: to the script alone
    _, stderr = run.communicate(timeout=90)
    assert run.returncode != 0 and (tmp_path / "requeued").read_text() == "7\n", stderr
    assert "2 rank(s)" in stderr and "stopped by SIGUSR1 after step" in stderr
    saved = load_checkpoint(newest_first(exp_dir)[0])["progress"]["step"]
    assert f"stopped by SIGUSR1 after step {saved};" in stderr, "no rank was killed before the state was saved"
    again = sbatch(arguments)
    _, stderr = again.communicate(timeout=90)
    assert again.returncode == 0, stderr
    assert re.search(rf"resuming after epoch \d+, step {saved}\n", stderr), stderr
    assert load_checkpoint(exp_dir / "epoch-4.pt")["world_size"] == 2
    assert (tmp_path / "requeued").read_text() == "7\n", "a job that is done is not queued again"
