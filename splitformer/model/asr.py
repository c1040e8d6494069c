"""The encoder with its CTC heads: what a checkpoint holds and a device runs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.model.encoder import Encoder, ExitOutput


class AsrModel(nn.Module):
    """Encoder and one linear CTC head per exit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.ctc_heads = nn.ModuleDict(
            {str(layer): nn.Linear(config.d_model, config.vocab_size) for layer in config.exit_layers}
        )

    def ctc_log_probs(self, exit_output: ExitOutput) -> Tensor:
        """(N, T', V) log-probabilities at one exit, in float32."""
        return self.ctc_heads[str(exit_output.layer)](exit_output.encoder_out).float().log_softmax(dim=-1)

    def forward(self, x: Tensor, x_lens: Tensor) -> Iterator[tuple[ExitOutput, Tensor]]:
        """Yield each exit with its log-probabilities; features x (N, T, C) with x_lens (N,)."""
        for exit_output in self.encoder(x, x_lens):
            yield exit_output, self.ctc_log_probs(exit_output)
