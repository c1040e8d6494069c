"""The CTC loss at all exits in one call (Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def ctc_losses(
    log_probs: Sequence[Tensor],
    lengths: Tensor,
    y: Tensor,
    y_lens: Tensor,
    blank_id: int = 0,
    zero_infinity: bool = False,
) -> Tensor:
    """(E, N) losses in nats, one for each exit and utterance.

    Args:
      log_probs: E tensors (N, T', V), one per exit.
      lengths: (N,) valid output frames, the same at all exits.
      y: (N, S) labels, padded with anything; y_lens: (N,) valid labels.
      zero_infinity: an utterance with more labels than frames counts as 0, not as infinity.
    """
    exits = len(log_probs)
    # stacked along the batch: the exits share their labels
    return nn.functional.ctc_loss(
        torch.cat(list(log_probs)).transpose(0, 1),
        y.repeat(exits, 1),
        lengths.repeat(exits),
        y_lens.repeat(exits),
        blank=blank_id,
        reduction="none",
        zero_infinity=zero_infinity,
    ).view(exits, -1)
