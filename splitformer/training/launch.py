"""Starts the ranks of a run on this machine. It does not import torch, so that the starting process stays small."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

GRACE_SECONDS = 30.0
"""Time for the other ranks to end after one has failed; the main rank may be saving."""
HUNG = 70
"""Exit status of a rank that waited too long for another one. That one hangs, and gets no time to end."""


def launch(num_processes: int) -> int:
    """Run this command again in `num_processes` ranks on this machine, and return their exit status.

    Unlike torchrun, which can use several machines, it adds no traceback to what the ranks print. SIGTERM, SIGUSR1 and
    Ctrl-C reach the ranks as SIGTERM, upon which they save and stop; a second Ctrl-C kills them. If a rank fails, the
    others are killed after `GRACE_SECONDS`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    command = [sys.executable, *sys.orig_argv[1:]]
    processes: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and signal.SIGINT in signals
        for process in processes:
            process.send_signal(signal.SIGKILL if again else signal.SIGTERM)
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, forward)
    for rank in range(num_processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env={"OMP_NUM_THREADS": "1"} | os.environ | shared | place))
    if signals:  # that came before all ranks were there
        forward(signal.SIGTERM, None)
    first, status = _wait(processes)
    if status < 0 and not signals:
        name = signal.Signals(-status).name
        hint = "; was there too little memory?" if name == "SIGKILL" else ""
        print(f"train: rank {first} was killed by {name}{hint}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def _wait(processes: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Return the first rank that failed and its status, or (0, 0), when all have ended."""
    failed: tuple[int, int] | None = None
    deadline = math.inf
    while True:
        statuses = [process.poll() for process in processes]
        if failed is None:
            failed = next(((rank, status) for rank, status in enumerate(statuses) if status), None)
            if failed is not None:
                deadline = time.monotonic() + (1.0 if failed[1] == HUNG else GRACE_SECONDS)
        if None not in statuses:
            return failed or (0, 0)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
