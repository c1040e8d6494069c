"""Normalisation of the features, as part of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.model.conformer import valid_frames


def make_cmvn(config: ModelConfig) -> UtteranceCmvn | NoCmvn:
    return UtteranceCmvn(config.num_mel_bins) if config.cmvn == "utterance" else NoCmvn()


class UtteranceCmvn(nn.Module):
    """Subtract the utterance's mean per bin and divide by the training set's standard deviation.

    The deviation is that of the training features around the means of their utterances. It is a buffer, set once
    before training (`set_deviation`) and saved in the checkpoint.
    """

    deviation: Tensor

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(num_mel_bins))

    def set_deviation(self, deviation: Tensor) -> None:
        self.deviation.copy_(deviation)

    def forward(self, x: Tensor, x_lens: Tensor) -> Tensor:
        """Normalise features x (N, T, C) of x_lens (N,) frames."""
        mask = valid_frames(x_lens, x.size(1)).unsqueeze(2).to(x.dtype)
        mean = (x * mask).sum(dim=1, keepdim=True) / x_lens.clamp(min=1).view(-1, 1, 1)
        return (x - mean) / self.deviation


class NoCmvn(nn.Module):
    """Return the features unchanged."""

    def forward(self, x: Tensor, x_lens: Tensor) -> Tensor:
        return x
