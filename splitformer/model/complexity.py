"""The cost of each exit: parameters and multiply-accumulates (MACs) of the encoder up to there and of its head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitformer.model.asr import AsrModel
from splitformer.model.conformer import SelfAttention
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner
from splitformer.model.subsampling import FRAME_SHIFT


@dataclass(frozen=True)
class ExitCost:
    """The cost of one exit: the encoder up to it and its own head, without the heads of other exits."""

    layer: int
    parameters: int
    macs_per_second: float
    """multiply-accumulates per second of audio, head included"""
    head_macs_per_second: float


def complexity(
    encoder: nn.Module, heads: Mapping[str, nn.Module], num_mel_bins: int, seconds: float = 10.0
) -> dict[int, ExitCost]:
    """Measure the cost of every exit on one utterance.

    Linear layers, convolutions and the two products inside self-attention (scores and weighted sum, T T D each, where
    T is the attention's own number of frames) are counted; biases, normalisations and activations are not. Attention
    is quadratic in the length, so the result depends on `seconds`.

    Args:
      encoder: yields `ExitOutput`s for features (1, T, C) and their lengths (1,).
      heads: for each exit, under `str(layer)`, a module that takes the encoder's output, such as
        `AsrModel.ctc_heads` or `transducer_heads(model)`.
      num_mel_bins: C.
      seconds: length of the utterance.
    Returns:
      {layer: cost}, in ascending order.
    Raises:
      TypeError: a module with a weight matrix is of a kind that cannot be counted.
    """
    device = next(encoder.parameters()).device
    num_frames = round(seconds / FRAME_SHIFT)
    x = torch.zeros(1, num_frames, num_mel_bins, device=device)
    x_lens = torch.tensor([num_frames], device=device)
    was_training = encoder.training
    encoder.eval()
    costs = {}
    try:
        with torch.no_grad(), counted(encoder) as upto:
            for exit_output in encoder(x, x_lens):
                head = heads[str(exit_output.layer)]
                with counted(head) as own:
                    head(exit_output.encoder_out)
                costs[exit_output.layer] = ExitCost(
                    exit_output.layer,
                    parameters=sum((upto.parameters | own.parameters).values()),
                    macs_per_second=(upto.macs + own.macs) / seconds,
                    head_macs_per_second=own.macs / seconds,
                )
    finally:
        encoder.train(was_training)
    return costs


def transducer_heads(model: AsrModel) -> dict[str, nn.Module]:
    """Return heads that cost as much as greedy search: joiner and decoder run once for each output frame.

    A search that runs the decoder once per token costs less, and a beam search costs more.
    """
    return {layer: _TransducerHead(model.decoder, joiner) for layer, joiner in model.joiners.items()}


class _TransducerHead(nn.Module):
    def __init__(self, decoder: Decoder, joiner: Joiner) -> None:
        super().__init__()
        self.decoder, self.joiner = decoder, joiner

    def forward(self, encoder_out: Tensor) -> Tensor:
        n, frames, _ = encoder_out.shape
        labels = torch.zeros(n, frames - 1, dtype=torch.long, device=encoder_out.device)
        decoder_out = self.decoder.teacher_forced(labels)
        return self.joiner(self.joiner.encoder_proj(encoder_out), self.joiner.decoder_proj(decoder_out))


class Tally:
    """Totals so far: multiply-accumulates, and the size of each parameter that was used."""

    def __init__(self) -> None:
        self.macs = 0
        self.parameters: dict[int, int] = {}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.macs += _macs(module, inputs, output)
        # children add their parameters when they run
        self.parameters |= {id(p): p.numel() for p in module.parameters(recurse=False)}


@contextmanager
def counted(module: nn.Module) -> Iterator[Tally]:
    """Yield a tally of what `module` and its children compute while the context is open.

    Raises TypeError as `complexity` does.
    """
    tally = Tally()
    handles = [each.register_forward_hook(tally) for each in module.modules()]
    try:
        yield tally
    finally:
        for handle in handles:
            handle.remove()


def _macs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Return the multiply-accumulates of one call of `module`, without those of its children."""
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, SelfAttention):
        n, t, d = inputs[0].shape
        return 2 * n * t * t * d
    if isinstance(module, nn.Embedding):
        return 0  # a table look-up
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        raise TypeError(
            f"{type(module).__name__} has a weight matrix, but only Linear, Conv1d, Conv2d, Embedding and SelfAttention"
            " are counted; add its multiply-accumulates to splitformer.model.complexity"
        )
    return 0
