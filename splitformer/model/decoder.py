"""The transducer's stateless decoder: a prediction network that sees the last few tokens only."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """Embedding, causal depthwise Conv1d over `context_size` tokens, ReLU (Ghodsi et al., ICASSP 2020).

    All exits share it: what was said does not depend on how deep the encoder is.
    """

    def __init__(self, vocab_size: int, decoder_dim: int, context_size: int, blank_id: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.context_size, self.blank_id = vocab_size, context_size, blank_id
        # the blank stands for "nothing said yet": it is embedded as zeros
        self.embedding = nn.Embedding(vocab_size, decoder_dim, padding_idx=blank_id)
        self.conv = nn.Conv1d(decoder_dim, decoder_dim, context_size, groups=decoder_dim, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """Tokens y (N, C + U - 1), each `context_size` = C neighbours a context, to (N, U, decoder_dim)."""
        embedded = self.embedding(y)
        return torch.relu(self.conv(embedded.transpose(1, 2)).transpose(1, 2))

    def start(self, batch: int) -> Tensor:
        """(batch, context_size) tokens before the first one: blanks, on the decoder's device."""
        return torch.full((batch, self.context_size), self.blank_id, device=self.embedding.weight.device)

    def teacher_forced(self, y: Tensor) -> Tensor:
        """Labels y (N, S) to (N, S + 1, decoder_dim): what is predicted from before and after each label."""
        return self(torch.cat([self.start(y.size(0)).to(y.dtype), y], dim=1))
