"""The acoustic model: an encoder and the heads of its exits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.model.decoder import Decoder
from splitformer.model.encoder import Encoder, ExitOutput
from splitformer.model.joiner import Joiner
from splitformer.model.unet import UNetEncoder


class AsrModel(nn.Module):
    """An encoder with a linear CTC head, a transducer joiner or both at each exit; all joiners share one decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.heads = config, config.heads
        self.encoder = UNetEncoder(config) if config.encoder == "unet" else Encoder(config)
        if "ctc" in config.heads:
            self.ctc_heads = nn.ModuleDict(
                {str(layer): nn.Linear(config.d_model, config.vocab_size) for layer in config.exit_layers}
            )
        if "transducer" in config.heads:
            self.decoder = Decoder(config.vocab_size, config.decoder_dim, config.context_size)
            self.joiners = nn.ModuleDict(
                {
                    str(layer): Joiner(config.d_model, config.decoder_dim, config.joiner_dim, config.vocab_size)
                    for layer in config.exit_layers
                }
            )

    def ctc_log_probs(self, exit_output: ExitOutput) -> Tensor:
        """Return the (N, T', V) CTC log-probabilities at one exit, in float32."""
        return self.ctc_heads[str(exit_output.layer)](exit_output.encoder_out).float().log_softmax(dim=-1)

    def joiner(self, layer: int) -> Joiner:
        """Return the joiner of the exit after encoder layer `layer`."""
        return cast(Joiner, self.joiners[str(layer)])

    def forward(self, x: Tensor, x_lens: Tensor) -> Iterator[tuple[ExitOutput, Tensor]]:
        """Yield each exit with its CTC log-probabilities, for features x (N, T, C) of x_lens (N,) frames."""
        for exit_output in self.encoder(x, x_lens):
            yield exit_output, self.ctc_log_probs(exit_output)
