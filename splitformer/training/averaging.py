"""Checkpoints: everything a run needs to go on, and a model that rebuilds from its file alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def epoch_checkpoints(exp_dir: str | Path) -> dict[int, Path]:
    """{N: exp_dir/epoch-N.pt}, rising."""
    found = {}
    for path in Path(exp_dir).glob("epoch-*.pt"):
        match = re.fullmatch(r"epoch-(\d+)\.pt", path.name)
        if match:
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


class RunningAverage:
    """The mean of a model's weights over all steps so far, refreshed every `period` steps.

    With w_n the weights after step n, A_n = A_{n-p} + (w_n - A_{n-p}) p / n is the mean of w_p, w_2p, ..., w_n. The
    mean over the steps after m is then (n A_n - m A_m) / (n - m): see `average_between`. So any range of epochs can
    be averaged over all of its steps, from two files. (The idea is icefall's `--use-averaged-model`.)
    """

    def __init__(self, state: Mapping[str, Tensor], period: int, step: int = 0) -> None:
        self.period = period
        self.step = step
        """the last step that the mean holds; 0: none yet"""
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}

    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Call after every step, counted from 1."""
        if step % self.period:
            return
        for name, tensor in state.items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor.detach(), self.period / step)
            else:
                self.state[name].copy_(tensor)
        self.step = step


def average_between(
    earlier: Mapping[str, Tensor], earlier_step: int, later: Mapping[str, Tensor], later_step: int
) -> dict[str, Tensor]:
    """The mean of the weights over the steps after `earlier_step` up to `later_step`, from two running averages.

    Computed in float64: the difference of two long means loses digits in float32. With `earlier_step` 0, `earlier`
    counts for nothing.

    Raises:
      ValueError: the steps do not rise.
    """
    if not 0 <= earlier_step < later_step:
        raise ValueError(f"steps {earlier_step} and {later_step} must rise, for a mean of the weights between them")
    averaged = {}
    for name, tensor in later.items():
        if not tensor.is_floating_point():
            averaged[name] = tensor
            continue
        total = tensor.double() * later_step - earlier[name].double() * earlier_step
        averaged[name] = (total / (later_step - earlier_step)).to(tensor.dtype)
    return averaged
