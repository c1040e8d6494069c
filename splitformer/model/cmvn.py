"""The early-exit Conformer encoder with parallel layers: Splitformer, EE-baseline and single-exit in one class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.model.conformer import valid_frames


def make_cmvn(config: ModelConfig) -> nn.Module:
    return UtteranceCmvn(config.num_mel_bins) if config.cmvn == "utterance" else NoCmvn()


class UtteranceCmvn(nn.Module):
    """Subtract the utterance's own mean per bin, divide by the deviation that the training set has around such means.

    The deviation is a buffer, set once from training features (`set_deviation`) and kept in the checkpoint.
    """

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(num_mel_bins))

    def set_deviation(self, deviation: Tensor) -> None:
        self.deviation.copy_(deviation)

    def forward(self, x: Tensor, x_lens: Tensor) -> Tensor:
        """x (N, T, C) with `x_lens` (N,) valid frames to the same shape."""
        mask = valid_frames(x_lens, x.size(1)).unsqueeze(2).to(x.dtype)
        mean = (x * mask).sum(dim=1, keepdim=True) / x_lens.clamp(min=1).view(-1, 1, 1)
        return (x - mean) / self.deviation


class NoCmvn(nn.Module):
    """Features as they come."""

    def forward(self, x: Tensor, x_lens: Tensor) -> Tensor:
        return x
