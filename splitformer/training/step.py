"""The arithmetic of one training step: gradients, the decision whether they are finite, and the update of the weights.

On a GPU, the host only launches operations, and should never wait for one of them: while it waits, it launches nothing,
and then the GPU has nothing to do. So lengths, labels and counts stay on the host. Where the optimizer can leave out a
step by itself (AdamW's fused kernel), the device decides whether the gradients are finite, and the host reads the
numbers of a step while the next one is under way. What it cannot avoid is that torch's CTC loss copies the lengths to
the GPU and waits for that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from splitformer.data.batch import Batch
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.subsampling import MIN_FRAMES
from splitformer.training.distributed import Ranks
from splitformer.training.precision import Precision


@dataclass
class Step:
    """A step that was launched. Its `numbers` are on the device, and known when it is done."""

    number: int
    """counted from 1, in global batches"""
    tokens: float
    """of the global batch"""
    micro_batches: list[Batch]
    """of this rank"""
    numbers: Tensor
    """the fields of `Numbers` in their order"""
    finite: Tensor
    """for each of `micro_batches`, whether its loss is"""
    good: Tensor
    """whether the weights may change: all numbers are finite, and every rank had data"""
    ready: torch.cuda.Event | None = None
    """when the numbers have reached the host"""

    def suspects(self, numbers: Numbers) -> list[Batch]:
        """Return the micro-batches of this rank that may be why the step is not finite."""
        if not numbers.not_finite:  # every loss was finite: it may be any
            return self.micro_batches
        return [batch for batch, finite in zip(self.micro_batches, self.finite.tolist(), strict=True) if not finite]


@dataclass(frozen=True)
class Numbers:
    """What is known of a step when it is done, over all ranks. Losses are per label token."""

    per_exit: list[float]
    loss: float
    not_finite: float  # micro-batches whose loss is not
    frames: float
    unreadable: float  # cuts that were left out of the batch
    stops: float  # ranks that were asked to stop
    without_data: float  # ranks that could not load
    norm: float  # of the gradients, before clipping

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, [*self.per_exit, self.loss, self.norm]))


class Stepper:
    """Computes the steps of a run, on one rank, in the order `gradients`, `update`, `read`."""

    def __init__(
        self,
        loss: MultiExitLoss,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        ranks: Ranks,
        clip_grad_norm: float,
    ) -> None:
        self.loss, self.optimizer, self.precision, self.ranks = loss, optimizer, precision, ranks
        self.clip_grad_norm = clip_grad_norm
        self.deferred = bool(optimizer.defaults.get("fused"))
        """The device decides whether a step counts; `update` does not wait for it. `read` may be called after the
        `gradients` of the next step."""
        self.buffers = joined_buffers(loss)
        self.before: list[Tensor] = []
        self.ddp: MultiExitLoss | DistributedDataParallel = loss
        if ranks.world_size > 1:
            # buffers need not be sent: batch statistics are those of all ranks
            renamed = hasattr(DistributedDataParallel, "broadcast_buffers")  # a deprecated property, from torch 2.13
            no_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self.ddp = DistributedDataParallel(loss, **no_buffers)

    def gradients(
        self,
        number: int,
        micro_batches: Sequence[Batch],
        seeds: Sequence[tuple[int, ...]],
        tokens: float,
        stop: bool = False,
        without_data: bool = False,
    ) -> Step:
        """Add up the gradients of this rank's micro-batches and those of all ranks, and clip them.

        Args:
          number: of the step, counted from 1.
          seeds: of the dropout of each micro-batch, so that a resumed run draws the same.
          tokens: in the global batch, over all ranks.
          stop: this rank was asked to stop.
          without_data: this rank could not load its micro-batches; no rank changes its weights.
        """
        device, world_size = self.ranks.device, self.ranks.world_size
        self.before = [buffer.clone() for buffer in self.buffers]
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for position, (batch, seed) in enumerate(zip(micro_batches, seeds, strict=True), start=1):
            seed_everything(*seed)
            local = world_size > 1 and position < len(micro_batches)
            with self.ddp.no_sync() if local else nullcontext():  # type: ignore[operator]
                x = batch.x.to(device, non_blocking=True)
                with self.precision.autocast():
                    loss = self.ddp(x, batch.x_lens, batch.y, batch.y_lens, number, num_tokens=tokens)
                # DistributedDataParallel averages over ranks, but the gradients of micro-batches are to be added
                self.precision.scaler.scale(loss.total * world_size).backward()
            losses.append(torch.cat([loss.per_exit, loss.total.detach().view(1)]))
        every_loss = torch.stack(losses)
        finite = torch.isfinite(every_loss[:, -1])
        frames = sum(int(batch.x_lens.sum()) for batch in micro_batches)
        unreadable = sum(len(batch.errors) for batch in micro_batches)
        counts = torch.tensor([frames, unreadable, stop, without_data], dtype=torch.float32)
        if device.type == "cuda":
            counts = counts.pin_memory()
        not_finite = (~finite).sum().view(1)
        sums = self.ranks.sum(torch.cat([every_loss.sum(dim=0), not_finite, counts.to(device, non_blocking=True)]))
        self.precision.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.loss.parameters(), self.clip_grad_norm)
        numbers = torch.cat([sums, norm.detach().view(1)])
        good = torch.isfinite(numbers).all() & (sums[-1] == 0)
        return Step(number, tokens, list(micro_batches), numbers, finite, good)

    def update(self, step: Step) -> None:
        """Update the weights with the gradients of `step` if it is good; otherwise undo its batch statistics."""
        if self.deferred:
            optimizer: Any = self.optimizer
            # what a GradScaler sets, too; the fused kernel leaves out the step where found_inf is 1
            optimizer.grad_scale, optimizer.found_inf = None, (~step.good).float()
            optimizer.step()
            for buffer, before in zip(self.buffers, self.before, strict=True):
                buffer.copy_(torch.where(step.good, buffer, before))
            step.numbers = step.numbers.to("cpu", non_blocking=True)
            if self.ranks.device.type == "cuda":
                step.ready = torch.cuda.Event()
                step.ready.record()
        elif step.good:
            self.precision.scaler.step(self.optimizer)
        else:
            self._restore_buffers()
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def undo(self) -> None:
        """Forget the gradients computed last, and what they did to batch statistics."""
        self._restore_buffers()
        self.optimizer.zero_grad(set_to_none=True)

    def read(self, step: Step) -> Numbers:
        """Return the numbers of a step; wait for the device if it is not done."""
        if step.ready is not None:
            step.ready.synchronize()
        *per_exit, loss, not_finite, frames, unreadable, stops, without_data, norm = step.numbers.tolist()
        return Numbers(per_exit, loss, not_finite, frames, unreadable, stops, without_data, norm)

    def _restore_buffers(self) -> None:
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(before)  # batch statistics that are not finite would stay so


def joined_buffers(module: nn.Module) -> list[Tensor]:
    """Move the buffers of `module` into one tensor for each of their types, and return these tensors.

    The module keeps views, so that a single operation copies all of them.
    """
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers():
        by_type.setdefault(buffer.dtype, []).append(buffer)
    joined = []
    for buffers in by_type.values():
        whole = torch.cat([buffer.flatten() for buffer in buffers])
        for buffer, part in zip(buffers, whole.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.data = part.view_as(buffer)
        joined.append(whole)
    return joined


def silence(num_mel_bins: int) -> Batch:
    """Return a batch without labels, for a rank without data that has to take part in the step of the others."""
    frames = 4 * MIN_FRAMES
    no_labels, none = torch.zeros(1, 1, dtype=torch.long), torch.tensor([0])
    x = torch.zeros(1, frames, num_mel_bins)
    return Batch(x, torch.tensor([frames]), no_labels, none, texts=[""], cut_ids=[], durations=[0.0], errors={})


def seed_everything(*key: int) -> None:
    """Seed what a step draws."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    torch.manual_seed(seed)
