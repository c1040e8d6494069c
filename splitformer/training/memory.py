"""A dry run on the largest batches of an epoch, so that memory runs out before the first step or not at all.

What a step takes depends on the shape of its batch alone, and the plan of an epoch tells the shapes without reading
anything. The dry run computes the loss and the gradients of random features of the worst of them, and adds what the
optimiser and the exchange of gradients will allocate later.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from splitformer.config import ModelConfig
from splitformer.data.plan import EpochPlan, filled, plan_epoch
from splitformer.data.training import TrainingData
from splitformer.errors import UserError
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.conformer import statistics_of_one_rank
from splitformer.training.distributed import Ranks
from splitformer.training.precision import Precision

FRAMES_PER_SECOND = 100
TRIALS = 6
"""in search of the largest max_duration that fits"""
SPARE = 0.05
"""of the memory, which what is proposed leaves: the same shapes do not take quite the same in two runs"""
MOST_PARTS = 64
"""accumulated parts that are tried"""
LAST_STEP = 2**31
"""of training: every loss is at work by then"""
GIB = 2**30


class DoesNotFit(UserError):
    """The largest batches take more memory than there is; the message says what would fit."""


class Shape(NamedTuple):
    """What one forward and backward pass takes in."""

    utterances: int
    frames: int
    """of the longest"""
    labels: int
    """of the longest transcript"""

    def __str__(self) -> str:
        return f"{self.utterances} x {self.frames / FRAMES_PER_SECOND:.1f} s"


@dataclass(frozen=True)
class Peak:
    """What the dry run found, in bytes."""

    used: float
    available: float
    shapes: list[Shape]

    def __str__(self) -> str:
        tried = ", ".join(dict.fromkeys(map(str, self.shapes)))
        memory = f"{self.used / GIB:.2f} of {self.available / GIB:.1f} GiB"
        return f"dry run on the largest batches ({tried}): peak memory {memory}"


def check_memory(dry_run: DryRun, data: TrainingData, world_size: int, accum_grad: int) -> Peak:
    """Try the largest batches of the first epoch.

    Raises:
      DoesNotFit: with the largest data.max_duration that does, and the accumulation that makes room without a change of
        what is trained.
    """
    durations, tokens, longest = data.index.durations, data.index.tokens, float(data.index.durations.max())
    configured = data.config.data.max_duration

    def try_out(max_duration: float, accum_grad: int, spare: float = 0.0) -> Peak:
        plan = plan_epoch(durations, max_duration, data.num_buckets, data.seed, epoch=1)
        return dry_run.peak(pessimistic_shapes(plan, durations, tokens, world_size * accum_grad), spare)

    def fits(max_duration: float, accum_grad: int) -> bool:
        try:
            try_out(max_duration, accum_grad, SPARE)
        except DoesNotFit:
            return False
        return True

    try:
        return try_out(configured, accum_grad)
    except DoesNotFit as error:
        reason = str(error)
    if not fits(longest, accum_grad):
        raise DoesNotFit(
            f"{reason}; nor does a batch of the longest utterance alone, {longest:.1f} s: lower "
            "data.max_utterance_seconds, or take a smaller model"
        )
    low, high = longest, min(configured, longest * len(durations))
    for _ in range(TRIALS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle, accum_grad) else (low, middle)
    more = 2 * accum_grad
    while more < MOST_PARTS and not fits(configured, more):
        more *= 2
    raise DoesNotFit(
        f"{reason}. --accum-grad {more} makes it fit with the same batches; without, the largest "
        f"data.max_duration that fits is {math.floor(low)}"
    )


def pessimistic_shapes(plan: EpochPlan, durations: np.ndarray, tokens: np.ndarray, parts: int) -> list[Shape]:
    """Of the shares of `plan` in `parts`, those with the most frames, attention weights and lattice cells; distinct."""
    shapes = []
    for number in range(len(plan)):
        share = filled(plan.batch(number), parts)[::parts]  # of part 0: no other has more
        frames = math.ceil(durations[share].max() * FRAMES_PER_SECOND)
        shapes.append(Shape(len(share), frames, int(tokens[share].max())))
    sizes: list[Callable[[Shape], int]] = [
        lambda s: s.utterances * s.frames,
        lambda s: s.utterances * s.frames**2,
        lambda s: s.utterances * s.frames * s.labels,
    ]
    return list(dict.fromkeys(max(shapes, key=size) for size in sizes))


class DryRun:
    """Measures the memory that shapes take, and leaves `loss` as it was."""

    def __init__(
        self,
        loss: MultiExitLoss,
        optimizer: torch.optim.Optimizer,
        config: ModelConfig,
        precision: Precision,
        ranks: Ranks,
    ) -> None:
        self.loss, self.config, self.precision, self.device = loss, config, precision, ranks.device
        weights = sum(p.numel() * p.element_size() for p in loss.parameters())
        # AdamW's two moments; the buckets in which gradients travel between ranks
        self.still_to_come = weights * ((0 if optimizer.state else 2) + (ranks.world_size > 1))

    def peak(self, shapes: list[Shape], spare: float = 0.0) -> Peak:
        """The most memory that any of `shapes` takes.

        Raises:
          DoesNotFit: there is not so much, less a share of `spare`.
        """
        available = (1 - spare) * _available(self.device)
        peak = Peak(max(self._try(shape, available) for shape in shapes), available, shapes)
        if peak.used > available:
            raise DoesNotFit(f"the {peak}")
        return peak

    def _try(self, shape: Shape, available: float) -> float:
        free = f"the {available / GIB:.2f} GiB that are free"
        n = shape.utterances
        # a process that takes more than there is may be killed without a word: on a CPU, look ahead from smaller ones
        sizes = sorted({math.ceil(n / part) for part in ((8, 4, 2, 1) if self.device.type == "cpu" else (1,))})
        found: list[tuple[int, float]] = []
        try:
            for size in sizes:
                if len(found) > 1 and _on_a_line(found, size) > available:
                    expected = _on_a_line(found, n) / GIB
                    raise DoesNotFit(f"a batch of {shape} would take {expected:.2f} GiB, more than {free}")
                found.append((size, self._run(shape._replace(utterances=size))))
            return found[-1][1]
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0]
        # out of the except clause, whose traceback holds on to the tensors
        self._clean()
        raise DoesNotFit(f"a batch of {shape} does not fit into {free} ({problem})")

    def _run(self, shape: Shape) -> float:
        """Bytes at the peak of one forward and backward pass."""
        n, device = shape.utterances, self.device
        labels = torch.arange(max(1, shape.labels)) % (self.config.vocab_size - 1) + 1
        buffers = [buffer.clone() for buffer in self.loss.buffers()]
        _reset_peak(device)
        to_come = torch.empty(self.still_to_come if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        try:
            with statistics_of_one_rank(self.loss), self.precision.autocast():
                loss = self.loss(
                    torch.randn(n, shape.frames, self.config.num_mel_bins, device=device),
                    torch.full((n,), shape.frames, device=device),
                    labels.repeat(n, 1).to(device),
                    torch.full((n,), len(labels), device=device),
                    step=LAST_STEP,
                )
            loss.total.backward()
            del loss, to_come
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                return float(torch.cuda.max_memory_reserved(device))
            return _status("VmHWM") + self.still_to_come
        finally:
            for buffer, before in zip(self.loss.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self._clean()

    def _clean(self) -> None:
        for parameter in self.loss.parameters():
            parameter.grad = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _on_a_line(found: list[tuple[int, float]], size: int) -> float:
    """The value at `size` of the line through the first and the last point, no lower than the last."""
    (a, low), (b, high) = found[0], found[-1]
    return high + max(0.0, high - low) / (b - a) * (size - b)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or bool(re.search(r"out of memory|can't allocate memory", str(error)))


def _available(device: torch.device) -> float:
    """Bytes that this process may have, those that it has among them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    free = _number(Path("/proc/meminfo"), r"^MemAvailable:\s+(\d+) kB") * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max", r"^(\d+)"), _number(group / "memory.current", r"^(\d+)")
    return _resident() + min(free, limit - used if limit < math.inf else free) / int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)
    )


def _resident() -> float:
    return _status("VmRSS")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed: an earlier trial would be part of this one
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of the resident set starts anew
    except OSError:
        return  # the peak of the whole run so far is no less


def _status(name: str) -> float:
    """Bytes of a line of Linux's account of this process; 0 elsewhere."""
    found = _number(Path("/proc/self/status"), rf"^{name}:\s+(\d+) kB")
    return found * 1024 if found < math.inf else 0.0


def _number(path: Path, pattern: str) -> float:
    """What `pattern` finds in a file; infinity where there is no such file or line."""
    try:
        found = re.search(pattern, path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return math.inf
    return float(found[1]) if found else math.inf
