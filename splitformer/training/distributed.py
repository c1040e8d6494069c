"""Ranks: joining their process group, agreeing, and stopping on a signal."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from splitformer.errors import UserError

T = TypeVar("T")

GLOO_SECONDS = 0.5
"""Time for gloo's thread to release the tensors of the last collective operation."""
STORE_SECONDS = 0.05
"""Pause between two looks at what other ranks have done."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among the ranks of a run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor on the device over all ranks, in place, and return it."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def barrier(self) -> None:
        """Wait for all ranks, on GPUs too, where other collective operations need not wait."""
        if self.world_size > 1:
            distributed.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def from_main(self, value: Any) -> Any:
        """Return the main rank's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, call: Callable[[], T]) -> T:
        """Call `call` on the main rank, and return its result on every rank.

        If it raises a UserError or an OSError, the other ranks exit with status 1 without a message.
        """
        return self.from_main(self._checked(call))

    def main_first(self, call: Callable[[], T]) -> T:
        """Call `call` on every rank, after it has succeeded on the main rank. Errors are as for `on_main`."""
        result = self._checked(call)
        return cast(T, result) if self.is_main else call()

    def _checked(self, call: Callable[[], T]) -> T | None:
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = call()
            except (UserError, OSError) as problem:
                error = problem
        if self.from_main(error is not None):
            raise error or SystemExit(1)
        return result

    def raise_first(self, error: Exception | None) -> None:
        """Raise if any rank has an error: the first of these raises its own, the others exit with status 1."""
        failed = torch.zeros(self.world_size, device=self.device)
        failed[self.rank] = float(error is not None)
        first = next((rank for rank, flag in enumerate(self.sum(failed).tolist()) if flag), None)
        if first is not None:
            raise error if error is not None and first == self.rank else SystemExit(1)


@contextmanager
def process_group(timeout_minutes: float = 30.0, before: Callable[[], object] | None = None) -> Iterator[Ranks]:
    """Join the process group that `launch` or torchrun describes in the environment, with NCCL on GPUs or gloo on CPUs.

    Without such an environment there is a single rank. A collective operation fails one minute after `timeout_minutes`,
    so that `Watch` can name the missing rank before.

    Args:
      before: called on the main rank, then on the others, before the group exists: no time limit covers it. Errors are
        as for `Ranks.on_main`.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        logging.getLogger("torch").setLevel(logging.WARNING)
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes + 1)
        store, rank, world_size = next(distributed.rendezvous("env://", timeout=timeout))
        if before is not None:
            _main_first(store, rank, world_size, before)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    elif before is not None:
        before()
    try:
        yield Ranks(rank, world_size, device)
    finally:
        if world_size > 1:
            # Freeing the group holds the interpreter's lock and waits for gloo's thread, which needs that lock to
            # release the tensors of the last operation: in torch 1.13 most processes hung here without this pause.
            time.sleep(GLOO_SECONDS)
            distributed.destroy_process_group()


def _main_first(store: distributed.Store, rank: int, world_size: int, call: Callable[[], object]) -> None:
    """Call `call` on the main rank, then on all others, and return when all have done so."""
    done, failed = 1, 2
    if rank == 0:
        try:
            call()
        except BaseException:
            store.add("main", failed)
            _wait_for(store, "left", world_size - 1, seconds=5.0)  # torch complains if the store goes before them
            raise
        store.add("main", done)
    else:
        if _wait_for(store, "main", done) >= failed:
            store.add("left", 1)
            raise SystemExit(1)
        call()
    store.add("all", 1)
    _wait_for(store, "all", world_size)


def _wait_for(store: distributed.Store, key: str, number: int, seconds: float = math.inf) -> int:
    """Return the number at `key` when it is at least `number`, or after `seconds`: the store's `wait` has a limit."""
    deadline = time.monotonic() + seconds
    while (found := store.add(key, 0)) < number and time.monotonic() < deadline:
        time.sleep(STORE_SECONDS)
    return found


class StopRequest:
    """Records SIGTERM, SIGUSR1 (Slurm's --signal) and SIGINT while it is entered.

    A second Ctrl-C raises KeyboardInterrupt.
    """

    ONE_CTRL_C = 1.0
    """Seconds in which SIGINT may arrive several times: from the terminal, and from whatever started the ranks."""

    def __init__(self) -> None:
        self.name = ""
        """name of the first signal, if one came"""
        self._interrupted = math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return bool(self.name)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._interrupted > self.ONE_CTRL_C:
                raise KeyboardInterrupt
            self._interrupted = min(self._interrupted, now)
