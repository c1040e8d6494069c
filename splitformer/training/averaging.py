"""Checkpoints: everything a run needs to go on, and a model that rebuilds from its file alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


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
