"""The early-exit Conformer encoder with parallel layers: Splitformer, EE-baseline and single-exit in one class."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.model.cmvn import make_cmvn
from splitformer.model.conformer import ConformerLayer, frame_masks
from splitformer.model.subsampling import Conv1dSubsampling, Conv2dSubsampling, subsampled_lengths


class ExitOutput(NamedTuple):
    """What leaves the encoder at one exit."""

    layer: int
    """the encoder layer that this exit follows, counted from 1: its name everywhere"""
    encoder_out: Tensor
    """(N, T', D); frames at and beyond `lengths` hold nothing of meaning"""
    lengths: Tensor
    """(N,) valid frames"""


class Encoder(nn.Module):
    """Subsampling, positions, Conformer layers; an exit after each of `config.exit_layers`.

    Where an exit is in `config.parallel_exits`, one more Conformer layer runs beside the block of layers that ends
    there, on every second frame of the block's input, and is added to the block's output (arXiv 2506.18035, figure 1).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.exit_layers, self.num_mel_bins = config.exit_layers, config.num_mel_bins
        self.cmvn = make_cmvn(config)
        if config.subsampling == "conv2d":
            self.subsampling: nn.Module = Conv2dSubsampling(
                config.num_mel_bins, config.d_model, config.subsampling_channels
            )
        else:
            self.subsampling = Conv1dSubsampling(config.num_mel_bins, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

        self.layers = nn.ModuleList([make_layer(config) for _ in range(config.num_layers)])
        self.parallel = nn.ModuleDict(
            {
                str(exit_layer): ParallelBranch(make_layer(config), config.parallel_gate)
                for exit_layer in config.parallel_exits
            }
        )

    def forward(self, x: Tensor, x_lens: Tensor) -> Generator[ExitOutput, Tensor | None, None]:
        """Yield the exits one by one; layers above the last exit that is asked for are never run.

        Utterances may leave on the way: `send(rows)`, with the indices in the last exit's output of those that go on,
        takes the others out of the batch, with the padding that only they needed. `next` goes on with all.

        Args:
          x: (N, T, C) features, padded with anything
          x_lens: (N,) valid frames
        """
        x, lengths = self.front_end(x, x_lens)
        for exit_layer in self.exit_layers:
            x = self.block(exit_layer, x, lengths)
            going_on = yield ExitOutput(exit_layer, x, lengths)
            if going_on is not None:
                lengths = lengths[going_on]
                x = x[going_on, : max(1, int(lengths.max()))]

    def front_end(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Features x (N, T, C) with `x_lens` (N,) to the first layer's input (N, T', D) and its lengths (N,)."""
        x = self.subsampling(self.cmvn(x, x_lens))
        # the residual stream stays float32 under autocast
        return self.dropout(x.float() + sinusoidal_positions(x)), subsampled_lengths(x_lens)

    def block(self, exit_layer: int, x: Tensor, lengths: Tensor) -> Tensor:
        """The layers between the exit before (or the front end), whose output is x, and the exit after `exit_layer`.

        Args:
          x: (N, T', D) with `lengths` (N,)
        Returns:
          (N, T', D), this exit's output
        """
        first = max((each for each in self.exit_layers if each < exit_layer), default=0)
        key_bias, mask = frame_masks(lengths, x)
        out = x
        for layer in self.layers[first:exit_layer]:
            out = layer(out, key_bias, mask)
        if str(exit_layer) in self.parallel:
            out = out + self.parallel[str(exit_layer)](x, lengths)
        return out


class ParallelBranch(nn.Module):
    """A Conformer layer at half the frame rate: every second frame in, each output frame twice.

    With `gate`, a learned scalar that starts at zero multiplies the output, so that training begins as the
    EE-baseline's. The published branch has none.
    """

    def __init__(self, layer: ConformerLayer, gate: bool) -> None:
        super().__init__()
        self.layer = layer
        self.gate = nn.Parameter(torch.zeros(())) if gate else None

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (N, T', D) with `lengths` (N,) to (N, T', D)."""
        half = x[:, ::2]
        half = self.layer(half, *frame_masks(every_nth(lengths, 2), half))
        full = repeat_frames(half, 2, x.size(1))
        return full if self.gate is None else full * self.gate


def every_nth(lengths: Tensor, n: int) -> Tensor:
    """How many of the frames 0, n, 2n, ... are among `lengths` valid ones: the quotient, rounded up."""
    return torch.div(lengths + (n - 1), n, rounding_mode="floor")


def repeat_frames(x: Tensor, times: int, num_frames: int | Tensor) -> Tensor:
    """Each frame of x (N, T, D) so many times, cut to `num_frames`: the inverse of taking every so-manieth."""
    n, t, d = x.shape
    return x.unsqueeze(2).expand(n, t, times, d).reshape(n, t * times, d)[:, :num_frames]


def make_layer(config: ModelConfig) -> ConformerLayer:
    return ConformerLayer(
        config.d_model, config.num_heads, config.feedforward_dim, config.conv_kernel, config.dropout
    )


def sinusoidal_positions(x: Tensor) -> Tensor:
    """Positions for x (N, T, D), computed in the graph: (1, T, D), sine and cosine interleaved.

    Vaswani et al. 2017, section 3.5: PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i + 1) = cos(same).
    """
    t, d = x.size(1), x.size(2)
    inverse = torch.exp(torch.arange(0, d, 2, device=x.device) * (-math.log(10000.0) / d))
    angle = torch.arange(t, device=x.device).unsqueeze(1) * inverse
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).unsqueeze(0)
