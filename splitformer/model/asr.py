"""The encoder with its heads: what a checkpoint holds and a device runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.early_exit.running import Leaving, _select, _some, has_nan
from splitformer.model.decoder import Decoder
from splitformer.model.encoder import Encoder, ExitOutput
from splitformer.model.joiner import Joiner
from splitformer.model.unet import UNetEncoder
from splitformer.training.fast_cpu import Linear


class AsrModel(nn.Module):
    """Encoder; per exit a linear CTC head, a joiner or both (`config.heads`); one decoder for all joiners."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.encoder = UNetEncoder(config) if config.encoder == "unet" else Encoder(config)
        if "ctc" in config.heads:
            self.ctc_heads = nn.ModuleDict(
                {str(layer): Linear(config.d_model, config.vocab_size) for layer in config.exit_layers}
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

    def leave_early(
        self, x: Tensor, x_lens: Tensor, stops: Callable[[Tensor, ExitOutput, Tensor | None], Tensor]
    ) -> Iterator[Leaving]:
        """Run each utterance up to the exit at which `stops` lets it go; what goes on is a smaller batch.

        An utterance without an output frame leaves at the first exit, and everything left at the last one. A NaN in an
        exit's output sends its utterance on to the next; where none of these is sound either, the utterance leaves
        with the last exit that was, and where none was, with the last exit's NaN.

        Args:
          x, x_lens: features (N, T, C) and their lengths (N,).
          stops: called with rows (n,), their exit output and CTC log-probabilities (None without a CTC head); returns
            (n,), true where an utterance stops. It is not asked at the last exit, nor about NaN and empty utterances.
        Yields:
          those that leave, exit by exit; each utterance once.
        """
        rows = torch.arange(x.size(0), device=x.device)
        nan_exits = torch.zeros_like(rows)
        sound: dict[int, Leaving] = {}  # {row: its last exit without NaN}, while it meets nothing but NaN
        exits = self.encoder(x, x_lens)
        before, going_on = None, None
        was_broken = torch.ones_like(rows, dtype=torch.bool)  # no exit comes before the first, so none to go back to
        while len(rows):
            exit_output = exits.send(going_on)
            log_probs = self.ctc_log_probs(exit_output) if "ctc" in self.heads else None
            broken = has_nan(exit_output.encoder_out if log_probs is None else log_probs, exit_output.lengths)
            now = Leaving(rows, exit_output, log_probs, nan_exits + broken)
            still_broken = rows[broken & was_broken].tolist()
            sound = {row: leaving for row, leaving in sound.items() if row in still_broken}
            for row in rows[broken & ~was_broken].tolist():
                sound[row] = _select(before, before.rows == row)
            if exit_output.layer == self.encoder.exit_layers[-1]:
                for place, row in enumerate(rows.tolist()):
                    if row in sound:
                        yield sound[row]._replace(nan_exits=now.nan_exits[place : place + 1])
                yield from _some(now, torch.tensor([row not in sound for row in rows.tolist()], device=x.device))
                return

            leave = exit_output.lengths == 0
            for question in _some(now, ~broken & ~leave):
                stop = stops(question.rows, question.exit_output, question.log_probs)
                leave |= torch.isin(rows, question.rows[stop])
            yield from _some(now, leave)
            if leave.any():
                going_on = (~leave).nonzero().flatten()
                before, was_broken = _select(now, ~leave), broken[~leave]
            else:
                before, going_on, was_broken = now, None, broken
            rows, nan_exits = before.rows, before.nan_exits
