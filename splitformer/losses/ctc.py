"""CTC at every exit, as one module around the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from splitformer.model.asr import AsrModel


class ExitLosses(NamedTuple):
    """The training loss and what it is made of."""

    total: Tensor
    """scalar: the weighted mean over exits of the loss per label token"""
    per_exit: Tensor
    """(E,) detached loss per label token at each exit, in the order of the exits"""


class MultiExitCtcLoss(nn.Module):
    """Weighted mean over exits of the CTC loss (Graves et al. 2006; joint training as in arXiv 2309.09546, eq. 2).

    It holds the model, so that DistributedDataParallel sees a single forward, and nothing that a device needs:
    `model.state_dict()` is deployable as it stands.

    Each utterance's loss uses its own output length, not the padded one.
    """

    def __init__(self, model: AsrModel, exit_weights: Sequence[float] = (), blank_id: int = 0) -> None:
        super().__init__()
        self.model = model
        self.blank_id = blank_id
        weights = torch.tensor(exit_weights or [1.0] * len(model.encoder.exit_layers))
        self.register_buffer("exit_weights", weights / weights.sum(), persistent=False)

    def forward(self, x: Tensor, x_lens: Tensor, y: Tensor, y_lens: Tensor) -> ExitLosses:
        """
        Args:
          x: (N, T, C) features
          x_lens: (N,) valid frames; each must give at least as many output frames as its labels need
          y: (N, S) labels, padded with anything
          y_lens: (N,) valid labels
        """
        log_probs, lengths = [], []
        for exit_output, exit_log_probs in self.model(x, x_lens):
            log_probs.append(exit_log_probs)
            lengths.append(exit_output.lengths)
        exits = len(log_probs)
        # one call for all exits, stacked along the batch: the exits share their labels
        losses = nn.functional.ctc_loss(
            torch.cat(log_probs).transpose(0, 1),
            y.repeat(exits, 1),
            torch.cat(lengths),
            y_lens.repeat(exits),
            blank=self.blank_id,
            reduction="none",
        )
        per_exit = losses.view(exits, -1).sum(dim=1) / y_lens.sum()
        return ExitLosses((per_exit * self.exit_weights).sum(), per_exit.detach())
