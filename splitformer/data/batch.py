"""A batch of features and labels, as training, validation and decoding take it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TENSORS = ("x", "x_lens", "y", "y_lens")


class Batch(NamedTuple):
    """Padded features and labels of some utterances."""

    x: Tensor
    """(N, T, C) features"""
    x_lens: Tensor
    """(N,) number of frames"""
    y: Tensor
    """(N, S) labels, padded with 0"""
    y_lens: Tensor
    """(N,) number of labels"""
    texts: list[str]
    """transcripts; training batches have none, because the index keeps labels alone"""
    cut_ids: list[str]
    durations: list[float]
    """seconds of audio of each utterance, without padding"""
    errors: dict[str, str]
    """{cut id: reason} of cuts and noise that were left out because they cannot be read"""

    @property
    def seconds(self) -> float:
        """Total duration."""
        return math.fsum(self.durations)

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        return self._replace(**{name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS})
