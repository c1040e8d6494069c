"""The transducer's joiner: combines an encoder frame and a decoder state into logits over tokens and blank."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Joiner(nn.Module):
    """output_linear(tanh(encoder_proj(encoder_out) + decoder_proj(decoder_out))), as in icefall's recipes.

    `forward` takes projected inputs, so that a search projects each frame and each context only once.
    """

    def __init__(self, d_model: int, decoder_dim: int, joiner_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_proj = nn.Linear(d_model, joiner_dim)
        self.decoder_proj = nn.Linear(decoder_dim, joiner_dim)
        self.output_linear = nn.Linear(joiner_dim, vocab_size)

    def forward(self, encoder_projected: Tensor, decoder_projected: Tensor) -> Tensor:
        """Map two projected inputs (..., joiner_dim) that broadcast to logits (..., vocab_size)."""
        return self.output_linear(torch.tanh(encoder_projected + decoder_projected))
