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
    """The encoder's output at one exit."""

    layer: int
    """number of the encoder layer before the exit, counted from 1; it names the exit everywhere"""
    encoder_out: Tensor
    """(N, T', D); frames beyond `lengths` are undefined"""
    lengths: Tensor
    """(N,) valid frames"""


class Encoder(nn.Module):
    """Subsampling, positions and Conformer layers, with an exit after each layer in `config.exit_layers`.

    For each exit in `config.parallel_exits`, one more Conformer layer runs parallel to the block of layers that ends
    there. It sees every second frame of the block's input and is added to the block's output (arXiv 2506.18035,
    figure 1).
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
            {str(layer): ParallelBranch(make_layer(config), config.parallel_gate) for layer in config.parallel_exits}
        )

    def output_lengths(self, x_lens: Tensor) -> Tensor:
        """Return the number of output frames (N,) for x_lens (N,) feature frames, on the device of x_lens."""
        return subsampled_lengths(x_lens)

    def forward(self, x: Tensor, x_lens: Tensor) -> Generator[ExitOutput, Tensor | None, None]:
        """Yield the exits one by one; layers above the last exit that the caller asks for are not run.

        `send(rows)` drops utterances that exit early: `rows` are the indices, in the last exit's output, of those that
        stay active. The batch is trimmed to them and to their longest. `next` keeps all utterances active.

        Args:
          x: (N, T, C) features; padding may hold anything
          x_lens: (N,) valid frames
        """
        x, lengths = self.front_end(x, x_lens)
        for exit_layer in self.exit_layers:
            x = self.block(exit_layer, x, lengths)
            active = yield ExitOutput(exit_layer, x, lengths)
            if active is not None:
                lengths = lengths[active]
                x = x[active, : max(1, int(lengths.max()))]

    def front_end(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map features x (N, T, C) of x_lens (N,) frames to the first layer's input (N, T', D) and its lengths (N,)."""
        x = self.subsampling(self.cmvn(x, x_lens))
        # the residual stream stays float32 under autocast
        return self.dropout(x.float() + sinusoidal_positions(x)), self.output_lengths(x_lens)

    def block(self, exit_layer: int, x: Tensor, lengths: Tensor) -> Tensor:
        """Run the layers from the previous exit (or the front end) to the exit after layer `exit_layer`.

        Args:
          x: (N, T', D) output of the previous exit, with `lengths` (N,) valid frames
        Returns:
          (N, T', D) output of this exit
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
    """A Conformer layer on every second frame, whose output frames are each repeated once.

    With `gate`, a learned scalar that starts at zero multiplies the output, so that training starts from the
    EE-baseline. The published branch has no gate.
    """

    def __init__(self, layer: ConformerLayer, gate: bool) -> None:
        super().__init__()
        self.layer = layer
        self.gate = nn.Parameter(torch.zeros(())) if gate else None

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map x (N, T', D) with `lengths` (N,) valid frames to the same shape."""
        half = x[:, ::2]
        half = self.layer(half, *frame_masks(every_nth(lengths, 2), half))
        full = repeat_frames(half, 2, x.size(1))
        return full if self.gate is None else full * self.gate


def every_nth(lengths: Tensor, n: int) -> Tensor:
    """Return how many of the frames 0, n, 2n, ... are valid, for `lengths` valid frames: lengths / n, rounded up."""
    return torch.div(lengths + (n - 1), n, rounding_mode="floor")


def repeat_frames(x: Tensor, times: int, num_frames: int | Tensor) -> Tensor:
    """Repeat each frame of x (N, T, D) `times` times and trim to `num_frames`: undo taking every n-th frame."""
    n, t, d = x.shape
    return x.unsqueeze(2).expand(n, t, times, d).reshape(n, t * times, d)[:, :num_frames]


def make_layer(config: ModelConfig) -> ConformerLayer:
    return ConformerLayer(
        config.d_model, config.num_heads, config.feedforward_dim, config.conv_kernel, config.dropout
    )


def sinusoidal_positions(x: Tensor) -> Tensor:
    """Return the positional encoding (1, T, D) for x (N, T, D), sine and cosine interleaved.

    Vaswani et al. 2017, section 3.5: PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i + 1) = cos(same). It is computed in
    the graph, so that an exported model takes any length.
    """
    t, d = x.size(1), x.size(2)
    inverse = torch.exp(torch.arange(0, d, 2, device=x.device) * (-math.log(10000.0) / d))
    angle = torch.arange(t, device=x.device).unsqueeze(1) * inverse
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).unsqueeze(0)
