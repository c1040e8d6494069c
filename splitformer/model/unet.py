"""The authors' U-Net variant of the encoder (`Early_zipformer` in their code): stacks of layers at lower frame rates.

It is not a configuration of `Encoder`: a convolution halves the frame rate before the layers, every second frame is
dropped after them, the stacks run one after another, and there is one exit because the frame rate varies in between.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor, nn

from splitformer.config import ModelConfig
from splitformer.model.cmvn import make_cmvn
from splitformer.model.conformer import frame_masks
from splitformer.model.encoder import ExitOutput, every_nth, make_layer, repeat_frames, sinusoidal_positions


class UNetEncoder(nn.Module):
    """A convolution of stride 2, Conformer layers, the stacks, and at the end every second frame.

    A stack takes every n-th frame, runs its layers, repeats each frame n times and adds the result to its input.
    T feature frames give ceil(floor((T - 1) / 2) / 2) output frames: those of `subsampled_lengths`, or one more.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.exit_layers = config.exit_layers
        self.cmvn = make_cmvn(config)
        self.subsampling = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, stride=2)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([make_layer(config) for _ in range(config.num_layers)])
        first = config.num_layers - sum(config.unet_stacks)
        self.stacks = [(1, range(first))]
        """(n: the stack takes every n-th frame, indices of its layers)"""
        for size, factor in zip(config.unet_stacks, config.unet_factors, strict=True):
            self.stacks.append((factor, range(first, first + size)))
            first += size

    def output_lengths(self, x_lens: Tensor) -> Tensor:
        """See `Encoder.output_lengths`."""
        return every_nth(halved(x_lens), 2)

    def forward(self, x: Tensor, x_lens: Tensor) -> Generator[ExitOutput, Tensor | None, None]:
        """Yield the one exit; see `Encoder.forward`."""
        lengths = halved(x_lens)
        x = self.subsampling(self.cmvn(x, x_lens).transpose(1, 2)).transpose(1, 2)
        x = self.dropout(x.float() + sinusoidal_positions(x))  # the residual stream stays float32 under autocast
        for factor, indices in self.stacks:
            y = x[:, ::factor]
            masks = frame_masks(every_nth(lengths, factor), y)
            for index in indices:
                y = self.layers[index](y, *masks)
            # the layers before the stacks run at the full rate, without a connection around them
            x = y if factor == 1 else x + repeat_frames(y, factor, x.size(1))
        yield ExitOutput(self.exit_layers[-1], x[:, ::2], every_nth(lengths, 2))


def halved(lengths: Tensor) -> Tensor:
    """Return the number of frames after an unpadded convolution of kernel 3 and stride 2."""
    return torch.div(lengths - 1, 2, rounding_mode="floor").clamp(min=0)
