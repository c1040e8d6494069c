"""What it costs to run the encoder up to each of its exits: parameters and multiply-accumulates."""

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

FRAMES_PER_SECOND = 100
"""Feature frames in a second of audio: fbank with a frame shift of 10 ms."""


@dataclass(frozen=True)
class ExitCost:
    """The cost of one exit: everything that runs before it and its own head, other exits' heads left out.

    parameters: of the modules that ran.
    macs_per_second: multiply-accumulates per second of audio; head_macs_per_second: those of its head alone.
    """

    layer: int
    parameters: int
    macs_per_second: float
    head_macs_per_second: float


def complexity(
    encoder: nn.Module, heads: Mapping[str, nn.Module], num_mel_bins: int, seconds: float = 10.0
) -> dict[int, ExitCost]:
    """Measure the cost of every exit on one utterance.

    Counted are linear layers, convolutions and the two products inside self-attention (scores and weighted
    sum, T T D each, where T is the attention's own number of frames); biases, normalisations and activations
    are not. Attention is quadratic in the length, so the answer depends on `seconds`.

    Args:
      encoder: yields `ExitOutput`s for features (1, T, C) and their lengths (1,).
      heads: for each exit, under `str(layer)`, a module that takes the encoder's output, such as
        `AsrModel.ctc_heads`, or `transducer_heads(model)`.
      num_mel_bins: C.
      seconds: length of the utterance.
    Returns:
      {layer: cost}, rising.
    Raises:
      TypeError: where a module with a weight matrix is of a kind whose products are not counted.
    """
    device = next(encoder.parameters()).device
    num_frames = round(seconds * FRAMES_PER_SECOND)
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
    """The transducer's cost as that of greedy search: joiner and decoder once for each output frame.

    That is more than a search needs which runs the decoder once a token, and less than a beam's.
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
    """Running totals: multiply-accumulates, and the sizes of the parameters met, each once."""

    def __init__(self) -> None:
        self.macs = 0
        self.parameters: dict[int, int] = {}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.macs += _macs(module, inputs, output)
        # a module's own parameters only: those of its children are added when they run
        self.parameters |= {id(p): p.numel() for p in module.parameters(recurse=False)}


@contextmanager
def counted(module: nn.Module) -> Iterator[Tally]:
    """Add up, in the tally that is yielded, what `module` and its children do while the context is open.

    Raises TypeError as `complexity`.
    """
    tally = Tally()
    handles = [each.register_forward_hook(tally) for each in module.modules()]
    try:
        yield tally
    finally:
        for handle in handles:
            handle.remove()


def _macs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Multiply-accumulates of one call of `module`, its children's not included."""
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, SelfAttention):
        n, t, d = inputs[0].shape
        return 2 * n * t * t * d
    if isinstance(module, nn.Embedding):
        return 0  # a look-up
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        raise TypeError(
            f"{type(module).__name__} has a weight matrix, and only Linear, Conv1d, Conv2d, Embedding and SelfAttention"
            " are counted; add its multiply-accumulates to splitformer.model.complexity"
        )
    return 0
