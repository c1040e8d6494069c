"""Finds the rank that the others wait for.

A collective operation that times out does not say which rank is missing. So each rank publishes what it is doing in the
store through which the ranks met, from a thread of its own. A rank that makes no progress for too long reads what the
others published last, names those that are behind, and exits.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from splitformer.training.saving import TO_RESUME

ALONE = ("loading", "validating", "saving")
"""Activities in which a rank waits for nobody, while others may wait for it."""
HUNG = 70
"""Exit status of a rank that stops waiting."""


@dataclass
class RankState:
    """What a rank published last."""

    rank: int
    host: str
    pid: int
    place: list[int]  # epoch, batch
    doing: str
    beat: int = 0  # counts publications: a process that hangs has a constant beat

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watch:
    """While it is entered, ends the process if its main thread makes no progress for `minutes`.

    It does nothing for a single rank, whose run may take any time.
    """

    def __init__(self, rank: int, world_size: int, minutes: float) -> None:
        self.world_size, self.seconds = world_size, 60 * minutes
        self.state = RankState(rank, socket.gethostname(), os.getpid(), [0, 0], "starting")
        self.since = time.monotonic()
        self._ended = threading.Event()
        self._store: TCPStore | None = None
        self._states: dict[int, tuple[RankState, float]] = {}
        self._answered = -math.inf

    def __enter__(self) -> Watch:
        if self.world_size > 1:
            self.since = time.monotonic()
            for target in (self._run, self._communicate):
                threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def report(self, doing: str, epoch: int | None = None, batch: int | None = None) -> None:
        """Record that the main thread has made progress."""
        if epoch is not None and batch is not None:
            self.state.place = [epoch, batch]
        self.state.doing = doing
        self.since = time.monotonic()

    def _run(self) -> None:
        """End the process if it waits for too long."""
        pause = min(10.0, self.seconds / 10)
        while not self._ended.wait(pause):
            waited = time.monotonic() - self.since
            if waited > self.seconds and not self._ended.is_set():
                answered = time.monotonic() - self._answered < self.seconds / 2
                print(f"train: {self.verdict(self._states if answered else {}, waited)}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(HUNG)

    def _communicate(self) -> None:
        """Publish this rank's state, and read the others' when it waits; a call hangs if the store's process does."""
        pause = min(10.0, self.seconds / 10)
        ended = False
        while not ended:
            try:
                store = self._publish(max(pause, 1.0))
                if time.monotonic() - self.since > self.seconds / 2:
                    self._states = self._read_states(store, self._states, max(pause, 1.0))
                    self._answered = time.monotonic()
            except RuntimeError:
                self._store = None
            ended = self._ended.wait(pause)

    def _publish(self, timeout: float) -> TCPStore:
        self.state.beat += 1
        self._store = self._store or _connect(timeout)
        self._store.set(_key(self.state.rank), json.dumps(asdict(self.state)))
        return self._store

    def _read_states(
        self, store: TCPStore, before: dict[int, tuple[RankState, float]], timeout: float
    ) -> dict[int, tuple[RankState, float]]:
        """Return {rank: (its state, when that was read first)}."""
        states = {}
        store.get(_key(self.state.rank))  # raises if the store does not answer at all
        for rank in range(self.world_size):
            try:
                state = RankState(**json.loads(store.get(_key(rank))))
            except RuntimeError:
                # it has published nothing; over this connection, a late answer would be taken for the next one
                state = RankState(rank, "an unknown host", 0, [0, 0], "starting")
                store = self._store = _connect(timeout)
            known = before.get(rank)
            states[rank] = known if known and known[0].beat == state.beat else (state, time.monotonic())
        return states

    def verdict(self, states: dict[int, tuple[RankState, float]], waited: float) -> str:
        """Return which rank hangs, as far as the states tell."""
        epoch, batch = self.state.place
        mine = f"rank {self.state.rank} has waited {waited:.0f} s in epoch {epoch}, batch {batch} ({self.state.doing})"
        remedy = (
            "look at that process (py-spy dump --pid, nvidia-smi, its disk); if it is only slow, raise "
            f"--timeout-minutes; {TO_RESUME}"
        )
        if not states:
            return f"{mine} for rank 0, or the torchrun through which the ranks meet; it does not answer: {remedy}"
        now = time.monotonic()
        silent = [str(state) for state, when in states.values() if now - when > self.seconds / 4]
        if silent:
            return f"{mine} for {' and '.join(silent)}, which hangs or is gone: {remedy}"
        ranks = [state for state, _ in states.values()]
        place = min(state.place for state in ranks)
        behind = [state for state in ranks if state.place == place]
        if len(behind) == len(ranks):
            behind = [state for state in ranks if state.doing in ALONE]
        if not 0 < len(behind) < len(ranks):
            doing = ", ".join(f"rank {state.rank} {state.doing}" for state in ranks)
            return f"{mine}; all ranks are in the same place ({doing}), so it is unknown which of them hangs: {remedy}"
        names = " and ".join(map(str, behind))
        return f"{mine} for {names}, still {behind[0].doing} in epoch {place[0]}, batch {place[1]}: {remedy}"


def _key(rank: int) -> str:
    return f"splitformer/watch/{rank}"


def _connect(timeout: float) -> TCPStore:
    """Open another connection to the store of the process group, because threads cannot share one."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )
