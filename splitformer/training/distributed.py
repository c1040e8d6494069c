"""What torchrun started: ranks, devices and the process group."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

LETTING_GO = 0.5
"""seconds"""


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor on their device, in its place."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """What the main rank has; the others' value counts for nothing."""
        if self.world_size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1, device=self.device))


@contextmanager
def process_group(timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes (NCCL on GPUs, gloo on CPUs); alone where there is none.

    Ranks that wait for one another longer than `timeout_minutes`, and one more for `Watch` to say for whom, give up.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes + 1))
    try:
        yield Ranks(rank, world_size, device)
    finally:
        if world_size > 1:
            # A thread of gloo lets go of the tensors of the last exchange some time after it, for which it needs the
            # interpreter's lock. Whoever frees the group before that holds the lock while it waits for the thread: in
            # torch 1.13, most processes that ended right after an exchange never did.
            time.sleep(LETTING_GO)
            distributed.destroy_process_group()
