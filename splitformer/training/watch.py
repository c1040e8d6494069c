"""Finds the rank that the others wait for.

A collective operation that times out says that somebody is missing, not who. Each rank therefore publishes what it is
doing and since when, from a thread of its own, in the store through which the ranks met. A rank that has not come
further for too long reads what the others last said, names those that are behind, and ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType

from torch.distributed import TCPStore

ALONE = ("loading", "validating", "saving")
"""what a rank does by itself: the others may be waiting for it, and it waits for nobody"""
STUCK = 70
"""exit status of a rank that gives up waiting"""


@dataclass
class RankState:
    """What one rank last said."""

    rank: int
    host: str
    pid: int
    place: list[int]
    """(epoch, batch): how far it is"""
    doing: str
    beat: int = 0
    """how often it has said something: a number that stands still is a process that does"""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watch:
    """While it is entered, ends the process when its main thread has not come further for `minutes`.

    Of a single rank there is nothing to watch: a run may take as long as it likes.
    """

    def __init__(self, rank: int, world_size: int, minutes: float) -> None:
        self.world_size, self.seconds = world_size, 60 * minutes
        self.state = RankState(rank, socket.gethostname(), os.getpid(), [0, 0], "starting")
        self.since = time.monotonic()
        self._ended = threading.Event()
        self._store: TCPStore | None = None

    def __enter__(self) -> Watch:
        if self.world_size > 1:
            self.since = time.monotonic()
            threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()

    def report(self, doing: str, epoch: int | None = None, batch: int | None = None) -> None:
        """The main thread has come further."""
        if epoch is not None and batch is not None:
            self.state.place = [epoch, batch]
        self.state.doing = doing
        self.since = time.monotonic()

    def _run(self) -> None:
        pause = min(10.0, self.seconds / 10)
        heard: dict[int, tuple[RankState, float]] = {}
        ended = False
        while not ended:
            waited = time.monotonic() - self.since
            try:
                self._say(max(pause, 1.0))
                if waited > self.seconds / 2:
                    heard = self._listen(heard, max(pause, 1.0))
            except RuntimeError:  # whoever keeps the store does not answer
                heard, self._store = {}, None
            if waited > self.seconds and not self._ended.is_set():
                _leave(self._verdict(heard, waited))
            ended = self._ended.wait(pause)

    def _say(self, timeout: float) -> None:
        self.state.beat += 1
        self._store = self._store or _connect(timeout)
        self._store.set(_key(self.state.rank), json.dumps(asdict(self.state)))

    def _listen(self, before: dict[int, tuple[RankState, float]], timeout: float) -> dict[int, tuple[RankState, float]]:
        """{rank: (its state, when that was heard first)}"""
        heard = {}
        self._store.get(_key(self.state.rank))  # there is an answer to this, if there is one to anything
        for rank in range(self.world_size):
            self._store = self._store or _connect(timeout)
            try:
                state = RankState(**json.loads(self._store.get(_key(rank))))
            except RuntimeError:
                # it has said nothing so far; over this connection, a late answer would be taken for the next one's
                state, self._store = RankState(rank, "an unknown host", 0, [0, 0], "starting"), None
            known = before.get(rank)
            heard[rank] = known if known and known[0].beat == state.beat else (state, time.monotonic())
        return heard

    def _verdict(self, heard: dict[int, tuple[RankState, float]], waited: float) -> str:
        """Who is stuck, for all that this rank knows."""
        epoch, batch = self.state.place
        mine = f"rank {self.state.rank} has waited {waited:.0f} s in epoch {epoch}, batch {batch} ({self.state.doing})"
        remedy = (
            "look at that process (py-spy dump --pid, nvidia-smi, its disk) and start again with --resume; if it is "
            "merely slow, raise --timeout-minutes"
        )
        if not heard:
            return f"{mine} for rank 0, or its torchrun, through which the ranks meet; it does not answer: {remedy}"
        now = time.monotonic()
        silent = [state for state, when in heard.values() if now - when > self.seconds / 4]
        if silent:
            return f"{mine} for {_names(silent)}, which stands still or is gone: {remedy}"
        states = [state for state, _ in heard.values()]
        least = min(tuple(state.place) for state in states)
        behind = [state for state in states if tuple(state.place) == least]
        if len(behind) == len(states):
            behind = [state for state in states if state.doing in ALONE]
        if not 0 < len(behind) < len(states):
            doing = ", ".join(f"rank {state.rank} {state.doing}" for state in states)
            return f"{mine}; all ranks are in the same place ({doing}), which of them is stuck cannot be told: {remedy}"
        return f"{mine} for {_names(behind)}, still {behind[0].doing} in epoch {least[0]}, batch {least[1]}: {remedy}"


def _names(states: list[RankState]) -> str:
    return " and ".join(str(state) for state in states)


def _key(rank: int) -> str:
    return f"splitformer/watch/{rank}"


def _connect(timeout: float) -> TCPStore:
    """A second way into the store of the process group, so that this thread shares no connection with another."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )


def _leave(reason: str) -> None:
    print(f"train: {reason}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    sys.stderr.flush()
    os._exit(STUCK)
