"""What torchrun started: ranks, devices and the process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes (NCCL on GPUs, gloo on CPUs); alone where there is none."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world_size, device)
    finally:
        if world_size > 1:
            distributed.destroy_process_group()
