"""The transducer's stateless decoder: a prediction network that sees only the last few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """Embedding, causal depthwise Conv1d over `context_size` tokens, ReLU (Ghodsi et al., ICASSP 2020).

    All exits share it, because it depends on the transcript alone.
    """

    def __init__(self, vocab_size: int, decoder_dim: int, context_size: int, blank_id: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.context_size, self.blank_id = vocab_size, context_size, blank_id
        # blanks pad the context at the start of an utterance; they are embedded as zeros
        self.embedding = nn.Embedding(vocab_size, decoder_dim, padding_idx=blank_id)
        self.conv = nn.Conv1d(decoder_dim, decoder_dim, context_size, groups=decoder_dim, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """Map tokens y (N, C + U - 1), in which each C = `context_size` neighbours are a context, to (N, U, D)."""
        embedded = self.embedding(y)
        return torch.relu(self.conv(embedded.transpose(1, 2)).transpose(1, 2))

    def start(self, batch: int) -> Tensor:
        """Return the (batch, context_size) blanks that precede the first token, on the decoder's device."""
        return torch.full((batch, self.context_size), self.blank_id, device=self.embedding.weight.device)

    def teacher_forced(self, y: Tensor) -> Tensor:
        """Map labels y (N, S) to the states (N, S + 1, decoder_dim) before the first and after each label."""
        return self(torch.cat([self.start(y.size(0)).to(y.dtype), y], dim=1))
