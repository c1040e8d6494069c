"""A dry run on the largest batches of an epoch, so that memory runs out before the first step or not at all.

The memory of a step depends only on the shape of its batch, and the plan of an epoch gives the shapes without reading
any data. The dry run computes loss and gradients of random features in the worst shapes, and adds what the optimizer
and the exchange of gradients will allocate later.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from splitformer.data.plan import EpochPlan, filled, plan_epoch
from splitformer.errors import UserError
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.conformer import trial
from splitformer.training.distributed import Ranks
from splitformer.training.precision import Precision

if TYPE_CHECKING:
    from splitformer.data.training import TrainingData

FRAMES_PER_SECOND = 100
TRIALS = 6
"""Trials to find the largest max_duration that fits."""
SPARE = 0.05
"""Share of the memory that proposals leave free, because equal shapes do not take exactly the same in two runs."""
MAX_ACCUM_GRAD = 64
LAST_STEP = 2**31
"""A training step in which every loss is computed."""
GIB = 2**30


class DoesNotFit(UserError):
    """The largest batches need more memory than there is; the message proposes batches that fit."""


class Shape(NamedTuple):
    """The shape of a micro-batch: utterances, frames of the longest, and labels of the longest transcript."""

    utterances: int
    frames: int
    labels: int

    def __str__(self) -> str:
        return f"{self.utterances} x {self.frames / FRAMES_PER_SECOND:.1f} s"


class Peak(NamedTuple):
    """Peak memory in bytes."""

    used: float
    available: float
    shapes: list[Shape]

    def __str__(self) -> str:
        tried = ", ".join(dict.fromkeys(map(str, self.shapes)))
        memory = f"{self.used / GIB:.2f} of {self.available / GIB:.1f} GiB"
        return f"dry run on the largest batches ({tried}): peak memory {memory}"


def check_memory(dry_run: DryRun, data: TrainingData, world_size: int, accum_grad: int) -> Peak:
    """Try the largest batches of the first epoch and return their peak. Raises DoesNotFit with what would fit."""
    durations, configured = data.index.durations, data.config.data.max_duration
    longest = float(durations.max())

    def measure(max_duration: float, accum_grad: int, spare: float) -> Peak:
        plan = plan_epoch(durations, max_duration, data.num_buckets, data.seed, epoch=1)
        return dry_run.peak(pessimistic_shapes(plan, durations, data.index.tokens, world_size * accum_grad), spare)

    def fits(max_duration: float, accum_grad: int) -> bool:
        with suppress(DoesNotFit):
            measure(max_duration, accum_grad, SPARE)
            return True
        return False

    try:
        return measure(configured, accum_grad, spare=0.0)
    except DoesNotFit as error:
        reason = str(error)
    if not fits(longest, accum_grad):
        raise DoesNotFit(
            f"{reason}; nor does a batch of the longest utterance alone, {longest:.1f} s: lower "
            "data.max_utterance_seconds, or choose a smaller model"
        )
    low, high = longest, min(configured, longest * len(durations))
    for _ in range(TRIALS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle, accum_grad) else (low, middle)
    more = 2 * accum_grad
    while more < MAX_ACCUM_GRAD and not fits(configured, more):
        more *= 2
    raise DoesNotFit(
        f"{reason}. --accum-grad {more} makes it fit with the same batches; otherwise, the largest "
        f"data.max_duration that fits is {max(math.floor(low), math.ceil(longest))}"
    )


def pessimistic_shapes(plan: EpochPlan, durations: np.ndarray, tokens: np.ndarray, count: int) -> list[Shape]:
    """Return the shapes with the most frames, attention weights and lattice cells, of `count` micro-batches a batch."""
    shapes = []
    for number in range(len(plan)):
        cuts = filled(plan.batch(number), count)[::count]  # the first micro-batch is the largest
        frames = math.ceil(durations[cuts].max() * FRAMES_PER_SECOND)
        shapes.append(Shape(len(cuts), frames, int(tokens[cuts].max())))
    largest = (
        max(shapes, key=lambda s: s.utterances * s.frames),
        max(shapes, key=lambda s: s.utterances * s.frames**2),
        max(shapes, key=lambda s: s.utterances * s.frames * s.labels),
    )
    return list(dict.fromkeys(largest))


class DryRun:
    """Measures the memory that shapes need, and leaves `loss` unchanged."""

    def __init__(
        self, loss: MultiExitLoss, optimizer: torch.optim.Optimizer, precision: Precision, ranks: Ranks
    ) -> None:
        self.loss, self.precision, self.device = loss, precision, ranks.device
        weights = sum(p.numel() * p.element_size() for p in loss.parameters())
        # AdamW's two moments, and the buckets in which ranks exchange gradients
        self.to_come = weights * ((0 if optimizer.state else 2) + (ranks.world_size > 1))

    def peak(self, shapes: list[Shape], spare: float = 0.0) -> Peak:
        """Return the highest peak of `shapes`. Raises DoesNotFit if it exceeds the memory less the share `spare`."""
        available = (1 - spare) * available_memory(self.device)
        peak = Peak(max(self._try(shape, available) for shape in shapes), available, shapes)
        if peak.used > available:
            raise DoesNotFit(f"the {peak}")
        return peak

    def _try(self, shape: Shape, available: float) -> float:
        free = f"the {available / GIB:.2f} GiB that are free"
        # on a CPU, a process that takes too much may be killed without a message: extrapolate from smaller batches
        divisors = (8, 4, 2, 1) if self.device.type == "cpu" else (1,)
        peaks: list[tuple[int, float]] = []
        try:
            for size in sorted({math.ceil(shape.utterances / divisor) for divisor in divisors}):
                if len(peaks) > 1 and _extrapolated(peaks, size) > available:
                    expected = _extrapolated(peaks, shape.utterances) / GIB
                    raise DoesNotFit(f"a batch of {shape} would take {expected:.2f} GiB, more than {free}")
                peaks.append((size, self._run(shape._replace(utterances=size))))
            return peaks[-1][1]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            problem = str(error).splitlines()[0]
        # outside the except clause, whose traceback keeps the tensors alive
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise DoesNotFit(f"a batch of {shape} does not fit into {free} ({problem})")

    def _run(self, shape: Shape) -> float:
        """Return the peak in bytes of one forward and backward pass."""
        n, device = shape.utterances, self.device
        config = self.loss.model.config
        labels = torch.arange(max(1, shape.labels)) % (config.vocab_size - 1) + 1
        reset_peak(device)
        to_come = torch.empty(self.to_come if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        with trial(self.loss):
            with self.precision.autocast():
                loss = self.loss(
                    torch.randn(n, shape.frames, config.num_mel_bins, device=device),
                    torch.full((n,), shape.frames),
                    labels.repeat(n, 1),
                    torch.full((n,), len(labels)),
                    step=LAST_STEP,
                )
            loss.total.backward()
            del loss, to_come
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                return peak_memory(device)
            return peak_memory(device) + self.to_come


def out_of_memory(error: Exception) -> bool:
    """Return whether torch, k2 or Python could not allocate memory."""
    return isinstance(error, MemoryError) or bool(re.search(r"out of memory|can't allocate memory", str(error)))


def _extrapolated(peaks: list[tuple[int, float]], size: int) -> float:
    """Return the peak at `size` on the line through the first and the last point, at least that of the last."""
    (a, low), (b, high) = peaks[0], peaks[-1]
    return high + max(0.0, high - low) / (b - a) * (size - b)


def available_memory(device: torch.device) -> float:
    """Return the bytes that this process may use, including those that it uses already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    kilobytes = _number("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB")
    limit = _number("/sys/fs/cgroup/memory.max", r"^(\d+)") - _number("/sys/fs/cgroup/memory.current", r"^(\d+)", 0.0)
    return process_memory("VmRSS") + min(kilobytes * 1024, limit) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def process_memory(name: str) -> float:
    """Return this process's bytes that Linux calls `name` (VmRSS: in use, VmHWM: the peak); 0 on other systems."""
    return 1024 * _number("/proc/self/status", rf"^{name}:\s+(\d+) kB", 0.0)


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that this process has used: of the GPU, or else of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    return process_memory("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Let the peak memory of this process start from what it uses now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would count towards the next trial
    with suppress(OSError):  # then the peak is that of the whole run, which is not lower
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def _number(path: str, pattern: str, default: float = math.inf) -> float:
    """Return the number that `pattern` finds in a file; `default` if there is no such file or line."""
    try:
        found = re.search(pattern, Path(path).read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return default
    return float(found[1]) if found else default
