"""Finds the rank that the others wait for.

A collective operation that times out does not say which rank is missing. So a thread of each rank keeps a file up to
date that says what the rank is doing. A rank that makes no progress for too long reads the files, names the ranks that
are behind, and exits.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from splitformer.files import atomic_write
from splitformer.training.launch import HUNG
from splitformer.training.saving import TO_RESUME

ALONE = ("loading", "validating", "saving")
"""Non-collective activities: others may wait for a rank in one of them, but it waits for none."""


@dataclass
class RankState:
    """The last state that a rank wrote."""

    rank: int
    host: str
    pid: int
    place: list[int]  # epoch, batch
    doing: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watch:
    """While it is entered, ends the process if its main thread makes no progress for `minutes`.

    It does nothing for a single rank, whose run may take any time.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, minutes: float) -> None:
        """`folder` is shared by all ranks."""
        self.folder, self.world_size, self.seconds = folder, world_size, 60 * minutes
        self.state = RankState(rank, socket.gethostname(), os.getpid(), [0, 0], "starting")
        self.since = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Watch:
        if self.world_size > 1:
            self.since = time.monotonic()
            threading.Thread(target=self._run, name="watch", daemon=True).start()
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
        ended = False
        while not ended:
            waited = time.monotonic() - self.since
            with suppress(OSError), atomic_write(self._file(self.state.rank)) as file:
                json.dump(asdict(self.state), file)
            if waited > self.seconds and not self._ended.is_set():
                print(f"train: {self.verdict(waited)}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(HUNG)
            ended = self._ended.wait(min(10.0, self.seconds / 10))

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _read(self, rank: int) -> tuple[RankState, float]:
        """Return what a rank wrote last, and when."""
        try:
            text, when = self._file(rank).read_text(encoding="utf-8"), self._file(rank).stat().st_mtime
        except OSError:
            return RankState(rank, "an unknown host", 0, [0, 0], "starting"), 0.0
        return RankState(**json.loads(text)), when

    def verdict(self, waited: float) -> str:
        """Return which rank hangs, as far as the files tell."""
        epoch, batch = self.state.place
        mine = f"rank {self.state.rank} has waited {waited:.0f} s in epoch {epoch}, batch {batch} ({self.state.doing})"
        remedy = (
            "look at that process (py-spy dump --pid, nvidia-smi, its disk); if it is only slow, raise "
            f"--timeout-minutes; {TO_RESUME}"
        )
        ranks, written = zip(*map(self._read, range(self.world_size)))
        silent = [str(rank) for rank, when in zip(ranks, written) if max(written) - when > self.seconds / 4]
        if silent:
            return f"{mine} for {' and '.join(silent)}, which hangs or is gone: {remedy}"
        place = min(rank.place for rank in ranks)
        behind = [rank for rank in ranks if rank.place == place]
        if len(behind) == len(ranks):
            behind = [rank for rank in ranks if rank.doing in ALONE]
        if not 0 < len(behind) < len(ranks):
            doing = ", ".join(f"rank {rank.rank} {rank.doing}" for rank in ranks)
            return f"{mine}; all ranks are in the same place ({doing}), so it is unknown which of them hangs: {remedy}"
        names = " and ".join(map(str, behind))
        return f"{mine} for {names}, still {behind[0].doing} in epoch {place[0]}, batch {place[1]}: {remedy}"
