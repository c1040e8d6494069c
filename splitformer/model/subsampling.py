"""Front ends that subsample feature frames by four."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLING_RATE = 16000
"""Sampling rate in Hz of the audio that features are computed from."""
FRAME_SHIFT = 0.01
"""Seconds between two feature frames."""
OUTPUT_FRAME = 4 * FRAME_SHIFT
"""Seconds between two frames of the encoder."""


def subsampled_lengths(lengths: Tensor) -> Tensor:
    """Return the number of output frames for each number of input frames in `lengths`.

    Two unpadded convolutions of kernel 3 and stride 2 each map T frames to floor((T - 3) / 2) + 1 = floor((T - 1) / 2);
    fewer than `MIN_FRAMES` input frames give none.
    """
    lengths = torch.div(lengths - 1, 2, rounding_mode="floor")
    lengths = torch.div(lengths - 1, 2, rounding_mode="floor")
    return lengths.clamp(min=0)


MIN_FRAMES = 7
"""The smallest number of input frames that gives an output frame."""


class Conv1dSubsampling(nn.Module):
    """The published front end: two Conv1d (kernel 3, stride 2) without a nonlinearity."""

    def __init__(self, num_mel_bins: int, d_model: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(num_mel_bins, d_model, kernel_size=3, stride=2)
        self.conv2 = nn.Conv1d(d_model, d_model, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, T, C) to (N, T', D)."""
        return self.conv2(self.conv1(x.transpose(1, 2))).transpose(1, 2)


class Conv2dSubsampling(nn.Module):
    """Two Conv2d (3 x 3, stride 2) with ReLU over time and frequency, then a projection (arXiv 2005.08100)."""

    def __init__(self, num_mel_bins: int, d_model: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        bins = ((num_mel_bins - 1) // 2 - 1) // 2
        self.out = nn.Linear(channels * bins, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, T, C) to (N, T', D)."""
        x = torch.relu(self.conv1(x.unsqueeze(1)))
        x = torch.relu(self.conv2(x))  # (N, channels, T', bins)
        return self.out(x.permute(0, 2, 1, 3).flatten(2))
