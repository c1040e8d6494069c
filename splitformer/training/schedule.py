"""Learning rates as pure functions of the step, counted from 1 in global batches."""

from __future__ import annotations

import math

from splitformer.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int, d_model: int) -> float:
    """The rate of `step` by `config.schedule`."""
    if config.schedule == "noam":
        return noam(config.base_lr, step, config.warmup_steps, d_model)
    return cosine(config.base_lr, step, total_steps, config.warmup_fraction)


def noam(factor: float, step: int, warmup_steps: int, d_model: int) -> float:
    """Rise linearly, then fall with the square root of the step (Vaswani et al. 2017, equation 3)."""
    return factor * d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)


def cosine(peak: float, step: int, total_steps: int, warmup_fraction: float) -> float:
    """Rise linearly to `peak`, then fall to zero along half a cosine (arXiv 1608.03983, without restarts)."""
    warmup = max(1.0, warmup_fraction * total_steps)
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
