"""The encoder with its heads: what a checkpoint holds and a device runs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.model.decoder import Decoder
from splitformer.model.encoder import Encoder, ExitOutput
from splitformer.model.joiner import Joiner
from splitformer.model.unet import UNetEncoder


class AsrModel(nn.Module):
    """Encoder; per exit a linear CTC head, a joiner or both (`config.heads`); one decoder for all joiners."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
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
        """(N, T', V) log-probabilities at one exit, in float32."""
        return self.ctc_heads[str(exit_output.layer)](exit_output.encoder_out).float().log_softmax(dim=-1)

    def joiner(self, layer: int) -> Joiner:
        """The joiner of the exit after encoder layer `layer`."""
        return self.joiners[str(layer)]

    def forward(self, x: Tensor, x_lens: Tensor) -> Iterator[tuple[ExitOutput, Tensor]]:
        """Yield each exit with its CTC log-probabilities; features x (N, T, C) with x_lens (N,)."""
        for exit_output in self.encoder(x, x_lens):
            yield exit_output, self.ctc_log_probs(exit_output)
