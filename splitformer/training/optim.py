"""The optimizer, its learning rate schedule, and the running average of the weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from splitformer.config import OptimConfig


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) in its fastest variant; the caller sets the learning rate before each step.

    On a GPU that is one fused kernel (torch 2), elsewhere one operation for all parameters at a time.
    """
    parameters = list(parameters)
    can_fuse = "fused" in inspect.signature(torch.optim.AdamW).parameters
    variant = {"fused": True} if can_fuse and all(p.is_cuda for p in parameters) else {"foreach": True}
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parameters, betas=betas, weight_decay=config.weight_decay, **variant)


def learning_rate(config: OptimConfig, step: int, total_steps: int, d_model: int) -> float:
    """Return the learning rate of `step`, counted from 1 in global batches."""
    if config.schedule == "noam":
        return noam(config.base_lr, step, config.warmup_steps, d_model)
    return cosine(config.base_lr, step, total_steps, config.warmup_fraction)


def noam(factor: float, step: int, warmup_steps: int, d_model: int) -> float:
    """Rise linearly, then decay with the inverse square root of the step (Vaswani et al. 2017, equation 3)."""
    return factor * d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)


def cosine(peak: float, step: int, total_steps: int, warmup_fraction: float) -> float:
    """Rise linearly to `peak`, then fall to zero along half a cosine (arXiv 1608.03983, without restarts)."""
    warmup = max(1.0, warmup_fraction * total_steps)
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


class RunningAverage:
    """The mean of a model's weights over all steps so far, updated every `period` steps (icefall's averaged model).

    With w_n the weights after step n, A_n = A_{n-p} + (w_n - A_{n-p}) p / n is the mean of w_p, w_2p, ..., w_n. From
    two of these means, `checkpoint.average_between` computes that of the steps in between.
    """

    def __init__(self, state: Mapping[str, Tensor], period: int, step: int = 0) -> None:
        self.period = period
        self.step = step
        """the last step in the mean; 0: none yet"""
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}

    def due(self, step: int) -> bool:
        """Return whether the weights after `step`, counted from 1, enter the mean."""
        return step % self.period == 0

    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Add the weights after `step`; call it after every step that is due."""
        for name, tensor in state.items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor.detach(), self.period / step)
            else:
                self.state[name].copy_(tensor)
        self.step = step
